import numpy as np
from PIL import Image

from edgeke.data.copies import equal, fingerprints, joined, near


def scenes(count: int, seed: int = 0) -> np.ndarray:
    """Smooth pictures `[N, 1, 32, 32]` that show different things."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (count, 6, 6), np.uint8)
    large = [Image.fromarray(one).resize((32, 32), Image.Resampling.BICUBIC) for one in small]
    return np.stack([np.asarray(one) for one in large])[:, None]


def test_copies_are_grouped():
    images = scenes(6)
    images[4] = images[5] = images[0]
    images[3] = images[2]
    assert equal(fingerprints(images)[0]) == [[0, 4, 5], [2, 3]]


def test_near_copies_are_found_and_others_are_not():
    images = scenes(300)
    random = np.random.default_rng(1)
    noisy = images[:20] * 0.9 + 8 + random.normal(0, 3, (20, 1, 32, 32))  # another exposure
    images = np.concatenate([images, np.clip(noisy, 0, 255).astype(np.uint8)])
    pairs = near(fingerprints(images)[1])
    assert len(set(pairs) & {(n, 300 + n) for n in range(20)}) >= 18
    assert len(pairs) <= 21


def test_flat_pictures_are_no_near_copies():
    flat = np.arange(50, dtype=np.uint8)[:, None, None, None] * np.ones((1, 1, 8, 8), np.uint8)
    assert near(fingerprints(flat)[1]) == []


def test_what_is_joined_over_several_groups_is_one():
    assert joined(6, [[0, 3], [4, 3], [1, 5]]).tolist() == [0, 1, 2, 0, 0, 1]

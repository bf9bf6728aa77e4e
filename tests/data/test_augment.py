import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from toys import ROOT, replace

from edgeke.data.augment import Augment, Normalise, crop_and_flip, cutout
from edgeke.params import Augmentation


def batch() -> torch.Tensor:
    return torch.arange(5 * 2 * 6 * 6).reshape(5, 2, 6, 6).remainder(251).to(torch.uint8)


def test_every_crop_is_a_window_of_the_padded_image():
    images = batch()
    cropped = crop_and_flip(images, 2, False, torch.Generator().manual_seed(0))
    padded = F.pad(images, (2, 2, 2, 2))
    offsets = set()
    for image, whole in zip(cropped, padded, strict=True):
        found = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if torch.equal(whole[:, y : y + 6, x : x + 6], image)
        ]
        assert len(found) == 1
        offsets.add(found[0])
    assert len(offsets) > 1  # drawn per image


def test_flips_mirror_whole_images_and_about_half_of_them():
    images = batch().repeat(40, 1, 1, 1)
    flipped = crop_and_flip(images, 0, True, torch.Generator().manual_seed(1))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 60 < int(mirrored.sum()) < 140


def test_normalise_gives_zero_mean_and_unit_deviation():
    images = torch.randint(0, 256, (400, 2, 8, 8), dtype=torch.uint8)
    scaled = images.double() / 255
    normalise = Normalise(
        scaled.mean((0, 2, 3)).tolist(),
        scaled.std((0, 2, 3), correction=0).tolist(),
        torch.device("cpu"),
    )
    out = normalise(images)
    assert out.dtype == torch.float32
    assert torch.allclose(out.mean((0, 2, 3)), torch.zeros(2), atol=1e-5)
    assert torch.allclose(out.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-5)


FILL = torch.full((1, 3, 1, 1), 100.0)


def colour(count: int = 64, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def test_cutout_fills_one_square_per_image():
    images = torch.zeros(200, 3, 16, 16, dtype=torch.uint8)
    cut = cutout(images, 6, FILL, torch.Generator().manual_seed(0))
    filled = (cut == 100).all(dim=1)
    areas = filled.flatten(1).sum(1)
    assert areas.max() == 36
    assert areas.min() >= 9  # a centre in the corner leaves a quarter
    assert len(areas.unique()) > 3


def augment(images, labels, seed: int = 0, **settings):
    nothing = Augmentation(0, False, 0, 0.0, 0.0, False, 1)
    classes = int(labels.max()) + 1
    fill = FILL[:, : images.shape[1]]
    generator = torch.Generator().manual_seed(seed)
    return Augment(replace(nothing, **settings), classes, fill)(images, labels, generator)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_targets_are_mixed_like_pixels(mixup, cutmix):
    """Images of one constant colour per class: the mean pixel says what was mixed in."""
    labels = torch.arange(40) % 2
    images = (labels * 200).to(torch.uint8)[:, None, None, None].expand(40, 3, 16, 16)
    shares = set()
    for seed in range(10):
        mixed, targets = augment(images, labels, seed, mixup=mixup, cutmix=cutmix)
        assert torch.allclose(mixed.mean((1, 2, 3)) / 200, targets[:, 1], atol=1e-5)
        assert torch.allclose(targets.sum(1), torch.ones(40))
        shares.add(float(targets.max()))
    assert len(shares) > 5


@pytest.mark.parametrize("channels", [1, 3])
def test_trivial_augment_changes_each_image_in_its_own_way(channels):
    images, labels = colour()[:, :channels], torch.arange(64) % 3
    changed, targets = augment(images, labels, trivial_augment=True)
    assert changed.dtype == torch.uint8
    assert torch.equal(targets, labels)
    same = (changed == images).flatten(1).all(1)
    assert 0 < int(same.sum()) < 30  # identity is one of fourteen operations, some change little


def test_the_generator_alone_decides_and_the_global_one_is_left_alone():
    """A resumed training restores the generator, and must go on with the same numbers."""
    images, labels = colour(), torch.arange(64) % 3
    every = {"flip": True, "cutout": 4, "mixup": 0.2, "cutmix": 1.0, "trivial_augment": True}
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = augment(images, labels, **every)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = augment(images, labels, **every)
    assert all(map(torch.equal, first, second))
    assert not torch.equal(first[0], augment(images, labels, 1, **every)[0])
    assert first[1].shape == (64, 3)


def test_without_settings_nothing_happens_and_torchvision_is_not_imported():
    code = (
        "import sys, torch; from edgeke.data.augment import Augment as A;"
        "from edgeke.params import Augmentation as S;"
        "images = torch.ones(4, 1, 8, 8, dtype=torch.uint8); labels = torch.arange(4);"
        "out = A(S(0, False, 0, 0.0, 0.0, False, 1), 4, torch.zeros(1, 1, 1, 1))"
        "(images, labels, torch.Generator());"
        "assert torch.equal(out[0], images) and torch.equal(out[1], labels);"
        "assert 'torchvision' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)

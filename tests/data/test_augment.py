import torch
from torch.nn import functional as F

from edgeke.data.augment import Normalise, augment


def batch() -> torch.Tensor:
    return torch.arange(5 * 2 * 6 * 6).reshape(5, 2, 6, 6).remainder(251).to(torch.uint8)


def test_every_crop_is_a_window_of_the_padded_image():
    images = batch()
    cropped = augment(images, 2, False, torch.Generator().manual_seed(0))
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
    flipped = augment(images, 0, True, torch.Generator().manual_seed(1))
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 60 < int(mirrored.sum()) < 140


def test_the_generator_decides_and_nothing_is_drawn_without_augmentation():
    images = batch()
    first, second = (augment(images, 2, True, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(augment(images, 0, False, torch.Generator()), images)


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

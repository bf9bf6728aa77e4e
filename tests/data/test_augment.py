import pytest
import torch
from torch.nn import functional as F

from edgeke.data.augment import Augment, Normalise, crop_and_flip, cutout, mix
from edgeke.data.trivial_augment import OPERATIONS, trivial_augment
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


def test_the_generator_decides_and_nothing_is_drawn_without_augmentation():
    images = batch()
    first, second = (
        crop_and_flip(images, 2, True, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(crop_and_flip(images, 0, False, torch.Generator()), images)


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


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_targets_are_mixed_like_pixels(mixup, cutmix):
    """Images of one constant colour per class: the mean pixel says what was mixed in."""
    labels = torch.arange(40) % 2
    images = (labels * 200).to(torch.uint8)[:, None, None, None].expand(40, 3, 16, 16)
    targets = F.one_hot(labels, 2).float()
    mixed, mixed_targets = mix(images, targets, mixup, cutmix, torch.Generator().manual_seed(0))
    assert torch.allclose(mixed.mean((1, 2, 3)) / 200, mixed_targets[:, 1], atol=1e-5)
    assert torch.allclose(mixed_targets.sum(1), torch.ones(40))
    assert ((mixed_targets > 0.01).sum(1) == 2).sum() > 5


def test_trivial_augment_changes_each_image_in_its_own_way_and_repeatably():
    images = colour()
    first, second = (trivial_augment(images, FILL, torch.Generator().manual_seed(1)) for _ in "ab")
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)
    same = (first == images).flatten(1).all(1)
    assert 0 < int(same.sum()) < 20  # identity is one of fourteen operations


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_at_no_strength_moves_an_image(name):
    images, none = colour(4).float(), torch.zeros(4)
    out = OPERATIONS[name](images, none, torch.ones(4), FILL)
    # Two have no strength, and solarize turns white pixels even at its least.
    if name not in ("autocontrast", "equalize", "solarize"):
        assert torch.allclose(out, images, atol=1e-3)
    assert out.shape == images.shape


def test_operations_equal_torchvisions():
    from torchvision.transforms.v2 import functional as v2

    images = colour(3, side=48)
    pixels, strength, sign = images.float(), torch.full((3,), 0.5), torch.ones(3)
    theirs = {
        "brightness": v2.adjust_brightness(images, 1.495),
        "contrast": v2.adjust_contrast(images, 1.495),
        "colour": v2.adjust_saturation(images, 1.495),
        "sharpness": v2.adjust_sharpness(images, 1.495),
        "posterize": v2.posterize(images, 5),
        "solarize": v2.solarize(images, 127.5),
        "autocontrast": v2.autocontrast(images),
        "equalize": v2.equalize(images),
    }
    for name, expected in theirs.items():
        ours = OPERATIONS[name](pixels, strength, sign, FILL).round().clamp(0, 255)
        difference = (ours - expected.float()).abs()
        assert difference.max() <= 2, name
        assert difference.mean() < 0.8, name


def test_settings_choose_what_is_done():
    labels = torch.arange(64) % 3
    nothing = Augmentation(0, False, 0, 0.0, 0.0, False)
    images, targets = Augment(nothing, 3, FILL)(colour(), labels, torch.Generator())
    assert torch.equal(images, colour())
    assert torch.equal(targets, labels)
    everything = Augmentation(2, True, 4, 0.2, 1.0, True)
    images, targets = Augment(everything, 3, FILL)(colour(), labels, torch.Generator())
    assert images.shape == (64, 3, 16, 16)
    assert targets.shape == (64, 3)

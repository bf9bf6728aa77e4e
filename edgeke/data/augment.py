"""Normalisation and augmentation of whole batches that already lie on the device.

All random numbers come from a generator on the CPU, so that every device draws the same and the
device is never waited for.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgeke.data.trivial_augment import trivial_augment
from edgeke.params import Augmentation

__all__ = ["Augment", "Normalise", "crop_and_flip", "cutout", "mix"]


class Normalise:
    """Images `[N, C, H, W]` in 0..255 to float32, zero mean and unit deviation per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


class Augment:
    """What a profile does to training images: crop, flip, TrivialAugment, cutout, then mixing."""

    def __init__(self, settings: Augmentation, classes: int, fill: Tensor) -> None:
        self.settings, self.classes = settings, classes
        self.fill = fill  # the mean colour, [1, C, 1, 1] in 0..255

    def __call__(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Images uint8 `[N, C, H, W]` and labels `[N]`; targets `[N, K]` where mixed."""
        settings = self.settings
        images = crop_and_flip(images, settings.crop_padding, settings.flip, generator)
        if settings.trivial_augment:
            images = trivial_augment(images, self.fill, generator)
        if settings.cutout:
            images = cutout(images, settings.cutout, self.fill, generator)
        if settings.mixup or settings.cutmix:
            targets = F.one_hot(labels, self.classes).float()
            return mix(images, targets, settings.mixup, settings.cutmix, generator)
        return images, labels


def crop_and_flip(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """A random crop after zero padding and a random mirror image, drawn per image.

    uint8 `[N, C, H, W]` in and out. Zero padding as in He et al. 2016.
    """
    count, _, height, width = images.shape
    if padding:
        offsets = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator)
        offsets = offsets.to(images.device)
        rows = offsets[0] + torch.arange(height, device=images.device)
        columns = offsets[1] + torch.arange(width, device=images.device)
        padded = F.pad(images, (padding,) * 4)
        index = torch.arange(count, device=images.device)[:, None, None]
        images = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
        images = images.permute(0, 3, 1, 2)
    if flip:
        mirrored = torch.rand(count, generator=generator).to(images.device) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


def cutout(images: Tensor, side: int, fill: Tensor, generator: torch.Generator) -> Tensor:
    """Fill a square of `side` pixels around a random centre (DeVries and Taylor 2017).

    Squares reach over the edge, so that no part of the image is always seen.
    """
    inside = _boxes(
        images, torch.full((len(images),), side), torch.full((len(images),), side), generator
    )
    return torch.where(inside, fill.to(images.dtype), images)


def mix(
    images: Tensor, targets: Tensor, mixup: float, cutmix: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mix every image with a random partner; targets `[N, K]` are mixed by the same share.

    `mixup` (Zhang et al. 2018) blends, `cutmix` (Yun et al. 2019) pastes a box; both are the
    parameter of a Beta distribution, 0 is off, and with both on each image draws one of them.
    """
    count, _, height, width = images.shape
    partner = torch.randperm(count, generator=generator)
    pasted = torch.rand(count, generator=generator) < 0.5 if mixup and cutmix else None
    pasted = torch.full((count,), bool(cutmix)) if pasted is None else pasted
    seed = int(torch.randint(2**62, (), generator=generator))
    random = np.random.default_rng(seed)  # torch draws no Beta from a generator
    blended = torch.from_numpy(random.beta(mixup or 1.0, mixup or 1.0, count)).float()
    kept = torch.from_numpy(random.beta(cutmix or 1.0, cutmix or 1.0, count)).float()
    side = (1 - kept).sqrt()
    boxes = _boxes(images, (side * height).round(), (side * width).round(), generator)
    # A box over the edge pastes less than was drawn: the share is what was really kept.
    kept = 1 - boxes.float().mean(dim=(1, 2, 3))
    device = images.device
    pasted, blended, partner = pasted.to(device), blended.to(device), partner.to(device)
    share = torch.where(pasted[:, None, None, None], (~boxes).float(), blended[:, None, None, None])
    mixed = images * share + images[partner] * (1 - share)
    weight = torch.where(pasted, kept, blended)[:, None]
    return mixed, targets * weight + targets[partner] * (1 - weight)


def _boxes(images: Tensor, heights: Tensor, widths: Tensor, generator: torch.Generator) -> Tensor:
    """Which pixels lie in a box of each image's own size around a random centre: `[N, 1, H, W]`."""
    count, _, height, width = images.shape
    centres = torch.rand(2, count, generator=generator)
    inside = []
    for length, centre, extent in ((height, centres[0], heights), (width, centres[1], widths)):
        first = (centre * length - extent / 2).round()[:, None]
        place = torch.arange(length)[None]
        inside.append((place >= first) & (place < first + extent[:, None]))
    return (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(images.device)

"""Normalisation and augmentation of whole batches on the device.

Random numbers come from one generator on the CPU: every device draws the same, and a resumed
training goes on with the numbers of an uninterrupted one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgeke.params import Augmentation


class Normalise:
    """Images `[N, C, H, W]` in 0..255 to float32, zero mean and unit deviation per channel.

    From wherever they are to the device.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(self.mean.device) - self.mean) / self.std


class Augment:
    """A profile's augmentation: crop, flip, TrivialAugment and cutout per image, then mixing.

    TrivialAugment (wide; Mueller and Hutter 2021), mixup (Zhang et al. 2018) and CutMix (Yun et
    al. 2019) are torchvision's, which is imported only where one of them is on (5 s). Mixing draws
    one share per batch; with both on, each batch draws one of them.
    """

    def __init__(self, settings: Augmentation, classes: int, fill: Tensor) -> None:
        """`fill` `[1, C, 1, 1]` in 0..255 is the colour of pixels from outside the image."""
        self.settings, self.fill = settings, fill
        self.vary, self.mix = _torchvision(settings, classes, fill)

    def __call__(
        self, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Images uint8 `[N, C, H, W]` and labels `[N]` to images and targets.

        With mixing, images are float32 in 0..255 and targets `[N, K]`; else the targets are labels.
        """
        settings = self.settings
        images = crop_and_flip(images, settings.crop_padding, settings.flip, generator)
        if self.vary:
            with _seeded(generator):
                images = torch.stack([self.vary(image) for image in images])
        if settings.cutout:
            images = cutout(images, settings.cutout, self.fill, generator)
        if self.mix:
            with _seeded(generator):
                images, labels = self.mix(images.float(), labels)
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
    """Fill a square of `side` pixels around a random pixel per image (DeVries and Taylor 2017).

    `fill` `[1, C, 1, 1]`. Squares reach over the edge, so corners are covered as often as centres;
    torchvision's RandomErasing keeps them inside.
    """
    count, _, *sides = images.shape
    inside = []
    for length in sides:
        centre = torch.randint(length, (count, 1), generator=generator)
        offset = torch.arange(length) - centre + side // 2
        inside.append((offset >= 0) & (offset < side))
    square = (inside[0][:, None, :, None] & inside[1][:, None, None, :]).to(images.device)
    return torch.where(square, fill.to(images.dtype), images)


@contextlib.contextmanager
def _seeded(generator: torch.Generator) -> Iterator[None]:
    """Seed torch's global generator, from which torchvision draws, and put it back afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _torchvision(settings: Augmentation, classes: int, fill: Tensor) -> tuple[Any, Any]:
    """TrivialAugment for one image and the mixing of a batch; None for what is off."""
    if not (settings.trivial_augment or settings.mixup or settings.cutmix):
        return None, None
    from torchvision.transforms import v2

    mixers: list[Any] = []
    if settings.mixup:
        mixers.append(v2.MixUp(alpha=settings.mixup, num_classes=classes))
    if settings.cutmix:
        mixers.append(v2.CutMix(alpha=settings.cutmix, num_classes=classes))
    vary = v2.TrivialAugmentWide(fill=fill.flatten().tolist()) if settings.trivial_augment else None
    return vary, v2.RandomChoice(mixers) if mixers else None

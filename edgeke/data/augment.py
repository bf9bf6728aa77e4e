"""Normalisation and augmentation of whole batches that already lie on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Normalise", "augment"]


class Normalise:
    """uint8 `[N, C, H, W]` to float32, zero mean and unit deviation per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1) * 255

    def __call__(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def augment(images: Tensor, padding: int, flip: bool, generator: torch.Generator) -> Tensor:
    """A random crop after zero padding and a random mirror image, drawn per image.

    uint8 `[N, C, H, W]` in and out; `generator` lives on the CPU, so that every device draws the
    same. Zero padding as in He et al. 2016.
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

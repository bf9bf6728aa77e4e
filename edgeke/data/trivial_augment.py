"""TrivialAugment, wide (Mueller and Hutter 2021), for whole batches on the device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["OPERATIONS", "trivial_augment"]

# (images float [n, C, H, W] in 0..255, magnitude [n] in [0, 1], sign [n], fill [1, C, 1, 1])
_Operation = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def trivial_augment(images: Tensor, fill: Tensor, generator: torch.Generator) -> Tensor:
    """One random operation of random strength per image; uint8 `[N, C, H, W]` in and out.

    Drawn on the CPU, so that grouping images by operation never waits for the device. Pixels moved
    in from outside take the colour `fill` `[1, C, 1, 1]`.
    """
    count = len(images)
    choice = torch.randint(len(OPERATIONS), (count,), generator=generator)
    strength = torch.rand(count, generator=generator).to(images.device)
    sign = (torch.randint(2, (count,), generator=generator) * 2 - 1).to(images.device)
    out = images.float()
    for number, operation in enumerate(OPERATIONS.values()):
        chosen = (choice == number).nonzero()[:, 0].to(images.device)
        if len(chosen):
            changed = operation(out[chosen], strength[chosen], sign[chosen], fill)
            out[chosen] = changed.round().clamp(0, 255)
    return out.to(torch.uint8)


def _wide(images: Tensor) -> Tensor:
    return images[:, None, None, None]


def _affine(
    images: Tensor, fill: Tensor, rows: tuple[tuple[Tensor, Tensor, Tensor], ...]
) -> Tensor:
    """Sample through an inverse affine map given in units of half the side, nearest pixel."""
    theta = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=1)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - fill, grid, mode="nearest", align_corners=False)
    return moved + fill


def _shear_x(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(images, fill, ((one, sign * strength * 0.99, zero), (zero, one, zero)))


def _shear_y(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    return _affine(images, fill, ((one, zero, zero), (sign * strength * 0.99, one, zero)))


def _translate_x(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    moved = sign * strength * 2 * min(32 / images.shape[-1], 1)
    return _affine(images, fill, ((one, zero, moved), (zero, one, zero)))


def _translate_y(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    one, zero = torch.ones_like(strength), torch.zeros_like(strength)
    moved = sign * strength * 2 * min(32 / images.shape[-2], 1)
    return _affine(images, fill, ((one, zero, zero), (zero, one, moved)))


def _rotate(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    angle, zero = sign * strength * math.radians(135), torch.zeros_like(strength)
    sine, cosine = angle.sin(), angle.cos()
    return _affine(images, fill, ((cosine, -sine, zero), (sine, cosine, zero)))


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] == 1:
        return images
    weights = torch.tensor([0.299, 0.587, 0.114], device=images.device).view(1, 3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def _blend(images: Tensor, other: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    return other + (images - other) * _wide(1 + sign * strength * 0.99)


def _brightness(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    return _blend(images, torch.zeros_like(images), strength, sign)


def _colour(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    return _blend(images, _grey(images), strength, sign)


def _contrast(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), strength, sign)


def _sharpness(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    channels = images.shape[1]
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    kernel = (kernel / kernel.sum()).expand(channels, 1, 3, 3)
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel, groups=channels)
    return _blend(images, smooth, strength, sign)


def _posterize(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    step = 2 ** (strength * 6).round()  # 8 bits down to 2
    return (images / _wide(step)).floor() * _wide(step)


def _solarize(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    return torch.where(images >= _wide(255 * (1 - strength)), 255 - images, images)


def _autocontrast(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    stretched = (images - low) * 255 / (high - low).clamp(min=1)
    return torch.where(high > low, stretched, images)


def _equalize(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    flat = images.round().clamp(0, 255).long().flatten(2)
    counts = torch.zeros(*flat.shape[:2], 256, device=images.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat, dtype=counts.dtype))
    below = counts.cumsum(dim=2) - counts
    # Whole steps, as Pillow computes them; an image of few pixels stays as it is.
    step = ((flat.shape[2] - counts.gather(2, flat.amax(dim=2, keepdim=True))) / 255).floor()
    levels = ((below + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255)
    equal = levels.gather(2, flat).view_as(images)
    return torch.where((step > 0)[..., None], equal, images)


def _identity(images: Tensor, strength: Tensor, sign: Tensor, fill: Tensor) -> Tensor:
    return images


OPERATIONS: dict[str, _Operation] = {
    "identity": _identity,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "colour": _colour,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}

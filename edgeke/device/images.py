"""Whether pixels fit a model, with words on what to do when they do not."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError

__all__ = ["check_image", "check_images"]

_Shape = tuple[int, int, int]


def check_image(image: Any, shape: _Shape, name: str = "the image") -> NDArray[np.uint8]:
    """One image as uint8 `[H, W, C]`; `[H, W]` is taken where C is 1.

    Anything NumPy reads as an array will do. `name` is what errors call it.
    Errors: InputError for another size, type or number of channels.
    """
    try:
        pixels = np.asarray(image)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} cannot be read as an array ({error})") from error
    if pixels.dtype != np.uint8:
        raise InputError(_wrong_type(pixels, name))
    if shape[2] == 1 and pixels.shape == shape[:2]:
        pixels = pixels[..., None]
    if pixels.shape != shape:
        raise InputError(_wrong_shape(pixels.shape, shape, name))
    return np.ascontiguousarray(pixels)


def check_images(images: Any, shape: _Shape) -> NDArray[np.uint8]:
    """Images as uint8 `[N, H, W, C]`, from an array or a sequence of images.

    `[N, H, W]` is taken where C is 1. Errors: InputError naming the first image that does not fit.
    """
    if not isinstance(images, np.ndarray | Sequence):
        raise InputError(
            f"images are of type {type(images).__name__}; give an array [N, H, W, C] or a list of "
            "images"
        )
    if isinstance(images, np.ndarray) and images.shape in (shape, shape[:2]):
        raise InputError(
            f"images have the shape {_text(images.shape)} of a single image; use predict, or "
            "images[None] for a batch of one"
        )
    if isinstance(images, np.ndarray) and images.shape[1:] == shape and images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    checked = [check_image(image, shape, f"image {n}") for n, image in enumerate(images)]
    return np.stack(checked) if checked else np.empty((0, *shape), np.uint8)


def _wrong_type(pixels: NDArray[Any], name: str) -> str:
    if not np.issubdtype(pixels.dtype, np.number):
        return f"{name} is of type {pixels.dtype}, not uint8; give pixels from 0 to 255"
    if np.issubdtype(pixels.dtype, np.floating):
        convert = (
            "give the camera's own pixels, or convert: numpy.rint(255 * image).astype(numpy.uint8) "
            "when values lie in 0 to 1, without the 255 when they lie in 0 to 255; undo any "
            "normalisation first, the model does its own"
        )
        bad = int((~np.isfinite(pixels)).sum())
        lost = (
            f" and holds {bad} values that are NaN or infinite: mend its source first"
            if bad
            else ""
        )
        return f"{name} is {pixels.dtype}, not uint8{lost}; {convert}"
    return (
        f"{name} is {pixels.dtype}, not uint8; convert: (image >> 8).astype(numpy.uint8) for 16 "
        "bits per pixel, image.astype(numpy.uint8) when values lie in 0 to 255"
    )


def _wrong_shape(found: tuple[int, ...], shape: _Shape, name: str) -> str:
    height, width, channels = shape
    start = (
        f"{name} has shape {_text(found)}, the model takes {_text(shape)} (height, width, channels)"
    )
    if len(found) == 4:
        return f"{start}; predict takes one image: use predict_batch for several"
    if found == (channels, height, width):
        return f"{start}; put the channels last: image.transpose(1, 2, 0)"
    if found[:2] != (height, width) or len(found) not in (2, 3):
        return (
            f"{start}; resize it, for instance with Pillow: "
            f"PIL.ImageOps.fit(picture, ({width}, {height}))"
        )
    if len(found) == 2 or found[2] == 1:
        grey = "image[..., None]" if len(found) == 2 else "image"
        return f"{start}; repeat the grey channel: numpy.repeat({grey}, {channels}, axis=-1)"
    if found[2] == 4 and channels == 3:
        return f"{start}; drop the alpha channel: image[..., :3]"
    if channels == 1:
        return f"{start}; convert it to grey, for instance with Pillow: picture.convert('L')"
    return f"{start}; convert it to {channels} channels"


def _text(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"

"""Pixels that a model takes, from arrays and Pillow pictures; what does not fit is explained."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError

_Shape = tuple[int, int, int]


# Of an array's colours. Models take red first.
ORDERS = ("rgb", "bgr")


def check_image(
    image: Any, shape: _Shape, name: str = "the image", order: str = "rgb"
) -> NDArray[np.uint8]:
    """One image as uint8 `[H, W, C]`, red first; `[H, W]` is accepted where C is 1.

    Anything that NumPy reads as an array, of the given order, or a Pillow picture of any mode (see
    `plain_picture`). `name` is what errors call it. Errors: InputError for another size, type or
    number of channels.
    """
    try:
        if hasattr(image, "getbands"):  # a Pillow picture; Pillow itself need not be installed
            order = "rgb"
            image = plain_picture(image, shape[2])
        pixels = np.asarray(image)
    except (ValueError, TypeError) as error:
        raise InputError(f"{name} cannot be read as an array ({error})") from error
    if pixels.dtype != np.uint8:
        raise InputError(f"{name} is {pixels.dtype}, not uint8; {_to_uint8(pixels)}")
    if shape[2] == 1 and pixels.shape == shape[:2]:
        pixels = pixels[..., None]
    if pixels.shape != shape:
        raise InputError(
            f"{name} has shape {list(pixels.shape)}, the model takes {list(shape)} (height, width, "
            f"channels); {_to_shape(pixels.shape, shape)}"
        )
    if order == "bgr" and shape[2] == 3:
        pixels = pixels[..., ::-1]
    return np.ascontiguousarray(pixels)


def check_images(images: Any, shape: _Shape, order: str = "rgb") -> NDArray[np.uint8]:
    """Images as uint8 `[N, H, W, C]`, from an array or a sequence of images.

    `[N, H, W]` is accepted where C is 1. An array that fits is not copied, so it may be a memory
    map, and is not contiguous where it was not. Errors: InputError naming the first image that is
    wrong.
    """
    if not isinstance(images, np.ndarray | Sequence) or getattr(images, "ndim", 1) == 0:
        raise InputError(
            f"images are of type {type(images).__name__}; give an array [N, H, W, C] or a list of "
            "images"
        )
    if isinstance(images, np.ndarray):
        if images.shape in (shape, shape[:2]):
            raise InputError(
                f"images have the shape {list(images.shape)} of a single image; use predict, or "
                "images[None] for a batch of one"
            )
        if images.shape[1:] == shape and images.dtype == np.uint8:
            return images[..., ::-1] if order == "bgr" and shape[2] == 3 else images
    checked = [check_image(image, shape, f"image {n}", order) for n, image in enumerate(images)]
    return np.stack(checked) if checked else np.empty((0, *shape), np.uint8)


def plain_picture(picture: Any, channels: int) -> Any:
    """A Pillow picture of any mode as mode L (1 channel) or RGB (3), transparency over white.

    Pictures of 16 and 32 bits per pixel are actual as modes I;16, I and F. Errors: ValueError for a
    mode that Pillow cannot convert.
    """
    from PIL import Image

    if picture.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(picture).astype(np.uint16))
    if picture.mode in ("I", "F"):
        return picture
    if picture.mode == "La":
        picture = picture.convert("LA")
    palette = picture.mode == "P" and picture.palette.mode == "RGBA"  # as quantize() gives
    if palette or picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    if picture.mode not in ("L", "1"):
        picture = picture.convert("RGB")
    return picture.convert("L" if channels == 1 else "RGB")


def _to_uint8(pixels: NDArray[Any]) -> str:
    if np.issubdtype(pixels.dtype, np.integer):
        return (
            "convert: (image >> 8).astype(numpy.uint8) for 16 bits per pixel, "
            "image.astype(numpy.uint8) where values are 0 to 255"
        )
    if not np.issubdtype(pixels.dtype, np.floating):
        return "give pixels from 0 to 255"
    if not np.isfinite(pixels).all():
        return "it holds values that are NaN or infinite; fix their source"
    return (
        "give the camera's own pixels, or convert: numpy.rint(255 * image).astype(numpy.uint8) "
        "where values are 0 to 1, without the 255 where they are 0 to 255; undo any "
        "normalisation first, the model has its own"
    )


def _to_shape(actual: Sequence[int], shape: _Shape) -> str:
    height, width, channels = shape
    if len(actual) == 4:
        return "predict takes one image: use predict_batch for several"
    if actual == (channels, height, width):
        return "put the channels last: image.transpose(1, 2, 0)"
    if actual[:2] == (width, height) != (height, width):
        return (
            "its sides are swapped: height comes first; sizes in OpenCV and Pillow are width first"
        )
    if actual[:2] != (height, width):
        return (
            "give files to edgeke.device.decode.read_image with the classifier's image_shape, bits "
            "and fit, which reads them as training did, or resize as `info` says (pictures)"
        )
    if channels == 3 and actual[2:] in ((), (1,)):
        return "repeat the grey channel: numpy.repeat(image.reshape(*image.shape[:2], 1), 3, -1)"
    if channels == 3 and actual[2:] == (4,):
        return (
            "drop the fourth channel: image[..., :3]; the first must be red, or give "
            'Classifier(..., order="bgr") for BGRA and BGRX frames (RGB is the default)'
        )
    return f"convert it to {channels} channels, for instance with Pillow"

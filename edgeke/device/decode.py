"""Image files to the pixels a model takes. Pillow is needed for anything but .npy."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeke.device.images import check_image
from edgeke.errors import InputError

__all__ = ["read_image"]


def read_image(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """One image as uint8 `[H, W, C]`.

    A picture is turned upright, scaled and cropped at the centre (bicubic, as the pipeline reads
    folders of images) and converted to grey or RGB; a `.npy` file must have the model's shape.
    Errors: InputError, naming the file, when it cannot be read, does not fit, or needs Pillow.
    """
    if path.suffix.lower() == ".npy":
        try:
            pixels = np.load(path)
        except FileNotFoundError:
            raise InputError(f"{path} is missing") from None
        except (OSError, ValueError, EOFError) as error:
            raise InputError(
                f"{path} cannot be read as an array ({error}); save it again"
            ) from error
        return check_image(pixels, shape, str(path))
    return _read_picture(path, shape)


def _read_picture(path: Path, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise InputError(
            f"{path} needs Pillow to be read: pip install pillow, or save the pixels with "
            "numpy.save and give the .npy file"
        ) from None
    height, width, channels = shape
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            if picture.mode.startswith("I;16"):  # Pillow itself would clip at 255
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            elif picture.mode in ("I", "F"):
                raise InputError(f"{path} has 32 bits per pixel; convert it to 8 or 16 bits")
            if picture.size != (width, height):
                picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"), np.uint8)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read as an image ({error}); replace it") from error
    return check_image(pixels, shape, str(path))

"""Image files to pixels, for training and for the device alike. Only .npy needs no Pillow."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from edgeke.device.images import check_image, plain_picture
from edgeke.errors import InputError

# Significant bits of 16-bit pictures where nothing else is said.
BITS = 16

_ORIENTATION = 0x0112  # the EXIF tag; its values as names of Pillow's Image.Transpose
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip


def read_image(path: Path, shape: tuple[int, int, int], bits: int = BITS) -> NDArray[np.uint8]:
    """One image file as uint8 `[H, W, C]`.

    A picture is read as the pipeline reads folders of images (see `open_picture`, `fit_picture`);
    a `.npy` file must have the model's shape. Errors: InputError, naming the file, when it cannot
    be read, does not fit, or needs Pillow.
    """
    if path.suffix.lower() != ".npy":
        return fit_picture(open_picture(path, shape[2]), shape, bits, str(path))
    with _naming(path, "array"):
        # Mapped: a damaged header may claim more than there is memory for.
        return check_image(open_memmap(path, mode="r"), shape, str(path)).copy()


def open_picture(path: Path, channels: int) -> Any:
    """A picture file, upright, as a Pillow picture of mode L, RGB, I;16 or (32 bits) I or F.

    The first frame where there are several; transparency is laid over white. Errors: InputError
    naming the file, when it cannot be read or Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise InputError(
            f"{path} needs Pillow to be read: pip install pillow, or save the pixels with "
            "numpy.save and give the .npy file"
        ) from None
    with _naming(path, "image"), Image.open(path) as opened:
        opened.load()
        picture: Any = opened
        turn = None
        with contextlib.suppress(Exception):  # damaged EXIF: the picture as it is stored
            turn = _TURNS.get(picture.getexif().get(_ORIENTATION))
        if picture.mode == "I" and picture.format == "PNG":  # how Pillow before 10 gives 16 bits
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16))
        plain = plain_picture(picture, channels)
        return plain.transpose(Image.Transpose[turn]) if turn else plain


def fit_picture(
    picture: Any, shape: tuple[int, int, int], bits: int, name: str
) -> NDArray[np.uint8]:
    """A picture of `open_picture` as uint8 `[H, W, C]`: 16 bits to 8, scaled, cropped.

    Of a 16-bit picture the upper 8 of its `bits` significant bits are kept. It is scaled (bicubic,
    averaging where it shrinks) to cover H x W, and cropped at the centre. Errors: InputError for
    32 bits per pixel, or values that need more than `bits` bits.
    """
    from PIL import Image, ImageOps

    height, width, channels = shape
    if picture.mode in ("I", "F"):
        raise InputError(f"{name} has 32 bits per pixel; convert it to 8 or 16 bits")
    if picture.mode == "I;16":
        values = np.asarray(picture)
        if values.max() >> bits:
            raise InputError(
                f"{name} has values up to {values.max()}, which need more than the {bits} bits of "
                "data.bits; use the number of bits that the camera gives"
            )
        picture = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return check_image(picture, shape, name)


@contextlib.contextmanager
def _naming(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a damaged file raises into an InputError that names it.

    Pillow's and NumPy's readers raise many types: struct.error, AttributeError, RuntimeError ...
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except FileNotFoundError:
        raise InputError(f"{path} is missing") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read as an {kind} ({reason}); replace it") from error

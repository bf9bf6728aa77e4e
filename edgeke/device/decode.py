"""Image files to pixels, for training and for the device alike. Only .npy needs no Pillow."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from edgeke.device.images import check_image, plain_picture
from edgeke.errors import InputError

# Significant bits of 16-bit pictures, and what is done to pictures of another size, where nothing
# else is said.
BITS = 16
FIT = "crop"
FITS = ("crop", "pad", "stretch", "exact")
# A larger picture is refused: a small file may claim a size that memory cannot hold.
MEGAPIXELS = 200

_ORIENTATION = 0x0112  # the EXIF tag; its values as names of Pillow's Image.Transpose
_TURNS = {
    2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
    6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90",
}  # fmt: skip
_SIDEWAYS = (5, 6, 7, 8)
# JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, but at this multiple of what is needed: the
# bicubic filter averages the rest.
_SPARE = 2
_OPENING = threading.Lock()


def read_image(
    path: Path,
    shape: tuple[int, int, int],
    bits: int = BITS,
    fit: str = FIT,
    megapixels: float = MEGAPIXELS,
) -> NDArray[np.uint8]:
    """One image file as uint8 `[H, W, C]`.

    A picture is read as the pipeline reads folders of images (see `open_picture`, `fit_picture`);
    a `.npy` file must have the model's shape. Errors: InputError, naming the file, when it cannot
    be read, does not fit, is larger than `megapixels`, or needs Pillow.
    """
    if path.suffix.lower() != ".npy":
        picture = open_picture(path, shape, fit, megapixels)
        return fit_picture(picture, shape, bits, str(path), fit)
    with _naming(path, "array"):
        # Mapped: a damaged header may claim more than there is memory for.
        return check_image(open_memmap(path, mode="r"), shape, str(path)).copy()


def open_picture(
    path: Path, shape: tuple[int, int, int], fit: str = FIT, megapixels: float = MEGAPIXELS
) -> Any:
    """A picture file, upright, as a Pillow picture of mode L, RGB, I;16 or (32 bits) I or F.

    The first frame where there are several; transparency is laid over white. A JPEG that is much
    larger than `shape` `(H, W, C)` is decoded at a fraction of its size; `info["size"]` is the
    whole (width, height). Errors: InputError naming the file, when it cannot be read, is too
    large, or Pillow is missing.
    """
    try:
        from PIL import Image
    except ImportError:
        raise InputError(
            f"{path} needs Pillow to be read: pip install pillow, or save the pixels with "
            "numpy.save and give the .npy file"
        ) from None
    if not hasattr(Image, "Resampling"):
        raise InputError(f"{path} needs Pillow 9.1 or newer: pip install --upgrade pillow")
    with _naming(path, "image"), _opened(path) as opened:
        width, height = opened.size
        if width * height > megapixels * 1e6:
            raise InputError(
                f"{path} has {width * height / 1e6:.0f} megapixels ({width}x{height}), more than "
                f"the {megapixels:g} of data.max_megapixels; raise it where there is memory for "
                "4 bytes per pixel, or make the picture smaller"
            )
        if opened.format in ("JPEG", "MPO") and fit != "exact":
            sideways = _turn(opened) in _SIDEWAYS
            whole = (height, width) if sideways else (width, height)
            needed = [_SPARE * side for side in _scaled(whole, shape, fit)]
            opened.draft(None, tuple(needed[::-1] if sideways else needed))
        opened.load()
        turn = _turn(opened)
        picture: Any = opened
        if picture.mode == "I" and picture.format == "PNG":  # how Pillow before 10 gives 16 bits
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16))
        plain = plain_picture(picture, shape[2])
        if turn in _TURNS:
            plain = plain.transpose(Image.Transpose[_TURNS[turn]])
        plain.info = {"size": (height, width) if turn in _SIDEWAYS else (width, height)}
        return plain


def fit_picture(
    picture: Any, shape: tuple[int, int, int], bits: int, name: str, fit: str = FIT
) -> NDArray[np.uint8]:
    """A picture of `open_picture` as uint8 `[H, W, C]`: 16 bits to 8, scaled to H x W.

    Of a 16-bit picture the upper 8 of its `bits` significant bits are kept. It is scaled (bicubic,
    averaging where it shrinks). With `crop` it covers H x W, and what is beyond the centre is
    cut off; with `pad` it lies inside, in the middle of black; with `stretch` its sides
    are scaled each by its own factor; with `exact` another size is refused. Errors: InputError for
    32 bits per pixel, values that need more than `bits` bits, or another size.
    """
    from PIL import Image

    height, width, channels = shape
    if picture.mode in ("I", "F"):
        raise InputError(f"{name} has 32 bits per pixel; convert it to 8 or 16 bits")
    if fit == "exact" and picture.size != (width, height):
        raise InputError(
            f"{name} is {picture.size[0]}x{picture.size[1]}, not {width}x{height}; resize it, or "
            "train with `fit: crop`, `pad` or `stretch` in the profile's data section, which "
            "scale every image"
        )
    if picture.mode == "I;16":
        values = np.asarray(picture)
        if values.max() >> bits:
            raise InputError(
                f"{name} has values up to {values.max()}, which need more than the {bits} bits of "
                "data.bits; use the number of bits that the camera gives"
            )
        picture = Image.fromarray((values >> (bits - 8)).astype(np.uint8))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if picture.size == (width, height):
        pass
    elif fit == "stretch":
        picture = _resized(picture, (width, height))
    elif fit == "pad":
        inside = _resized(picture, _scaled(picture.size, shape, fit))
        picture = Image.new(picture.mode, (width, height))
        picture.paste(inside, ((width - inside.width) // 2, (height - inside.height) // 2))
    else:
        wide = min(picture.width, picture.height * width / height)
        high = min(picture.height, picture.width * height / width)
        picture = _resized(picture, (width, height), (wide, high))
    return check_image(picture, shape, name)


def _scaled(size: tuple[int, int], shape: tuple[int, int, int], fit: str) -> tuple[int, int]:
    """Width and height of the whole picture after scaling, at least; at most H x W with `pad`."""
    height, width, _ = shape
    if fit != "pad":
        return width, height
    factor = min(width / size[0], height / size[1])
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def _turn(opened: Any) -> Any:
    """The EXIF orientation; None where there is none, or EXIF is damaged."""
    with contextlib.suppress(Exception):
        return opened.getexif().get(_ORIENTATION)
    return None


def _resized(picture: Any, size: tuple[int, int], middle: tuple[float, float] | None = None) -> Any:
    """The picture, or its middle of this width and height, scaled to `size` (width, height).

    Rows first, then columns: which Pillow does first depends on its version, and rounding on that.
    """
    from PIL import Image

    wide, high = middle or picture.size
    left, top = (picture.width - wide) / 2, (picture.height - high) / 2
    bicubic = Image.Resampling.BICUBIC
    rows = (left, 0, left + wide, picture.height)
    picture = picture.resize((size[0], picture.height), bicubic, rows)
    return picture.resize(size, bicubic, (0, top, size[0], top + high))


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A picture file whose header was read, whatever size it claims: the caller has a limit."""
    from PIL import Image

    with _OPENING:  # Pillow's own limit is one for the whole process
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            opened = Image.open(path)
        finally:
            Image.MAX_IMAGE_PIXELS = limit
    with opened:
        yield opened


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
    except PermissionError:
        raise InputError(
            f"{path} may not be read by this user (permission denied); change its owner or mode"
        ) from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder; give the {kind}'s file") from None
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise InputError(f"{path} cannot be read as an {kind} ({reason}); replace it") from error

"""A camera's frames to a model's pixels, with numpy alone: colours from YUV, and the size.

Pictures in files are read by `edgeke.device.decode`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError

_Pixels = NDArray[np.uint8]

# From Y, U and V of ITU-R BT.601 with Y from 16 to 235, as most cameras give it, to R, G and B.
_Y, _V_TO_R, _U_TO_G, _V_TO_G, _U_TO_B = 255 / 219, 1.596027, -0.391762, -0.812968, 2.017232


def fit_frame(frame: Any, shape: tuple[int, int, int], fit: str = "crop") -> _Pixels:
    """A frame uint8 `[h, w, C]` or `[h, w]`, scaled to a model's H x W as pictures in files are.

    With `crop` it covers H x W and is cropped at the centre; with `pad` it lies inside, in the
    middle of black; with `stretch` each side has its own factor; with `exact` another size is
    refused. The weights are those of Pillow's BICUBIC: of a wide frame less than 1 % of the values
    differ from Pillow's, by 1 or 2. Of an upright one up to a quarter differ by 1 and few by more,
    where Pillow (from 13 on) begins with the other direction. The order of channels stays.
    Errors: InputError for another type, shape or `fit`.
    """
    values = np.asarray(frame)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or not values.size:
        raise InputError(
            f"a frame is {values.dtype} of shape {list(values.shape)}; give uint8 [h, w, C] or "
            "[h, w]"
        )
    height, width, _ = shape
    rows, columns = values.shape[:2]
    if (rows, columns) == (height, width):
        return values
    if fit == "crop":
        scale = min(rows / height, columns / width)
        return _scaled(values, (height * scale, width * scale), (height, width))
    if fit == "stretch":
        return _scaled(values, (rows, columns), (height, width))
    if fit == "pad":
        factor = min(width / columns, height / rows)
        inside = max(1, round(rows * factor)), max(1, round(columns * factor))
        top, left = (height - inside[0]) // 2, (width - inside[1]) // 2
        padded = np.zeros((height, width, *values.shape[2:]), np.uint8)
        part = padded[top : top + inside[0], left : left + inside[1]]
        part[...] = _scaled(values, (rows, columns), inside)
        return padded
    if fit == "exact":
        raise InputError(f"a frame is {columns} x {rows}, and the model takes {width} x {height}")
    raise InputError(f"fit = {fit!r:.40} must be crop, pad, stretch or exact")


def nv12_to_rgb(frame: Any, height: int, width: int) -> _Pixels:
    """A frame in NV12 as RGB `[height, width, 3]`: Y of all pixels, then U and V of 2 x 2 each.

    `frame`: its bytes, or uint8 of any shape. Errors: InputError for another number of bytes, or
    an odd size.
    """
    values = _bytes(frame, height, width, 3 * height * width // 2, "NV12")
    luma, chroma = np.split(values, [height * width])
    chroma = chroma.reshape(height // 2, width // 2, 2).repeat(2, 0).repeat(2, 1)
    return _to_rgb(luma.reshape(height, width), chroma)


def yuyv_to_rgb(frame: Any, height: int, width: int) -> _Pixels:
    """A frame in YUYV (YUY2) as RGB `[height, width, 3]`: Y, U, Y and V of two pixels each.

    `frame`: its bytes, or uint8 of any shape. Errors: as `nv12_to_rgb`.
    """
    pairs = _bytes(frame, height, width, 2 * height * width, "YUYV").reshape(-1, 4)
    chroma = pairs[:, 1::2].reshape(height, width // 2, 2).repeat(2, 1)
    return _to_rgb(pairs[:, ::2].reshape(height, width), chroma)


def _bytes(frame: Any, height: int, width: int, count: int, kind: str) -> _Pixels:
    """Errors: InputError when they are not as many as a frame has."""
    is_bytes = isinstance(frame, bytes | bytearray | memoryview)
    values = np.frombuffer(frame, np.uint8) if is_bytes else np.asarray(frame).reshape(-1)
    if values.dtype != np.uint8 or len(values) != count or height % 2 or width % 2:
        raise InputError(
            f"{len(values)} values of type {values.dtype} are no {kind} frame of {width} x {height}"
            f", which has {count} bytes and even sides; where lines are padded, give only what is "
            "in the picture"
        )
    return values


def _to_rgb(luma: _Pixels, chroma: _Pixels) -> _Pixels:
    """`[h, w]` and `[h, w, 2]` to RGB `[h, w, 3]`."""
    y = np.float32(_Y) * (luma.astype(np.float32) - 16)
    u, v = np.moveaxis(chroma.astype(np.float32) - 128, -1, 0)
    rgb = np.stack([y + _V_TO_R * v, y + _U_TO_G * u + _V_TO_G * v, y + _U_TO_B * u], -1)
    pixels: _Pixels = np.rint(rgb).clip(0, 255).astype(np.uint8)
    return pixels


def _scaled(
    values: _Pixels, part: tuple[float, float], target: tuple[int, int]
) -> NDArray[np.uint8]:
    """The middle `part` (rows, columns) of an image, scaled to `target` (rows, columns)."""
    down, across = (_weights(*each) for each in zip(values.shape, part, target, strict=False))
    wide = np.tensordot(across, values.astype(np.float32), (1, 1))  # [columns, h, C]
    wide = np.rint(wide).clip(0, 255)  # as Pillow rounds after each direction
    pixels: _Pixels = np.rint(np.tensordot(down, wide, (1, 1))).clip(0, 255).astype(np.uint8)
    return pixels


def _weights(size: int, part: float, target: int) -> NDArray[np.float32]:
    """How much each of `size` pixels of a line counts for each of `target`, `[target, size]`.

    Keys' bicubic (a = -0.5), widened where it shrinks, over the middle `part` of the line.
    """
    scale = part / target
    centres = (size - part) / 2 + (np.arange(target) + 0.5) * scale
    x = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    values = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights: NDArray[np.float32] = (values / values.sum(1, keepdims=True)).astype(np.float32)
    return weights

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


def fit_frame(frame: Any, shape: tuple[int, int, int]) -> _Pixels:
    """A frame uint8 `[h, w, C]` or `[h, w]` scaled to cover a model's H x W, cropped at the centre.

    The same weights as Pillow's `ImageOps.fit` with BICUBIC, by which the pipeline reads pictures:
    of a wide frame less than 1 % of the values differ, by 1 or 2. Of an upright one up to a quarter
    differ by 1 and few by more, where Pillow (from 13 on) begins with the other direction. The
    order of channels stays.
    Errors: InputError for another type or shape.
    """
    values = np.asarray(frame)
    if values.dtype != np.uint8 or values.ndim not in (2, 3) or not values.size:
        raise InputError(
            f"a frame is {values.dtype} of shape {list(values.shape)}; give uint8 [h, w, C] or "
            "[h, w]"
        )
    height, width, _ = shape
    rows, columns = values.shape[:2]
    scale = min(rows / height, columns / width)
    across = _weights(columns, scale, width)
    scaled = np.tensordot(across, values.astype(np.float32), (1, 1))  # [W, h, C]
    scaled = np.rint(scaled).clip(0, 255)  # as Pillow rounds after each direction
    scaled = np.tensordot(_weights(rows, scale, height), scaled, (1, 1))
    pixels: _Pixels = np.rint(scaled).clip(0, 255).astype(np.uint8)
    return pixels


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


def _weights(size: int, scale: float, target: int) -> NDArray[np.float32]:
    """How much each pixel of a line counts for each of `target`, `[target, size]`.

    Keys' bicubic (a = -0.5), widened where it shrinks, over the middle `target * scale` pixels.
    """
    first = (size - target * scale) / 2
    centres = first + (np.arange(target) + 0.5) * scale
    x = np.abs(np.arange(size) + 0.5 - centres[:, None]) / max(scale, 1)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    values = np.where(x < 1, near, np.where(x < 2, far, 0))
    weights: NDArray[np.float32] = (values / values.sum(1, keepdims=True)).astype(np.float32)
    return weights

"""Features and pictures as bytes for a slow link, and back: numpy and zlib only.

A codec has a name: `f32` and `f16` send floats, `q8`, `q6`, `q4` and `q2` whole numbers of so many
bits, with a range for each group of channels. With `_r50` behind it only half of the positions
travel, those with the largest energy over the channels, a bitmap of them, and the mean of the rest.
`raw` is no codec of features: the picture travels, as PNG.
"""

import math
import re
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError

RAW = "raw"

Floats = NDArray[np.float32]
_Bytes = NDArray[np.uint8]
_Shape = tuple[int, int, int]

_NAME = re.compile(r"(f32|f16|q8|q6|q4|q2)(?:_r([1-9]\d?))?")
_MAGIC = b"EKF1"
# Magic, bits, whether zlib was used, group size in channels, kept positions, N, C, H, W, bytes of
# the payload before zlib.
_HEADER = struct.Struct("<4sBBHIHHHHI")
_GROUP = 8  # channels that share a range at most
_LEVEL = 1  # of zlib: higher ones take more time than they save
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Codec:
    """How features travel: `bits` of a value (32 and 16: floats), `share` of the positions."""

    bits: int
    share: float = 1.0

    @property
    def name(self) -> str:
        """Such as `q4` or `q4_r50`."""
        kind = f"{'f' if self.bits > 8 else 'q'}{self.bits}"
        return kind if self.share == 1 else f"{kind}_r{round(100 * self.share)}"


def parse_codec(name: str) -> Codec:
    """The codec of that name. Errors: InputError for another one."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise InputError(
            f"{name!r:.40} is no codec; use f32, f16, q8, q6, q4 or q2, with _r50 behind it where "
            "half of the positions are to travel"
        )
    return Codec(int(match[1][1:]), int(match[2]) / 100 if match[2] else 1.0)


def encode(features: Floats, codec: Codec, pack: bool = False) -> bytes:
    """Features `[N, C, H, W]` as a message; with `pack` through zlib, too.

    Errors: InputError for features that are not finite, or too many for one message.
    """
    count, channels, height, width = features.shape
    positions = height * width
    kept = kept_positions(positions, codec.share)
    if max(features.shape) > 65_535 or 4 * features.size + positions * count >= 2**32:
        raise InputError(f"features of shape {list(features.shape)} are too many for one message")
    values = np.ascontiguousarray(features, np.float32).reshape(count, channels, positions)
    parts: list[Any] = []
    if kept < positions:
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
            bitmaps, values = _select(values, kept)
        parts.append(bitmaps)
    group = channel_group(channels)
    if codec.bits > 8:
        if not np.isfinite(values).all():
            raise InputError("the features are not finite; the model is broken or its input is")
        limit = float(np.finfo(np.float16).max)
        parts.append(values if codec.bits == 32 else values.clip(-limit, limit).astype("<f2"))
    else:
        ranges, levels = _quantise(values, group, codec.bits)
        parts += [ranges, _pack(levels, codec.bits)]
    payload = b"".join(part.tobytes() for part in parts)
    length = len(payload)
    if pack:
        payload = zlib.compress(payload, _LEVEL)
    header = _HEADER.pack(
        _MAGIC, codec.bits, pack, group, kept, count, channels, height, width, length
    )
    return header + payload


def decode(message: bytes | memoryview, shape: _Shape, most: int) -> Floats:
    """The features of a message: at most `most` images of the shape `(C, H, W)`.

    Errors: InputError for anything else, before memory is taken for it.
    """
    message = memoryview(message)
    if len(message) < _HEADER.size:
        raise InputError(f"{len(message)} bytes are no features; the header has {_HEADER.size}")
    magic, bits, packed, group, kept, count, *sides, length = _HEADER.unpack_from(message)
    if magic != _MAGIC:
        raise InputError("these are no features of this version of EdgeKE")
    if tuple(sides) != tuple(shape) or not 1 <= count <= most:
        raise InputError(
            f"features [{count}, {', '.join(map(str, sides))}] are not those of this model, "
            f"[1 to {most}, {', '.join(map(str, shape))}]"
        )
    channels, height, width = shape
    positions = height * width
    columns = kept + (kept < positions)
    sound = bits in (32, 16, 8, 6, 4, 2) and packed in (0, 1) and 1 <= kept <= positions
    if not sound or group != channel_group(channels):
        raise InputError("the header of the features contradicts itself")
    bitmap = -(-positions // 8) if kept < positions else 0
    ranges = 0 if bits > 8 else 8 * channels // group
    size = count * channels * columns
    if length != count * (bitmap + ranges) + _packed_size(size, bits):
        raise InputError("the length of the features does not fit their shape")
    content = _unzip(message[_HEADER.size :], length) if packed else message[_HEADER.size :]
    if len(content) != length:
        raise InputError(f"the features have {len(content)} bytes instead of {length}")
    taken = count * bitmap
    if bits > 8:
        kind = "<f4" if bits == 32 else "<f2"
        values = np.frombuffer(content, kind, size, taken).astype(np.float32)
        if not np.isfinite(values).all():
            raise InputError("the features are not finite")
    else:
        limits = np.frombuffer(content, "<f4", count * ranges // 4, taken).reshape(-1, 2, 1)
        levels = np.frombuffer(content, np.uint8, offset=taken + count * ranges)
        values = _restore(_unpack(levels, bits, size).reshape(len(limits), -1), limits, bits)
    values = values.reshape(count, channels, columns)
    if kept < positions:
        marks = np.frombuffer(content, np.uint8, taken).reshape(count, bitmap)
        values = _spread(values, marks, positions, kept)
    return values.reshape(count, *shape)


def channel_group(channels: int) -> int:
    """How many channels share a range."""
    return math.gcd(channels, _GROUP)


def kept_positions(positions: int, share: float) -> int:
    """How many of the positions travel under a share."""
    return positions if share >= 1 else max(1, min(positions - 1, round(share * positions)))


def _select(values: Floats, kept: int) -> tuple[_Bytes, Floats]:
    """Bitmaps, and the kept columns of `[N, C, P]` with the mean of the others after them."""
    positions = values.shape[2]
    energy = np.einsum("ncp,ncp->np", values, values)
    first = np.argpartition(energy, positions - kept, axis=1)
    order = np.sort(first[:, positions - kept :], axis=1)
    marks = np.zeros(energy.shape, bool)
    np.put_along_axis(marks, order, True, axis=1)
    columns = np.take_along_axis(values, order[:, None], axis=2)
    rest = (values.sum(axis=2) - columns.sum(axis=2)) / np.float32(positions - kept)
    return np.packbits(marks, axis=1), np.concatenate([columns, rest[..., None]], axis=2)


def _spread(values: Floats, bitmaps: _Bytes, positions: int, kept: int) -> Floats:
    marks = np.unpackbits(bitmaps, axis=1)
    if (marks.sum(axis=1) != kept).any() or marks[:, positions:].any():
        raise InputError("a bitmap does not have as many positions as its header says")
    order = np.nonzero(marks)[1].reshape(len(marks), 1, kept)
    count, channels, _ = values.shape
    spread = np.empty((count, channels, positions), np.float32)
    spread[:] = values[..., -1:]
    np.put_along_axis(spread, order, values[..., :-1], axis=2)
    return spread


def _quantise(values: Floats, group: int, bits: int) -> tuple[Floats, _Bytes]:
    """Ranges (low, step) and levels, from 0 to 2^bits - 1, of every group of channels."""
    rows = values.reshape(-1, group * values.shape[2])
    low, high = rows.min(axis=1, keepdims=True), rows.max(axis=1, keepdims=True)
    most = np.float32(2**bits - 1)
    with np.errstate(over="ignore", invalid="ignore"):
        step = (high - low) / most
    if not np.isfinite(step).all():  # also where a value is NaN
        raise InputError("the features are not finite; the model is broken or its input is")
    inverse = np.where(step > 0, 1 / np.maximum(step, np.float32(1e-38)), 0).astype(np.float32)
    scaled = rows - low
    scaled *= inverse
    scaled += np.float32(0.5)
    np.minimum(scaled, most, out=scaled)
    return np.concatenate([low, step], axis=1), scaled.astype(np.uint8)


def _restore(levels: _Bytes, ranges: Floats, bits: int) -> Floats:
    low, step = ranges[:, 0], ranges[:, 1]
    sound = np.isfinite(ranges).all() and (step >= 0).all()
    if not sound or (low.astype(np.float64) + step * np.float64(2**bits - 1) > _LARGEST).any():
        raise InputError("a range of the features is no range")
    values = levels.astype(np.float32)
    values *= step
    values += low
    return values


# Values are dealt to planes, the quarters or halves of the array, and a byte holds one of each:
# whole arrays are shifted, and no neighbours are picked apart.
_PLANES = {8: 1, 6: 4, 4: 2, 2: 4}


def _packed_size(size: int, bits: int) -> int:
    if bits > 8:
        return size * bits // 8
    return -(-size // _PLANES[bits]) * (3 if bits == 6 else 1)


def _pack(levels: _Bytes, bits: int) -> _Bytes:
    planes = _planes(levels.ravel(), bits)
    if bits == 6:  # the fourth plane fills up the other three
        last = planes[3]
        packed: _Bytes = planes[:3] | np.stack([last << 6, (last >> 2) << 6, (last >> 4) << 6])
        return packed
    packed = planes[0].copy()
    for place, plane in enumerate(planes[1:], 1):
        packed |= plane << np.uint8(place * bits)
    return packed


def _planes(flat: _Bytes, bits: int) -> _Bytes:
    """The array as rows, zeros after its end."""
    planes = _PLANES[bits]
    if flat.size % planes:
        flat = np.concatenate([flat, np.zeros(-flat.size % planes, np.uint8)])
    return flat.reshape(planes, -1)


def _unpack(packed: _Bytes, bits: int, size: int) -> _Bytes:
    if bits == 8:
        return packed
    if bits == 6:
        three = packed.reshape(3, -1)
        last = (three >> 6) << np.array([[0], [2], [4]], np.uint8)
        planes = np.concatenate([three & 63, np.bitwise_or.reduce(last, axis=0)[None]])
    else:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
        planes = (packed >> shifts) & np.uint8(2**bits - 1)
    levels: _Bytes = planes.ravel()[:size]
    return levels


def _unzip(content: memoryview, length: int) -> bytes:
    """What zlib packed. Errors: InputError for more or less than `length` bytes, or damage."""
    stream = zlib.decompressobj()
    try:
        plain = stream.decompress(content, length + 1)
    except zlib.error as error:
        raise InputError(f"the features are damaged ({error})") from None
    if len(plain) != length or not stream.eof or stream.unused_data:
        raise InputError("the packed features do not have the length of their header")
    return plain


_PNG = b"\x89PNG\r\n\x1a\n"
_COLOURS = {1: 0, 3: 2}  # PNG's number for grey and RGB


def encode_picture(image: _Bytes) -> bytes:
    """An image uint8 `[H, W, C]`, grey or RGB, as a PNG file."""
    height, width, channels = image.shape
    left, above = np.zeros_like(image), np.zeros_like(image)
    left[:, 1:], above[1:] = image[:, :-1], image[:-1]
    rows = np.stack([image, image - left, image - above]).reshape(3, height, -1)
    # For each row the filter whose values are nearest to zero, as PNG's authors suggest.
    best = np.abs(rows.view(np.int8).astype(np.int16)).sum(axis=2).argmin(axis=0)
    lines = np.concatenate([best[:, None].astype(np.uint8), rows[best, range(height)]], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return _PNG + b"".join(_chunk(*chunk) for chunk in chunks)


def decode_picture(message: bytes | memoryview, shape: _Shape) -> _Bytes:
    """The image `(H, W, C)` of a PNG file that `encode_picture` wrote.

    Errors: InputError for another size and for files of other programs.
    """
    message = memoryview(message)
    height, width, channels = shape
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOURS[channels], 0, 0, 0)
    start = _PNG + _chunk(b"IHDR", header)
    end = _chunk(b"IEND", b"")
    frame = len(start) + 12 + len(end)
    if len(message) < frame or message[: len(start)] != start or message[-len(end) :] != end:
        raise InputError(f"this is no PNG of {height} x {width} and {channels} channels of ours")
    content = message[len(start) + 8 : -len(end) - 4]
    if message[len(start) : -len(end)] != _chunk(b"IDAT", content):
        raise InputError("the PNG is damaged")
    stride = 1 + width * channels
    lines = np.frombuffer(_unzip(content, height * stride), np.uint8).reshape(height, stride)
    filters = lines[:, 0].tolist()
    if max(filters) > 2:
        raise InputError("the PNG has rows of a filter that EdgeKE does not use")
    image = lines[:, 1:].reshape(shape).copy()
    for row, filter in enumerate(filters):
        if filter == 1:
            image[row] = np.cumsum(image[row], axis=0, dtype=np.uint8)
        elif filter == 2 and row:
            image[row] += image[row - 1]
    return image


def _chunk(kind: bytes, content: bytes | memoryview) -> bytes:
    check = zlib.crc32(content, zlib.crc32(kind))
    return b"".join([struct.pack(">I", len(content)), kind, content, struct.pack(">I", check)])

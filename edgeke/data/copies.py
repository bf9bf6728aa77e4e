"""Pictures that show the same: equal pixels, or nearly."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from edgeke.data.pixels import Pixels

# Two pictures are near copies where their hashes differ in at most so many of 64 bits, and their
# thumbnails correlate so well. Flat pictures have no hash worth comparing.
_BITS, _ALIKE, _FLAT = 3, 0.98, 2.0
_PAIRS = 500  # compared per bucket at most, so that a set of one scene ends, too


def fingerprints(images: Pixels) -> tuple[list[bytes], NDArray[np.float32]]:
    """SHA-256 of each image's pixels, and thumbnails float32 `[N, 8, 9]`."""
    digests, thumbnails = [], np.empty((len(images), 8, 9), np.float32)
    for number in tqdm(range(len(images)), desc="compare", unit="image", mininterval=1):
        image = np.ascontiguousarray(images[number])
        digests.append(hashlib.sha256(image.data).digest())
        grey = Image.fromarray(image.mean(axis=0).astype(np.uint8))
        thumbnails[number] = np.asarray(grey.resize((9, 8), Image.Resampling.BOX))
    return digests, thumbnails


def equal(digests: Sequence[bytes]) -> list[list[int]]:
    """Groups of the indices of images with the same pixels, two or more each."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, digest in enumerate(digests):
        groups[digest].append(index)
    return [group for group in groups.values() if len(group) > 1]


def near(thumbnails: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Pairs of images that look the same, by difference hashes of 64 bits of their thumbnails.

    Each with one it resembles, not with all. Two hashes that differ in three bits agree in one of
    four parts: only those are compared.
    """
    bits = (thumbnails[:, :, 1:] > thumbnails[:, :, :-1]).reshape(len(thumbnails), 64)
    parts = np.packbits(bits, axis=1).reshape(len(bits), 4, 2)
    flat = thumbnails.reshape(len(thumbnails), -1)
    centred = flat - flat.mean(axis=1, keepdims=True)
    deviation = centred.std(axis=1)
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)
    pairs: dict[int, int] = {}
    for part in range(4):
        buckets: dict[bytes, list[int]] = defaultdict(list)
        for index in np.flatnonzero(deviation > _FLAT).tolist():
            buckets[parts[index, part].tobytes()].append(index)
        for members in buckets.values():
            for place, index in enumerate(members[1:], 1):
                if index in pairs:
                    continue
                others = np.asarray(members[max(0, place - _PAIRS) : place])
                close = (bits[others] != bits[index]).sum(axis=1) <= _BITS
                close &= unit[others] @ unit[index] >= _ALIKE
                if close.any():
                    pairs[index] = int(others[close][0])
    return sorted((other, index) for index, other in pairs.items())


def joined(count: int, together: Iterable[Iterable[int]]) -> NDArray[np.int64]:
    """A number for each of `count` images, the same for those that are joined, if indirectly."""
    parent = list(range(count))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    for group in together:
        first, *others = group
        for other in others:
            a, b = sorted((root(first), root(other)))
            parent[b] = a
    return np.asarray([root(index) for index in range(count)], np.int64)

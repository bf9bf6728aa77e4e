"""Decoded pictures on their way into the dataset file: on the disk, few of them in memory."""

import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeke.files import scratch_file

# So many images are in memory at once.
BLOCK = 64


class Pixels(Protocol):
    """Images uint8 `[C, H, W]` by number: an array `[N, C, H, W]`, or `Stored`."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> NDArray[np.uint8]: ...


class Stored:
    """Images of one shape in a file without a name, which goes with the process.

    Not mapped: what a map has read counts as the process's memory. Threads may write at once.
    """

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        self._count, self._shape, self._size = count, shape, int(np.prod(shape))
        with scratch_file(max(1, count * self._size)) as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self._count

    def __setitem__(self, number: int, image: NDArray[np.uint8]) -> None:
        os.pwrite(self._file, image.tobytes(), number * self._size)

    def __getitem__(self, number: int, /) -> NDArray[np.uint8]:
        content = os.pread(self._file, self._size, number * self._size)
        return np.frombuffer(content, np.uint8).reshape(self._shape)


def blocks(
    images: Pixels, numbers: Sequence[int] | NDArray[np.int64]
) -> Iterator[NDArray[np.uint8]]:
    """The images of these numbers in order, as arrays `[B, C, H, W]`."""
    for start in range(0, len(numbers), BLOCK):
        yield np.stack([images[int(number)] for number in numbers[start : start + BLOCK]])

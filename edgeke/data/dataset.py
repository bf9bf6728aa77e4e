"""dataset.safetensors: every split in one file, with what is needed to normalise and name it."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from edgeke.data.pixels import Pixels, blocks
from edgeke.device.decode import BITS, FIT
from edgeke.errors import InputError
from edgeke.files import replacing

# What safetensors calls the types of images and labels.
_NAMES = {np.dtype(np.uint8): "U8", np.dtype(np.int64): "I64"}


@dataclass(frozen=True)
class Split:
    """Images uint8 `[N, C, H, W]`, which may be mapped from a file, and labels int64 `[N]`.

    `groups` int64 `[N]`: images with the same number belong together; None where each is alone.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Dataset:
    """Some or all of the splits, and the metadata of all.

    `mean` and `std` are per channel, in [0, 1], over all images the source gives for training.
    `bits`: significant bits of 16-bit pictures. `fit`: how pictures of another size are read.
    """

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str
    seed: int
    sha256: str
    splits: Mapping[str, Split]
    bits: int = BITS
    fit: str = FIT

    def __getitem__(self, split: str) -> Split:
        return self.splits[split]


def channels_last(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Dataset images `[N, C, H, W]` as the exported graphs take them, `[N, H, W, C]`."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


class ChannelStatistics:
    """Mean and standard deviation per channel of images that come in blocks, scaled to [0, 1].

    Exact: every channel's 256-bin histogram is summed in float64.
    """

    def __init__(self, channels: int) -> None:
        self._histograms = np.zeros((channels, 256), np.int64)

    def add(self, images: NDArray[np.uint8]) -> None:
        """Count a block of images uint8 `[N, C, H, W]`."""
        for channel, histogram in enumerate(self._histograms):
            histogram += np.bincount(images[:, channel].ravel(), minlength=256)

    def result(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Means and deviations. Errors: InputError for a channel that is constant."""
        levels, means, stds = np.arange(256) / 255, [], []
        for channel, counts in enumerate(self._histograms):
            if np.count_nonzero(counts) == 1:
                raise InputError(
                    f"channel {channel} has the same value in every image; check the data"
                )
            means.append(float(counts @ levels / counts.sum()))
            stds.append(float(np.sqrt(counts @ (levels - means[-1]) ** 2 / counts.sum())))
        return tuple(means), tuple(stds)


def channel_statistics(
    images: NDArray[np.uint8],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images uint8 `[N, C, H, W]`, scaled to [0, 1].

    Errors: InputError for a channel that is constant, since it cannot be normalised.
    """
    statistics = ChannelStatistics(images.shape[1])
    for block in blocks(images, range(len(images))):
        statistics.add(block)
    return statistics.result()


def save_dataset(dataset: Dataset, path: Path) -> None:
    """Write a dataset that is in memory: see `write_dataset`."""
    parts = {
        name: _Part(split.images, range(len(split.images)), split.labels, split.groups)
        for name, split in dataset.splits.items()
    }
    _write(dataset, parts, path)


def write_dataset(
    dataset: Dataset,
    images: Pixels,
    labels: NDArray[np.int64],
    splits: Mapping[str, NDArray[np.int64]],
    groups: NDArray[np.int64] | None,
    path: Path,
) -> None:
    """Write the dataset atomically, as a stream; the same dataset gives the same bytes.

    Of `dataset` the metadata are taken, except mean and std: those are over all images but test.
    `splits` are indices into `images`, `labels` `[N]` and `groups` `[N]`. Errors: InputError when
    a channel is constant or the disk is full.
    """
    statistics = ChannelStatistics(dataset.image_shape[0])
    for name, indices in splits.items():
        if name != "test":
            for block in blocks(images, indices):
                statistics.add(block)
    mean, std = statistics.result()
    parts = {
        name: _Part(images, indices, labels[indices], None if groups is None else groups[indices])
        for name, indices in splits.items()
    }
    _write(replace(dataset, mean=mean, std=std), parts, path)


@dataclass(frozen=True)
class _Part:
    """A split on its way into the file."""

    images: Pixels
    indices: Sequence[int] | NDArray[np.int64]
    labels: NDArray[np.int64]
    groups: NDArray[np.int64] | None

    def content(self, kind: str) -> Iterator[memoryview]:
        """The bytes of `images`, `labels` or `groups`, in blocks."""
        if kind == "images":
            for block in blocks(self.images, self.indices):
                yield np.ascontiguousarray(block).data.cast("B")
        elif len(self.labels):
            yield np.ascontiguousarray(getattr(self, kind), np.int64).data.cast("B")


def _write(dataset: Dataset, parts: Mapping[str, _Part], path: Path) -> None:
    """The bytes are those that the package safetensors would write, which needs all in memory."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, part in parts.items():
        shapes[f"{name}.images"] = (len(part.indices), *dataset.image_shape)
        shapes[f"{name}.labels"] = (len(part.labels),)
        if part.groups is not None:
            shapes[f"{name}.groups"] = (len(part.groups),)

    def content(tensor: str) -> Iterator[memoryview]:
        split, _, kind = tensor.rpartition(".")
        return parts[split].content(kind)

    digest = hashlib.sha256()
    for name in sorted(shapes):
        digest.update(name.encode())
        for block in content(name):
            digest.update(block)
    described = {f.name: getattr(dataset, f.name) for f in fields(dataset) if f.name != "splits"}
    described["sha256"] = digest.hexdigest()
    # One metadata key: safetensors keeps several in no fixed order, and DVC compares bytes.
    header: dict[str, Any] = {"__metadata__": {"dataset": json.dumps(described)}}
    order = sorted(shapes, key=lambda name: (name.endswith(".images"), name))
    end = 0
    for name in order:
        dtype = np.dtype(np.uint8 if name.endswith(".images") else np.int64)
        start, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": shapes[name],
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    images = sum(shape[0] for name, shape in shapes.items() if name.endswith(".images"))
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        tqdm(desc=f"write {path}", total=images, unit="image", mininterval=1) as bar,
    ):
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            for block in content(name):
                file.write(block)
                if name.endswith(".images"):
                    bar.update(len(block) // math.prod(dataset.image_shape))


def load_dataset(path: Path, splits: Sequence[str]) -> Dataset:
    """Read only the named splits: labels into memory, images as a read-only map of the file.

    A stage names what it may look at, so `calibration` and `test` stay out of training. Errors:
    InputError when the file is missing, truncated or not a dataset.
    """
    try:
        with safe_open(path, framework="np") as file:  # checks the header and the length
            described = json.loads((file.metadata() or {})["dataset"])
        with path.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))

        def mapped(name: str, dtype: type) -> NDArray[Any]:
            offset, shape = 8 + length + header[name]["data_offsets"][0], header[name]["shape"]
            return np.asarray(np.memmap(path, dtype, "r", offset, tuple(shape)))

        read = {
            name: Split(
                mapped(f"{name}.images", np.uint8),
                mapped(f"{name}.labels", np.int64).copy(),
                mapped(f"{name}.groups", np.int64).copy() if f"{name}.groups" in header else None,
            )
            for name in splits
        }
        described |= {k: tuple(value) for k, value in described.items() if type(value) is list}
        return Dataset(**described, splits=read)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; `dvc repro download` builds it") from None
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path} is truncated or not a dataset file ({error}); delete it and run "
            "`dvc repro download`"
        ) from error

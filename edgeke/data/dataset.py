"""dataset.safetensors: every split in one file, with what is needed to normalise and name it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from edgeke.device.decode import BITS
from edgeke.errors import InputError
from edgeke.files import replacing

# What safetensors calls the types of images and labels.
_NAMES = {np.dtype(np.uint8): "U8", np.dtype(np.int64): "I64"}

# So many images are counted at once: NumPy makes int64 of their pixels.
_BLOCK = 64


@dataclass(frozen=True)
class Split:
    """Images uint8 `[N, C, H, W]`, which may be mapped from a file, and labels int64 `[N]`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """Some or all of the splits, and the metadata of all.

    `mean` and `std` are per channel, in [0, 1], over all images the source gives for training.
    `bits`: significant bits of 16-bit pictures.
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

    def __getitem__(self, split: str) -> Split:
        return self.splits[split]


def channels_last(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Dataset images `[N, C, H, W]` as the exported graphs take them, `[N, H, W, C]`."""
    return np.ascontiguousarray(images.transpose(0, 2, 3, 1))


def channel_statistics(
    images: NDArray[np.uint8],
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of images uint8 `[N, C, H, W]`, scaled to [0, 1].

    Exact: every channel's 256-bin histogram is summed in float64. Errors: InputError for a channel
    that is constant, since it cannot be normalised.
    """
    levels = np.arange(256) / 255
    histograms = np.zeros((images.shape[1], 256), np.int64)
    for start in range(0, len(images), _BLOCK):
        for channel, histogram in enumerate(histograms):
            values = images[start : start + _BLOCK, channel].ravel()
            histogram += np.bincount(values, minlength=256)
    means, stds = [], []
    for channel, counts in enumerate(histograms):
        if np.count_nonzero(counts) == 1:
            raise InputError(f"channel {channel} has the same value in every image; check the data")
        means.append(float(counts @ levels / counts.sum()))
        stds.append(float(np.sqrt(counts @ (levels - means[-1]) ** 2 / counts.sum())))
    return tuple(means), tuple(stds)


def save_dataset(dataset: Dataset, path: Path) -> None:
    """Write the dataset atomically, as a stream; the same dataset gives the same bytes.

    They are those that the package safetensors would write, but it needs all tensors in memory.
    """
    tensors: dict[str, NDArray[Any]] = {}
    for name, split in dataset.splits.items():
        tensors[f"{name}.images"] = np.ascontiguousarray(split.images)
        tensors[f"{name}.labels"] = np.ascontiguousarray(split.labels)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].data)
    described = {f.name: getattr(dataset, f.name) for f in fields(dataset) if f.name != "splits"}
    described["sha256"] = digest.hexdigest()
    # One metadata key: safetensors keeps several in no fixed order, and DVC compares bytes.
    header: dict[str, Any] = {"__metadata__": {"dataset": json.dumps(described)}}
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    end = 0
    for name in order:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": tensors[name].shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(tensors[name].data)


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
                mapped(f"{name}.images", np.uint8), mapped(f"{name}.labels", np.int64).copy()
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

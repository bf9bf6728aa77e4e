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
from safetensors.numpy import save

from edgeke.device.decode import BITS
from edgeke.errors import InputError
from edgeke.files import write_bytes


@dataclass(frozen=True)
class Split:
    """Images uint8 `[N, C, H, W]` and labels int64 `[N]`."""

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
    means, stds = [], []
    for channel in range(images.shape[1]):
        counts = np.bincount(images[:, channel].ravel(), minlength=256)
        if np.count_nonzero(counts) == 1:
            raise InputError(f"channel {channel} has the same value in every image; check the data")
        means.append(float(counts @ levels / counts.sum()))
        stds.append(float(np.sqrt(counts @ (levels - means[-1]) ** 2 / counts.sum())))
    return tuple(means), tuple(stds)


def save_dataset(dataset: Dataset, path: Path) -> None:
    """Write the dataset atomically; the same dataset gives the same bytes."""
    tensors: dict[str, NDArray[Any]] = {}
    for name, split in dataset.splits.items():
        tensors[f"{name}.images"] = np.ascontiguousarray(split.images)
        tensors[f"{name}.labels"] = np.ascontiguousarray(split.labels)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].tobytes())
    described = {f.name: getattr(dataset, f.name) for f in fields(dataset) if f.name != "splits"}
    described["sha256"] = digest.hexdigest()
    # One metadata key: safetensors keeps several in no fixed order, and DVC compares bytes.
    write_bytes(path, save(tensors, {"dataset": json.dumps(described)}))


def load_dataset(path: Path, splits: Sequence[str]) -> Dataset:
    """Read only the named splits.

    A stage names what it may look at, so `calibration` and `test` stay out of training. Errors:
    InputError when the file is missing, truncated or not a dataset.
    """
    try:
        with safe_open(path, framework="np") as file:
            described = json.loads((file.metadata() or {})["dataset"])
            read = {
                name: Split(file.get_tensor(f"{name}.images"), file.get_tensor(f"{name}.labels"))
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

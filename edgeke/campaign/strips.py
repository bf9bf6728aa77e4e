"""CIFAR-100 as one lossless strip per class, and the dataset file that is cut from it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgeke.data.dataset import Dataset, Split, channel_statistics, load_dataset, save_dataset
from edgeke.data.sources import LabelledImages
from edgeke.data.splits import SPLITS, split_indices
from edgeke.errors import InputError
from edgeke.params import Source

__all__ = ["build_dataset", "cut_splits", "read_strips"]

_SIDE = 32


def read_strips(folder: Path) -> LabelledImages:
    """All images below `folder/{train,test}/<class>.webp`: n squares of 32 pixels, top to bottom.

    Classes are in alphabetical order, as in torchvision. Errors: InputError when strips are
    missing, cannot be read, or are not 32 pixels wide.
    """
    images: list[NDArray[np.uint8]] = []
    labels: list[NDArray[np.int64]] = []
    train, found = 0, {}
    for part in ("train", "test"):
        files = sorted((folder / part).glob("*.webp"))
        found[part] = tuple(file.stem for file in files)
        for label, file in enumerate(files):
            strip = _read(file)
            images.append(strip)
            labels.append(np.full(len(strip), label, np.int64))
        if part == "train":
            train = sum(map(len, labels))
    if not found["train"] or found["train"] != found["test"]:
        raise InputError(
            f"{folder} must hold train/<class>.webp and test/<class>.webp for the same classes "
            f"(found {len(found['train'])} and {len(found['test'])}); point --data to the folder "
            "that holds cifar100/"
        )
    return LabelledImages(np.concatenate(images), np.concatenate(labels), found["train"], train)


def cut_splits(found: LabelledImages, source: Source, seed: int) -> dict[str, NDArray[np.int64]]:
    """The pipeline's own splits; needs scikit-learn, so a bare machine is given them ready."""
    return split_indices(found, source, seed)


def build_dataset(
    found: LabelledImages,
    splits: Mapping[str, Sequence[int] | NDArray[np.int64]],
    path: Path,
    *,
    name: str,
    source: str,
    seed: int,
    limit: int | None,
) -> Dataset:
    """Write the dataset file of these splits and return it as it was written.

    The same file that stage `download` writes from the same images. `limit` keeps only the first
    images of every split, for rehearsals; mean and std stay those of all. Errors: InputError when
    the splits belong to another number of images.
    """
    if sum(len(splits[split]) for split in SPLITS) != len(found.labels):
        raise InputError(
            f"the splits name {sum(len(splits[split]) for split in SPLITS)} images, the strips "
            f"hold {len(found.labels)}; write them anew with --prepare from the same strips"
        )
    indices = {split: np.asarray(splits[split], np.int64) for split in SPLITS}
    training = np.sort(np.concatenate([indices[n] for n in SPLITS if n != "test"]))
    mean, std = channel_statistics(found.images[training])
    cut = {n: Split(found.images[i[:limit]], found.labels[i[:limit]]) for n, i in indices.items()}
    shape = (found.images.shape[1], _SIDE, _SIDE)
    dataset = Dataset(name, found.classes, shape, mean, std, source, seed, "", cut)
    save_dataset(dataset, path)
    return load_dataset(path, SPLITS)


def _read(file: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as opened:
            strip = np.asarray(opened.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{file} is no readable image ({error}); copy it again") from error
    if strip.shape[1] != _SIDE or strip.shape[0] % _SIDE:
        raise InputError(
            f"{file} is {strip.shape[1]} x {strip.shape[0]} pixels; a strip is {_SIDE} wide and a "
            f"multiple of {_SIDE} tall"
        )
    squares = strip.reshape(-1, _SIDE, _SIDE, 3).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(squares)

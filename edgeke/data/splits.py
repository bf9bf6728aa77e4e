"""Stratified, seeded splits, and what could make them leak."""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgeke.data.sources import LabelledImages
from edgeke.errors import InputError
from edgeke.params import Source

__all__ = ["SPLITS", "duplicates_across", "split_indices"]

SPLITS = ("train", "validation", "calibration", "test")


def split_indices(found: LabelledImages, source: Source, seed: int) -> dict[str, NDArray[np.int64]]:
    """Indices of each split: disjoint, stratified by class, the same for the same seed.

    Sizes come from the profile; `test` is cut first unless the source has its own. Every split
    ends up with every class. Errors: InputError when there are too few images for that.
    """
    from sklearn.model_selection import train_test_split

    total, own_test = len(found.labels), len(found.labels) > found.train
    if own_test and source.test is not None:
        raise InputError(
            f"source {source.source} brings its own test split of {total - found.train} images; "
            "set `test: null` in the profile's data section to use it"
        )
    if not own_test and source.test is None:
        raise InputError(
            f"source {source.source} has no test split of its own; set `test` in the profile's "
            "data section to a number of images or a share such as 0.2"
        )
    rest = np.arange(found.train)
    # Every split is shuffled: its first images, on which latency is measured, are a fair sample.
    shuffle = np.random.default_rng(seed).permutation
    splits = {"test": shuffle(np.arange(found.train, total))} if own_test else {}
    for name in ("test", "calibration", "validation"):
        if name in splits:
            continue
        size: int | float | None = getattr(source, name)
        assert size is not None
        count = size if isinstance(size, int) else round(size * total)
        _check_enough(found, rest, name, count)
        rest, taken = train_test_split(
            rest, test_size=count, stratify=found.labels[rest], random_state=seed
        )
        splits[name] = shuffle(taken)
    splits["train"] = shuffle(rest)
    for name, indices in splits.items():
        missing = set(range(len(found.classes))) - set(found.labels[indices].tolist())
        if missing:
            names = ", ".join(found.classes[label] for label in sorted(missing))
            raise InputError(
                f"split {name} has no image of class {names}; add images of it, or make the split "
                "larger in the profile's data section"
            )
    return {name: splits[name] for name in SPLITS}


def duplicates_across(
    images: NDArray[np.uint8], splits: Mapping[str, NDArray[np.int64]]
) -> dict[str, int]:
    """How many images of each later split stand pixel for pixel in `train`, too."""
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    seen = {digests[i] for i in splits["train"]}
    return {
        name: sum(digests[i] in seen for i in splits[name]) for name in SPLITS if name != "train"
    }


def _check_enough(found: LabelledImages, rest: NDArray[np.int64], name: str, count: int) -> None:
    classes = len(found.classes)
    counts = np.bincount(found.labels[rest], minlength=classes)
    if counts.min() < 2:
        scarce = found.classes[int(counts.argmin())]
        raise InputError(
            f"class {scarce} has too few images to reach every split; give it at least 4, better "
            "20 or more"
        )
    if count < classes or count > len(rest) - classes:
        raise InputError(
            f"{name} = {count} images cannot be cut from {len(rest)} of {classes} classes; every "
            f"split needs at least one image per class, so use {classes} to {len(rest) - classes}"
        )

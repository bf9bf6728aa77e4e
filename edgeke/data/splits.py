"""Stratified, seeded splits of sources that never change; `quotas` has those of one's own."""

import numpy as np
from numpy.typing import NDArray

from edgeke.data.listing import SPLITS
from edgeke.data.sources import LabelledImages
from edgeke.errors import InputError
from edgeke.params import Source


def split_indices(
    labelled: LabelledImages, source: Source, seed: int
) -> dict[str, NDArray[np.int64]]:
    """Indices of each split: disjoint, stratified by class, the same for the same seed.

    Sizes come from the profile; `test` is cut first unless the source has its own. Every split
    ends up with every class. Errors: InputError when there are too few images for that.
    """
    from sklearn.model_selection import train_test_split

    total, own_test = len(labelled.labels), len(labelled.labels) > labelled.train
    if own_test and source.test is not None:
        raise InputError(
            f"source {source.source} brings its own test split of {total - labelled.train} images; "
            "set `test: null` in the profile's data section to use it"
        )
    if not own_test and source.test is None:
        raise InputError(
            f"source {source.source} has no test split of its own; set `test` in the profile's "
            "data section to a number of images or a share such as 0.2"
        )
    rest = np.arange(labelled.train)
    # Every split is shuffled: its first images, on which latency is measured, are a fair sample.
    shuffle = np.random.default_rng(seed).permutation
    splits = {"test": shuffle(np.arange(labelled.train, total))} if own_test else {}
    for name in ("test", "calibration", "validation"):
        if name in splits:
            continue
        size: int | float | None = getattr(source, name)
        assert size is not None
        count = size if isinstance(size, int) else round(size * total)
        _check_enough(labelled, rest, name, count)
        rest, taken = train_test_split(
            rest, test_size=count, stratify=labelled.labels[rest], random_state=seed
        )
        splits[name] = shuffle(taken)
    splits["train"] = shuffle(rest)
    for name, indices in splits.items():
        missing = set(range(len(labelled.classes))) - set(labelled.labels[indices].tolist())
        if missing:
            names = ", ".join(labelled.classes[label] for label in sorted(missing))
            raise InputError(
                f"split {name} has no image of class {names}; add images of it, or make the split "
                "larger in the profile's data section"
            )
    return {name: splits[name] for name in SPLITS}


def _check_enough(labelled: LabelledImages, rest: NDArray[np.int64], name: str, count: int) -> None:
    classes = len(labelled.classes)
    counts = np.bincount(labelled.labels[rest], minlength=classes)
    if counts.min() < 2:
        scarce = labelled.classes[int(counts.argmin())]
        raise InputError(
            f"class {scarce} has too few images to reach every split; give it at least 4, better "
            "20 or more"
        )
    if count < classes or count > len(rest) - classes:
        raise InputError(
            f"{name} = {count} images cannot be cut from {len(rest)} of {classes} classes; every "
            f"split needs at least one image per class, so use {classes} to {len(rest) - classes}"
        )

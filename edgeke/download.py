"""Stage `download`: any source becomes one dataset file with fixed splits."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgeke.data.dataset import Dataset, Split, channel_statistics
from edgeke.data.sources import LabelledImages
from edgeke.data.splits import copies, split_indices
from edgeke.files import scratch_array
from edgeke.params import Source


def download(
    labelled: LabelledImages, source: Source, name: str, seed: int
) -> tuple[Dataset, dict[str, float], list[str]]:
    """Split labelled images; returns the dataset, counts per split and class, notes for the user.

    Mean and std are taken over all images the source gives for training: everything but test.
    Errors: InputError when the splits cannot be cut.
    """
    splits = split_indices(labelled, source, seed)
    channels, height, width = labelled.images.shape[1:]
    images, parts = _in_order(labelled.images, splits)
    mean, std = channel_statistics(images[: -len(splits["test"])])
    dataset = Dataset(
        name=name,
        classes=labelled.classes,
        image_shape=(channels, height, width),
        mean=mean,
        std=std,
        source=source.source,
        seed=seed,
        sha256="",  # computed from the content when the file is written
        splits={n: Split(parts[n], labelled.labels[i]) for n, i in splits.items()},
        bits=labelled.bits,
    )
    metrics: dict[str, float] = {f"{split}/images": len(i) for split, i in splits.items()}
    duplicates, notes = _copies(labelled, splits)
    metrics |= duplicates
    for split, indices in splits.items():
        counts = np.bincount(labelled.labels[indices], minlength=len(labelled.classes))
        metrics |= {
            f"{split}/images_of/{label}": int(count)
            for label, count in zip(labelled.classes, counts, strict=True)
        }
    return dataset, metrics, [*labelled.notes, *notes]


def _in_order(
    images: NDArray[np.uint8], splits: Mapping[str, NDArray[np.int64]]
) -> tuple[NDArray[np.uint8], dict[str, NDArray[np.uint8]]]:
    """All images split after split, mapped from a temporary file, and each split's part."""
    indices = np.concatenate(list(splits.values()))
    ordered = scratch_array((len(indices), *images.shape[1:]), np.uint8)
    for place, index in enumerate(indices):
        ordered[place] = images[index]
    ends = np.cumsum([len(split) for split in splits.values()])[:-1]
    return ordered, dict(zip(splits, np.split(ordered, ends), strict=True))


def _copies(
    labelled: LabelledImages, splits: Mapping[str, NDArray[np.int64]]
) -> tuple[dict[str, float], list[str]]:
    """How many images of each split are pixel for pixel in `train`, too; what to say of copies."""
    groups = copies(labelled.images)
    train = set(splits["train"].tolist())
    leaked = {index for group in groups if train & set(group) for index in group}
    counts = {n: len(leaked & set(splits[n].tolist())) for n in splits if n != "train"}
    notes = []
    if any(counts.values()):
        words = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
        notes.append(f"copies of training images in other splits: {words}; remove them")
    mixed = [group for group in groups if len(set(labelled.labels[group].tolist())) > 1]
    if mixed:
        first = mixed[0][0]
        other = next(i for i in mixed[0] if labelled.labels[i] != labelled.labels[first])
        names = [labelled.names[i] if labelled.names else f"image {i}" for i in (first, other)]
        notes.append(
            f"same pixels in more than one class: {len(mixed)} (such as {' and '.join(names)}); "
            "keep each where it belongs"
        )
    return {f"{name}/duplicates_of_train": count for name, count in counts.items()}, notes

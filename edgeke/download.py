"""Stage `download`: any source becomes one dataset file with fixed splits."""

import numpy as np

from edgeke.data.dataset import Dataset, Split, channel_statistics
from edgeke.data.sources import LabelledImages
from edgeke.data.splits import duplicates_across, split_indices
from edgeke.params import Source

__all__ = ["download"]


def download(
    found: LabelledImages, source: Source, name: str, seed: int
) -> tuple[Dataset, dict[str, float]]:
    """Split labelled images; returns the dataset and the counts per split and class.

    Mean and std are taken over all images the source gives for training: everything but test.
    Errors: InputError when the splits cannot be cut.
    """
    splits = split_indices(found, source, seed)
    for_training = np.sort(np.concatenate([splits[n] for n in splits if n != "test"]))
    mean, std = channel_statistics(found.images[for_training])
    channels, height, width = found.images.shape[1:]
    dataset = Dataset(
        name=name,
        classes=found.classes,
        image_shape=(channels, height, width),
        mean=mean,
        std=std,
        source=source.source,
        seed=seed,
        sha256="",  # computed from the content when the file is written
        splits={n: Split(found.images[i], found.labels[i]) for n, i in splits.items()},
    )
    metrics: dict[str, float] = {}
    for split, indices in splits.items():
        metrics[f"{split}/images"] = len(indices)
    for split, count in duplicates_across(found.images, splits).items():
        metrics[f"{split}/duplicates_of_train"] = count
    for split, indices in splits.items():
        counts = np.bincount(found.labels[indices], minlength=len(found.classes))
        metrics |= {
            f"{split}/images_of/{label}": int(count)
            for label, count in zip(found.classes, counts, strict=True)
        }
    return dataset, metrics

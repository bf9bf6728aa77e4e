"""Stage `download`: any source becomes one dataset file with fixed splits."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeke.data.copies import equal, fingerprints, joined, near
from edgeke.data.dataset import Dataset, write_dataset
from edgeke.data.listing import SPLITS, Listing, escaped
from edgeke.data.quotas import Cuts, lasting_splits
from edgeke.data.sources import LabelledImages
from edgeke.data.splits import split_indices
from edgeke.params import Source

Indices = Mapping[str, NDArray[np.int64]]


def download(
    labelled: LabelledImages, source: Source, name: str, seed: int, path: Path, cuts: Cuts
) -> tuple[dict[str, float], list[str], Cuts]:
    """Split labelled images and write the dataset file.

    Returns counts per split and class, notes for the user, and where the splits of the user's own
    pictures begin; `cuts` is that of the build before. Mean and std are taken over all images the
    source gives for training: everything but test. Errors: InputError when the splits cannot be
    cut.
    """
    digests, thumbnails = fingerprints(labelled.images)
    copies, units = equal(digests), None
    notes = [*labelled.notes, *_about_classes(labelled, copies)]
    if labelled.listing is None:
        splits = split_indices(labelled, source, seed)
        leaks, words = _leaks(copies, splits)
        notes += words
    else:
        units = _units(labelled.listing, copies)
        kept, words = _once(labelled.listing, copies)
        keys = _keys(labelled, units, seed)
        splits, cuts, more = lasting_splits(labelled.listing, source, keys, units, kept, cuts)
        notes += [*words, *more, *_about_near(labelled.listing, near(thumbnails), splits, units)]
        leaks = dict.fromkeys((split for split in splits if split != "train"), 0)
    dataset = Dataset(
        name=name,
        classes=labelled.classes,
        image_shape=(source.channels, *source.shape[:2]),
        mean=(),  # computed from the content when the file is written, as sha256 is
        std=(),
        source=source.source,
        seed=seed,
        sha256="",
        splits={},
        bits=labelled.bits,
        fit=source.fit,
    )
    shared = _shared(units, splits)
    write_dataset(dataset, labelled.images, labelled.labels, splits, shared, path)
    metrics: dict[str, float] = {f"{split}/images": len(i) for split, i in splits.items()}
    if shared is not None:
        for split, indices in splits.items():
            metrics[f"{split}/groups"] = len(set(shared[indices].tolist()))
    metrics |= {f"{split}/duplicates_of_train": count for split, count in leaks.items()}
    for split, indices in splits.items():
        counts = np.bincount(labelled.labels[indices], minlength=len(labelled.classes))
        metrics |= {
            f"{split}/images_of/{label}": int(count)
            for label, count in zip(labelled.classes, counts, strict=True)
        }
    return metrics, notes, cuts


def _shared(units: NDArray[np.int64] | None, splits: Indices) -> NDArray[np.int64] | None:
    """The units, where one of them has more than one picture."""
    if units is None:
        return None
    used = np.concatenate(list(splits.values()))
    return units if len(set(units[used].tolist())) < len(used) else None


def _units(listing: Listing, copies: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """A number for each picture, the same for pictures of a group and for copies."""
    groups: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(listing.groups):
        if group:
            groups[group].append(index)
    return joined(len(listing.files), [*groups.values(), *copies])


def _keys(labelled: LabelledImages, units: NDArray[np.int64], seed: int) -> list[str]:
    """What a picture's split follows from: its unit's group, or else its file's content."""
    assert labelled.listing is not None
    names: dict[int, str] = {}
    for unit, group, digest in zip(
        units.tolist(), labelled.listing.groups, labelled.digests, strict=True
    ):
        names.setdefault(unit, f"{seed} {group or digest}")
    return [names[unit] for unit in units.tolist()]


def _once(listing: Listing, copies: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], list[str]]:
    """The pictures that are used: of copies in one class only one; a sentence about the others.

    That of a split which the source itself gives stays, of test before the others.
    """
    dropped: dict[int, int] = {}
    for group in copies:
        best: dict[int, int] = {}
        for index in sorted(group, key=lambda i: -_rank(listing.splits[i])):
            first = best.setdefault(int(listing.labels[index]), index)
            if first != index:
                dropped[index] = first
    kept = np.asarray([i for i in range(len(listing.files)) if i not in dropped], np.int64)
    if not dropped:
        return kept, []
    index, first = next(iter(dropped.items()))
    return kept, [
        f"exact copies: {len(dropped)} pictures have the pixels of another one of their class "
        f"(such as {escaped(listing.names[index])} those of {escaped(listing.names[first])}) and "
        "are left out, so that each counts once"
    ]


def _rank(split: str) -> int:
    return SPLITS.index(split) if split else 0


def _about_near(
    listing: Listing,
    pairs: Sequence[tuple[int, int]],
    splits: Indices,
    units: NDArray[np.int64],
) -> list[str]:
    """A sentence about pictures that look the same, but are of no common group."""
    split_of = {int(index): split for split, indices in splits.items() for index in indices}
    apart = [(a, b) for a, b in pairs if units[a] != units[b] and a in split_of and b in split_of]
    if not apart:
        return []
    across = [pair for pair in apart if split_of[pair[0]] != split_of[pair[1]]]
    a, b = (across or apart)[0]
    return [
        f"near copies: {len(apart)} pictures look like another one, {len(across)} of them like "
        f"one in another split (such as {escaped(listing.names[a])} in {split_of[a]} and "
        f"{escaped(listing.names[b])} in {split_of[b]}). If they show the same thing, keep one of "
        "them or say with data.group that they belong together"
    ]


def _leaks(copies: Sequence[Sequence[int]], splits: Indices) -> tuple[dict[str, int], list[str]]:
    """How many images of each split are pixel for pixel in `train`, too; a sentence about them."""
    train = set(splits["train"].tolist())
    leaked = {index for group in copies if train & set(group) for index in group}
    counts = {n: len(leaked & set(splits[n].tolist())) for n in splits if n != "train"}
    if not any(counts.values()):
        return counts, []
    words = ", ".join(f"{count} of {name}" for name, count in counts.items() if count)
    return counts, [f"copies of training images in other splits: {words}; remove them"]


def _about_classes(labelled: LabelledImages, copies: Sequence[Sequence[int]]) -> list[str]:
    """A sentence about images that are in two classes."""
    labels = labelled.labels
    mixed = [group for group in copies if len(Counter(labels[list(group)].tolist())) > 1]
    if not mixed:
        return []
    first = mixed[0][0]
    other = next(i for i in mixed[0] if labels[i] != labels[first])
    names = [labelled.names[i] if labelled.names else f"image {i}" for i in (first, other)]
    return [
        f"same pixels in more than one class: {len(mixed)} (such as "
        f"{' and '.join(map(escaped, names))}); keep each where it belongs"
    ]

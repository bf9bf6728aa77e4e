"""Splits that stay: every picture or group of the user's own goes where its hash says.

At the first build the hashes of a class are sorted and cut so that each split gets its share. The
places of the cuts are kept in a file; pictures that are added later fall between the same cuts, and
those that were there before stay.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.data.listing import SPLITS, Listing, escaped
from edgeke.errors import InputError
from edgeke.params import Source

# What is cut off first; the rest is train.
_ORDER = ("test", "calibration", "validation")

# After every hash.
_END = "~"


@dataclass(frozen=True)
class Cuts:
    """Where the splits of each class begin.

    `sizes` are what the profile asked for. `classes`: for each class the hashes of the first
    picture or group of every split but the first, in the order of `sizes` and then train.
    """

    sizes: dict[str, float] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> "Cuts":
        """From JSON values. Errors: InputError for something else."""
        try:
            sizes = {str(name): size for name, size in content["sizes"].items()}
            classes = {str(name): list(map(str, cuts)) for name, cuts in content["classes"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"results/download/splits.json is damaged ({error}); take it from git again, or "
                "delete it: splits are then drawn anew"
            ) from error
        return cls(sizes, classes)


def check_enough(listing: Listing, source: Source) -> None:
    """Refuse too few pictures or groups for every split to have every class.

    Errors: InputError that names all such classes.
    """
    names, units = _to_cut(listing, source), _units(listing.groups)
    places = np.asarray(listing.splits)
    _check_complete(listing, {s: np.flatnonzero(places == s) for s in SPLITS if s in places})
    _counts(listing, listing.splits, names, source)
    _check_classes(listing, names, listing.labels, units, listing.splits)


def lasting_splits(
    listing: Listing,
    source: Source,
    keys: Sequence[str],
    units: NDArray[np.int64],
    kept: NDArray[np.int64],
    cuts: Cuts,
) -> tuple[dict[str, NDArray[np.int64]], Cuts, list[str]]:
    """Indices of each split, where the splits begin, and notes for the user.

    `keys` `[N]`: what stands for a picture (its group or content, and the seed), equal within a
    unit; `units` `[N]`: pictures with the same number go to one split; `kept`: the pictures that
    are used; `cuts`: those of the build before. These are kept as long as half of the pictures or
    groups where they were made are still there and the sizes asked for are the same.
    Errors: InputError where a split would lack a class.
    """
    names = _to_cut(listing, source)
    hashes = [hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()[:16] for key in keys]
    given: dict[int, str] = {}
    for index in kept:
        if split := listing.splits[index]:
            known = given.get(int(units[index]), split)
            given[int(units[index])] = max(known, split, key=SPLITS.index)
    pool = np.asarray([index for index in kept if int(units[index]) not in given], np.int64)
    splits_of = [listing.splits[index] for index in kept]
    counts = _counts(listing, splits_of, names, source)
    _check_classes(listing, names, listing.labels[kept], units[kept], splits_of)

    sizes = {name: _size(source, name) for name in names}
    present = {hashes[index] for index in pool}
    before = [cut for row in cuts.classes.values() for cut in row]
    lasting = sizes == cuts.sizes and sum(c in present for c in before) >= len(before) / 2
    strata = _strata(listing, pool, units)
    quotas = _quotas(counts, {label: sum(map(len, u.values())) for label, u in strata.items()})
    notes: list[str] = []
    classes: dict[str, list[str]] = {}
    where: dict[int, str] = dict(given)
    for label, members in strata.items():
        name = listing.classes[label]
        order = sorted(members, key=lambda unit: hashes[members[unit][0]])
        ordered = [hashes[members[unit][0]] for unit in order]
        row = cuts.classes.get(name, []) if lasting else []
        places = [sum(h < cut for h in ordered) for cut in row]
        ends = zip([0, *places], [*places, len(order)], strict=True)
        whole = len(order) <= len(names) or all(b > a for a, b in ends)
        if len(row) != len(names) or not whole:
            if row:
                notes.append(f"class {escaped(name)}: a split had become empty, so all are new")
            wanted = [quotas[split][label] for split in names]
            places = _places([len(members[unit]) for unit in order], wanted)
        # Of cuts whose pictures are gone the next ones that are there: they are known again.
        classes[name] = [[*ordered, _END][place] for place in places]
        for place, unit in enumerate(order):
            where[unit] = [*names, "train"][sum(place >= p for p in places)]
    if names and cuts.classes and not lasting:
        notes.append("splits are new: the sizes asked for, the seed, or most pictures changed")
    found: dict[str, list[int]] = {split: [] for split in SPLITS}
    for index in kept:
        found[where[int(units[index])]].append(int(index))
    # In an order that has nothing to do with names: its first images are a fair sample.
    splits = {
        split: np.asarray(sorted(indices, key=lambda i: (_mixed(hashes[i], i, listing), i)), int)
        for split, indices in found.items()
    }
    _check_complete(listing, splits)
    return splits, Cuts(sizes, classes), notes


def _mixed(unit: str, index: int, listing: Listing) -> str:
    return hashlib.sha256(f"{unit} {listing.names[index]}".encode(errors="replace")).hexdigest()


def _to_cut(listing: Listing, source: Source) -> tuple[str, ...]:
    """The splits that the source does not give. Errors: InputError where `test` does not fit."""
    given = set(listing.splits) - {""}
    if "train" in given:  # all four, then
        return ()
    if "test" in given and source.test is not None and source.source != "csv":
        raise InputError(
            f"source {source.source} brings its own test split of {listing.splits.count('test')} "
            "images; set `test: null` in the profile's data section to use it"
        )
    if "test" not in given and source.test is None:
        raise InputError(
            f"source {source.source} has no test split of its own; set `test` in the profile's "
            "data section to a number of images or a share such as 0.2"
        )
    return tuple(name for name in _ORDER if name not in given)


def _size(source: Source, name: str) -> float:
    size: float | None = getattr(source, name)
    assert size is not None
    return size


def _counts(
    listing: Listing, splits: Sequence[str], names: Sequence[str], source: Source
) -> dict[str, int]:
    """How many pictures each split to be cut gets. Errors: InputError where there are too few."""
    total, pool, classes = len(splits), splits.count(""), len(listing.classes)
    counts: dict[str, int] = {}
    for name in names:
        size = _size(source, name)
        counts[name] = size if isinstance(size, int) else round(size * total)
        rest = pool - sum(counts.values())
        if rest < classes:
            raise InputError(
                f"{name} = {counts[name]} images cannot be cut from {rest + counts[name]} of "
                f"{classes} classes: train needs at least one of each; make the splits smaller in "
                "the profile's data section"
            )
    return counts


def _check_classes(
    listing: Listing,
    names: Sequence[str],
    labels: NDArray[np.int64],
    units: NDArray[np.int64],
    splits: Sequence[str],
) -> None:
    """Refuse classes that cannot be in every split, all named. Errors: InputError."""
    pool: dict[int, set[int]] = defaultdict(set)
    for label, unit, split in zip(labels.tolist(), units.tolist(), splits, strict=True):
        if not split:
            pool[label].add(unit)
    what = "groups" if any(listing.groups) else "pictures"
    needed = len(names) + 1 if names or "train" not in splits else 0
    scarce = [
        f"{escaped(name)} has {len(pool[label])}"
        for label, name in enumerate(listing.classes)
        if len(pool[label]) < needed
    ]
    if scarce:
        where = ", ".join((*names, "train"))
        raise InputError(
            f"too few {what} of {len(scarce)} classes ({', '.join(scarce)}): each of {where} needs "
            f"one, so give every class at least {needed} different ones, better 20 or more"
        )


def _check_complete(listing: Listing, splits: Mapping[str, NDArray[np.int64]]) -> None:
    for name, indices in splits.items():
        missing = set(range(len(listing.classes))) - set(listing.labels[indices].tolist())
        if missing:
            names = ", ".join(escaped(listing.classes[label]) for label in sorted(missing))
            raise InputError(
                f"split {name} has no image of class {names}; add images (or groups) of it, or "
                "make the split larger in the profile's data section"
            )


def _units(groups: Sequence[str]) -> NDArray[np.int64]:
    """A number per picture, the same for those of one group."""
    numbers: dict[str, int] = {}
    return np.asarray(
        [numbers.setdefault(group or f"\0{i}", len(numbers)) for i, group in enumerate(groups)]
    )


def _strata(
    listing: Listing, pool: NDArray[np.int64], units: NDArray[np.int64]
) -> dict[int, dict[int, list[int]]]:
    """Units by class with their pictures; a unit of several classes counts for its rarest."""
    common = np.bincount(listing.labels, minlength=len(listing.classes))
    members: dict[int, list[int]] = defaultdict(list)
    for index in pool:
        members[int(units[index])].append(int(index))
    strata: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for unit, indices in members.items():
        rarest = min(set(listing.labels[indices].tolist()), key=lambda c: (common[c], c))
        strata[rarest][unit] = indices
    return dict(sorted(strata.items()))


def _quotas(counts: Mapping[str, int], pictures: Mapping[int, int]) -> dict[str, dict[int, int]]:
    """Each split's count divided among the classes, by largest remainders."""
    total, quotas = sum(pictures.values()), {}
    for split, count in counts.items():
        exact = {label: count * number / total for label, number in pictures.items()}
        quota = {label: int(share) for label, share in exact.items()}
        remainders = sorted(exact, key=lambda label: quota[label] - exact[label])
        for label in remainders[: count - sum(quota.values())]:
            quota[label] += 1
        quotas[split] = quota
    return quotas


def _places(sizes: Sequence[int], wanted: Sequence[int]) -> list[int]:
    """Where to cut units of these sizes so that each part has its number of pictures, or nearly.

    Every part, and the rest, has at least one unit where there are enough.
    """
    sums = np.concatenate([[0], np.cumsum(sizes)])
    places: list[int] = []
    target, last = 0, 0
    for number, want in enumerate(wanted):
        target += want
        after = len(wanted) - number  # parts that still need a unit, the rest included
        first, end = last + 1, len(sizes) - after
        if len(sizes) <= len(wanted):  # a class whose units mostly count for rarer ones
            first, end = last, len(sizes)
        last = min(range(first, end + 1), key=lambda place: abs(int(sums[place]) - target))
        places.append(last)
    return places

"""Splits of one's own pictures: exact at first, and as they were when pictures are added."""

from pathlib import Path

import numpy as np
import pytest
from toys import replace

from edgeke.data.listing import SPLITS, Listing
from edgeke.data.quotas import Cuts, check_enough, lasting_splits
from edgeke.errors import InputError
from edgeke.params import Source

SOURCE = Source("image_folder", 8, 1, "crop", 0.1, 0.2, 0.2)


def listing(counts: list[int], shots: int = 0, prefix: str = "") -> Listing:
    """Pictures of classes a, b ...; with `shots`, as many in a group."""
    classes = tuple("abcdefgh"[: len(counts)])
    labels = np.repeat(np.arange(len(counts)), counts)
    numbers = np.concatenate([np.arange(count) for count in counts])
    names = tuple(f"{classes[c]}/{prefix}{n}.png" for c, n in zip(labels, numbers, strict=True))
    groups = tuple(
        f"{classes[c]}{prefix}{n // shots}" if shots else ""
        for c, n in zip(labels, numbers, strict=True)
    )
    files = tuple(map(Path, names))
    return Listing(files, names, labels, classes, ("",) * len(names), groups)


def split(given: Listing, source: Source = SOURCE, cuts: Cuts | None = None, seed: int = 0):
    """Each picture's split by its name, the cuts and the notes."""
    keys = [f"{seed} {g or n}" for g, n in zip(given.groups, given.names, strict=True)]
    units = np.unique(keys, return_inverse=True)[1]
    every = np.arange(len(keys))
    splits, cuts, notes = lasting_splits(given, source, keys, units, every, cuts or Cuts())
    assert sorted(np.concatenate(list(splits.values())).tolist()) == every.tolist()
    where = {given.names[i]: name for name in SPLITS for i in splits[name]}
    return where, Cuts.from_json(cuts.to_json()), notes


def count(where: dict[str, str], name: str, label: str) -> int:
    return sum(split == name and key[0] == label for key, split in where.items())


@pytest.mark.parametrize("counts", [[200, 200], [37, 5, 411, 64], [4, 500]])
def test_shares_hold_to_one_picture_of_each_class(counts):
    where, _, _ = split(listing(counts))
    for label, total in zip("abcd", counts, strict=False):
        for name, share in {"validation": 0.1, "calibration": 0.2, "test": 0.2}.items():
            assert abs(count(where, name, label) - share * total) <= 1
            assert count(where, name, label) >= 1


def test_a_picture_keeps_its_split_when_others_are_added_or_removed():
    first, cuts, _ = split(listing([200, 200]))
    larger = listing([260, 230])
    second, cuts, notes = split(larger, cuts=cuts)
    assert not notes
    assert all(second[name] == where for name, where in first.items())
    added = [where for name, where in second.items() if name not in first]
    assert 5 <= added.count("test") <= 35  # 18 of 90
    third, _, _ = split(listing([150, 180]), cuts=cuts)
    assert all(second[name] == where for name, where in third.items())


def test_splits_outlast_the_pictures_that_they_began_with():
    """A set from which the oldest pictures go as new ones come."""
    before, cuts, _ = split(listing([200, 200]))
    for year in range(1, 12):
        given = listing([200 + 40 * year] * 2)
        late = [i for i, name in enumerate(given.names) if int(name[2:-4]) >= 40 * year]
        given = replace(
            given,
            files=tuple(given.files[i] for i in late),
            names=tuple(given.names[i] for i in late),
            labels=given.labels[late],
            splits=("",) * len(late),
            groups=("",) * len(late),
        )
        after, cuts, notes = split(given, cuts=cuts)
        assert not notes
        assert all(after[name] == where for name, where in before.items() if name in after)
        before = after


def test_without_the_file_most_pictures_stay_where_they_are():
    """A clone without results/: hashes decide, and only pictures at the cuts move."""
    first, _, _ = split(listing([200, 200]))
    second, _, _ = split(listing([201, 200]))
    assert sum(second[name] != where for name, where in first.items()) <= 6


def test_another_set_other_sizes_and_another_seed_are_split_anew():
    _, cuts, _ = split(listing([200, 200]))
    for changed, source, seed in (
        (listing([200, 200], prefix="other"), SOURCE, 0),
        (listing([200, 200]), Source("image_folder", 8, 1, "crop", 0.1, 0.2, 0.3), 0),
        (listing([200, 200]), SOURCE, 1),
    ):
        where, _, notes = split(changed, source, cuts, seed)
        assert count(where, "test", "a") == (40 if source is SOURCE else 60)
        assert "splits are new" in notes[0]


def test_a_class_that_is_added_later_gets_its_shares():
    first, cuts, _ = split(listing([100, 100]))
    second, _, _ = split(listing([100, 100, 40]), cuts=cuts)
    assert all(second[name] == where for name, where in first.items())
    assert abs(count(second, "test", "c") - 8) <= 1


def test_groups_are_never_torn_apart():
    where, cuts, _ = split(listing([120, 132], shots=12))
    assert {name: count(where, name, "a") for name in SPLITS} == {
        "train": 60, "validation": 12, "calibration": 24, "test": 24,
    }  # fmt: skip
    larger, _, _ = split(listing([132, 132], shots=12), cuts=cuts)
    for each in (where, larger):
        parts: dict[str, set[str]] = {}
        for name, part in each.items():
            parts.setdefault(f"{name[0]}{int(name[2:-4]) // 12}", set()).add(part)
        assert all(len(part) == 1 for part in parts.values())
    assert all(larger[name] == part for name, part in where.items())


def test_a_group_of_several_classes_counts_for_the_rarest():
    labels = np.asarray([0, 0, 0, 1] * 40)
    names = tuple(f"{'ab'[label]}/{n}.png" for n, label in enumerate(labels))
    groups = tuple(str(n // 4) for n in range(160))
    given = Listing(tuple(map(Path, names)), names, labels, ("a", "b"), ("",) * 160, groups)
    where, _, _ = split(given)
    assert {name: count(where, name, "b") for name in SPLITS} == {
        "train": 20, "validation": 4, "calibration": 8, "test": 8,
    }  # fmt: skip


@pytest.mark.parametrize("rare", [4, 8, 12])
def test_the_number_that_is_advised_is_enough(rare):
    given = listing([500, 500, rare])
    check_enough(given, SOURCE)
    where, _, _ = split(given)
    assert all(count(where, name, "c") for name in SPLITS)


def test_too_few_are_all_named_with_the_true_number():
    with pytest.raises(InputError, match=r"of 2 classes \(b has 3, c has 1\).*at least 4"):
        check_enough(listing([500, 3, 1]), SOURCE)
    with pytest.raises(InputError, match=r"too few groups of 1 classes \(b has 2\)"):
        check_enough(listing([120, 24], shots=12), SOURCE)
    with pytest.raises(InputError, match=r"test = 120 images cannot be cut from 120"):
        check_enough(listing([60, 60]), Source("image_folder", 8, 1, "crop", 0.1, 0.2, 120))


def test_a_class_that_a_given_split_lacks_is_named():
    given = listing([20, 20])
    splits = tuple("test" if n < 3 else "" for n in range(40))
    with pytest.raises(InputError, match="split test has no image of class b"):
        check_enough(replace(given, splits=splits), replace(SOURCE, source="csv"))

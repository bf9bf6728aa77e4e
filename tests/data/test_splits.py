import numpy as np
import pytest
from toys import replace

from edgeke.data.sources import LabelledImages
from edgeke.data.splits import SPLITS, split_indices
from edgeke.errors import InputError
from edgeke.params import Source

SOURCE = Source(
    source="digits",
    image_size=8,
    channels=1,
    fit="exact",
    validation=20,
    calibration=0.2,
    test=30,
)


def make(counts: list[int], train: int | None = None) -> LabelledImages:
    labels = np.repeat(np.arange(len(counts)), counts).astype(np.int64)
    labels = np.random.default_rng(0).permutation(labels)
    images = np.zeros((len(labels), 1, 8, 8), np.uint8)
    names = tuple("abcdef"[: len(counts)])
    return LabelledImages(images, labels, names, len(labels) if train is None else train)


def test_splits_are_disjoint_complete_stratified_and_seeded():
    labelled = make([60, 40, 100])
    splits = split_indices(labelled, SOURCE, seed=3)
    assert {name: len(splits[name]) for name in SPLITS} == {
        "train": 110,
        "validation": 20,
        "calibration": 40,
        "test": 30,
    }
    assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(200))
    for indices in splits.values():
        shares = np.bincount(labelled.labels[indices]) / len(indices)
        assert np.abs(shares - [0.3, 0.2, 0.5]).max() < 0.05
    again = split_indices(labelled, SOURCE, seed=3)
    other = split_indices(labelled, SOURCE, seed=4)
    assert all((splits[name] == again[name]).all() for name in SPLITS)
    assert (splits["test"] != other["test"]).any()


def test_a_source_with_its_own_test_split_keeps_it():
    labelled = make([60, 60], train=100)
    with pytest.raises(InputError, match=r"own test split of 20 images.*test: null"):
        split_indices(labelled, SOURCE, 0)
    splits = split_indices(labelled, replace(SOURCE, test=None), 0)
    assert sorted(splits["test"].tolist()) == list(range(100, 120))
    assert splits["test"].tolist() != list(range(100, 120))
    with pytest.raises(InputError, match="no test split of its own"):
        split_indices(make([60, 60]), replace(SOURCE, test=None), 0)


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="class b has too few images"):
        split_indices(make([60, 1]), SOURCE, 0)
    with pytest.raises(InputError, match=r"test = 200 images cannot be cut from 120"):
        split_indices(make([60, 60]), replace(SOURCE, test=200), 0)
    with pytest.raises(InputError, match=r"validation = 1 images cannot be cut"):
        split_indices(make([60, 60]), replace(SOURCE, validation=1), 0)
    with pytest.raises(InputError, match="no image of class b"):
        split_indices(make([200, 3]), SOURCE, 0)

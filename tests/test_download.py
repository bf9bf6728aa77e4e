from pathlib import Path

import numpy as np
import pytest
from toys import ROOT, replace

from edgeke import params
from edgeke.data.dataset import load_dataset
from edgeke.data.quotas import Cuts
from edgeke.data.sources import LabelledImages, read_source
from edgeke.data.splits import SPLITS
from edgeke.download import download
from edgeke.params import Data

DIGITS = params.load(ROOT / "params.yaml").profile.data
DATA = Data("nowhere", 16, None, 200)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("digits") / "dataset"
    metrics, _, _ = download(read_source(DIGITS, DATA), DIGITS, "digits", 0, path, Cuts())
    return load_dataset(path, SPLITS), metrics


def test_digits_become_the_documented_splits(digits):
    dataset, metrics = digits
    counts = {name: len(dataset[name].labels) for name in SPLITS}
    assert counts == {"train": 900, "validation": 180, "calibration": 360, "test": 357}
    assert {k.split("/")[0]: v for k, v in metrics.items() if k.endswith("/images")} == counts
    per_class = [metrics[f"train/images_of/{digit}"] for digit in range(10)]
    assert sum(per_class) == 900
    assert min(per_class) > 80
    assert (dataset["train"].images.min(), dataset["train"].images.max()) == (0, 255)
    assert dataset.name == "digits"
    assert dataset.image_shape == (1, 16, 16)


def test_statistics_leave_the_test_split_out(digits):
    dataset, _ = digits
    for_training = np.concatenate([dataset[n].images for n in SPLITS if n != "test"]) / 255
    assert dataset.mean[0] == pytest.approx(for_training.mean(), abs=1e-9)
    assert dataset.std[0] == pytest.approx(for_training.std(), abs=1e-9)


def test_copies_across_splits_and_classes_are_counted_and_named(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 255, (400, 1, 16, 16)).astype(np.uint8)
    images[200:] = images[:200]
    labels = np.arange(400, dtype=np.int64) % 2
    source = replace(DIGITS, validation=80, calibration=80, test=80)
    labelled = LabelledImages(images, labels, ("a", "b"), 400)
    metrics, notes, _ = download(labelled, source, "copies", 0, tmp_path / "a", Cuts())
    for split in ("validation", "calibration", "test"):
        # A copy is among the 160 training images with probability 160 / 399.
        assert 10 < metrics[f"{split}/duplicates_of_train"] < 60
    assert len(notes) == 1
    assert f"{metrics['test/duplicates_of_train']} of test; remove them" in notes[0]
    images[7] = images[2]
    names = tuple(f"{label}/{n}.png" for n, label in enumerate(labels))
    labelled = replace(labelled, names=names, notes=("first",))
    _, notes, _ = download(labelled, source, "copies", 0, tmp_path / "a", Cuts())
    assert notes[0] == "first"
    assert "same pixels in more than one class: 1 (such as 0/2.png and 1/7.png)" in notes[1]

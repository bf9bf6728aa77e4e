from pathlib import Path

import numpy as np
import pytest
import yaml
from toys import ROOT, replace

from edgeke import params
from edgeke.data.dataset import load_dataset, save_dataset
from edgeke.data.sources import LabelledImages, read_source
from edgeke.data.splits import SPLITS
from edgeke.download import download
from edgeke.files import write_json
from edgeke.tracking.state import flatten
from stages.download import kept_metrics

DIGITS = params.load(ROOT / "params.yaml").profile.data


def test_digits_become_the_documented_splits(tmp_path: Path):
    dataset, metrics, _ = download(read_source(DIGITS, Path()), DIGITS, "digits", seed=0)
    counts = {name: len(dataset[name].labels) for name in SPLITS}
    assert counts == {"train": 900, "validation": 180, "calibration": 360, "test": 357}
    assert {k.split("/")[0]: v for k, v in metrics.items() if k.endswith("/images")} == counts
    per_class = [metrics[f"train/images_of/{digit}"] for digit in range(10)]
    assert sum(per_class) == 900
    assert min(per_class) > 80
    assert (dataset["train"].images.min(), dataset["train"].images.max()) == (0, 255)
    save_dataset(dataset, tmp_path / "a")
    read = load_dataset(tmp_path / "a", SPLITS)
    assert read.name == "digits"
    assert read.image_shape == (1, 16, 16)


def test_statistics_leave_the_test_split_out():
    labelled = read_source(DIGITS, Path())
    dataset, _, _ = download(labelled, DIGITS, "digits", seed=0)
    for_training = np.concatenate([dataset[n].images for n in SPLITS if n != "test"]) / 255
    assert dataset.mean[0] == pytest.approx(for_training.mean(), abs=1e-9)
    assert dataset.std[0] == pytest.approx(for_training.std(), abs=1e-9)


def test_copies_across_splits_and_classes_are_counted_and_named():
    images = np.random.default_rng(0).integers(0, 255, (400, 1, 8, 8)).astype(np.uint8)
    images[200:] = images[:200]
    labels = np.arange(400, dtype=np.int64) % 2
    source = replace(DIGITS, validation=80, calibration=80, test=80)
    labelled = LabelledImages(images, labels, ("a", "b"), 400)
    _, metrics, notes = download(labelled, source, "copies", 0)
    for split in ("validation", "calibration", "test"):
        # A copy is among the 160 training images with probability 160 / 399.
        assert 10 < metrics[f"{split}/duplicates_of_train"] < 60
    assert len(notes) == 1
    assert f"{metrics['test/duplicates_of_train']} of test; remove them" in notes[0]
    images[7] = images[2]
    names = tuple(f"{label}/{n}.png" for n, label in enumerate(labels))
    _, _, notes = download(replace(labelled, names=names, notes=("first",)), source, "copies", 0)
    assert notes[0] == "first"
    assert "same pixels in more than one class: 1 (such as 0/2.png and 1/7.png)" in notes[2]


def test_a_pulled_dataset_stays_where_its_images_were_not_pulled(
    dataset_file: Path, monkeypatch, capsys
):
    monkeypatch.chdir(dataset_file.parents[1])
    content = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"profile": "image_folder"}
    loaded = params.parse(content)
    write_json(Path("results/download/run.json"), {"params": flatten(loaded)})
    write_json(Path("results/download/metrics.json"), {"train/images": 96})
    (Path("data/source")).mkdir()
    Path("data/source/README.md").touch()
    assert kept_metrics(loaded) == {"train/images": 96}
    assert (
        "data/source holds no images, so data/dataset.safetensors stays" in capsys.readouterr().err
    )
    assert kept_metrics(params.parse(content | {"seed": 1})) is None
    Path("data/source/bolts").mkdir()
    assert kept_metrics(loaded) is None

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from toys import ROOT, replace

from edgeke import params
from edgeke.data.dataset import Dataset, load_dataset
from edgeke.data.quotas import Cuts
from edgeke.data.sources import LabelledImages, read_source
from edgeke.data.splits import SPLITS
from edgeke.download import download
from edgeke.errors import InputError
from edgeke.files import write_json
from edgeke.params import Data, Group, Source
from edgeke.tracking.state import flatten
from stages.download import kept_metrics

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


FOLDER = Source("image_folder", 16, 1, "crop", 0.1, 0.2, 0.2)


def paint(path: Path, random: np.random.Generator, size: tuple[int, int] = (16, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, size[::-1], np.uint8)).save(path)


def build(folder: Path, source: Source = FOLDER, cuts: Cuts | None = None, **changes: object):
    """The dataset, metrics, notes and cuts of a folder."""
    data = replace(DATA, path=str(folder), **changes)
    path = folder.parent / "dataset"
    labelled = read_source(source, data)
    metrics, notes, cuts = download(labelled, source, "own", 0, path, cuts or Cuts())
    return load_dataset(path, SPLITS), metrics, notes, cuts


def contents(dataset: Dataset, split: str) -> set[bytes]:
    return {image.tobytes() for image in dataset[split].images}


def test_one_more_picture_moves_no_other_whatever_the_size(tmp_path: Path):
    random = np.random.default_rng(0)
    for label in "ab":
        for i in range(100):
            paint(tmp_path / "set" / label / f"2024-{i:03}.png", random)
    first, metrics, notes, cuts = build(tmp_path / "set")
    assert notes == []
    assert [metrics[f"{name}/images_of/a"] for name in SPLITS] == [50, 10, 20, 20]
    before = {name: contents(first, name) for name in SPLITS}
    labels = {name: first[name].labels.copy() for name in SPLITS}
    smaller, *_ = build(tmp_path / "set", replace(FOLDER, image_size=8), cuts)
    assert all((smaller[name].labels == labels[name]).all() for name in SPLITS)
    paint(tmp_path / "set" / "a" / "2023-999.png", random)
    second, *_ = build(tmp_path / "set", cuts=cuts)
    assert all(before[name] <= contents(second, name) for name in SPLITS)


def test_exact_copies_count_once_and_near_copies_are_reported(tmp_path: Path):
    random = np.random.default_rng(0)
    for label in "ab":
        for i in range(20):
            small = Image.fromarray(random.integers(0, 256, (5, 5), np.uint8))
            picture = small.resize((16, 16), Image.Resampling.BICUBIC)
            (tmp_path / "set" / label).mkdir(parents=True, exist_ok=True)
            for copy in range(3):
                picture.save(tmp_path / "set" / label / f"{i:02}-{copy}.png", compress_level=copy)
            picture.save(tmp_path / "set" / label / f"{i:02}-x.jpg", quality=92)
    dataset, metrics, notes, _ = build(tmp_path / "set")
    assert sum(metrics[f"{name}/images"] for name in SPLITS) == 80
    said = "\n".join(notes)
    assert "exact copies: 80 pictures" in said
    assert re.search(r"near copies: \d\d pictures look like another one, \d+ of them", said)
    assert "names look grouped" in said
    grouped, metrics, notes, _ = build(tmp_path / "set", group=Group(pattern="(.*)-"))
    assert sum(metrics[f"{name}/groups"] for name in SPLITS) == 20  # 00 is in both classes
    parts = [set(grouped[name].groups.tolist()) for name in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 20
    assert "near copies" not in "\n".join(notes)
    assert dataset["test"].groups is None


def test_copies_in_a_given_test_split_are_taken_from_the_others(tmp_path: Path):
    random = np.random.default_rng(0)
    for part, label in itertools.product(("train", "test"), "ab"):
        for i in range(12):
            paint(tmp_path / "set" / part / label / f"{i}.png", random)
    for i in range(4):
        shutil.copy(tmp_path / f"set/test/a/{i}.png", tmp_path / f"set/train/a/copy{i}.png")
    dataset, metrics, notes, _ = build(tmp_path / "set", replace(FOLDER, test=None))
    assert "exact copies: 4 pictures" in notes[0]
    assert metrics["test/images"] == 24
    assert not contents(dataset, "test") & contents(dataset, "train")


def test_a_csv_with_its_own_test_split_keeps_it(tmp_path: Path):
    random = np.random.default_rng(0)
    rows = ["path,label,split"]
    for i in range(40):
        paint(tmp_path / "set" / "images" / f"{i}.png", random)
        rows.append(f"images/{i}.png,{('ok', 'nok')[i % 2]},{'test' if i < 6 else ''}")
    (tmp_path / "set" / "labels.csv").write_text("\n".join(rows))
    dataset, metrics, *_ = build(tmp_path / "set", replace(FOLDER, source="csv"))
    assert dataset.classes == ("nok", "ok")
    assert [metrics[f"{name}/images"] for name in SPLITS] == [22, 4, 8, 6]


def test_what_a_crop_drops_is_said(tmp_path: Path):
    random = np.random.default_rng(0)
    for label, i in itertools.product("ab", range(10)):
        paint(tmp_path / "set" / label / f"{i}.png", random, (128, 16))
    *_, notes, _ = build(tmp_path / "set")
    assert re.search(r"crop drops 88% of a typical picture \(128x16.*such as \[8, 48\]", notes[0])
    *_, notes, _ = build(tmp_path / "set", replace(FOLDER, image_size=(8, 64)))
    assert notes == []


def test_too_few_pictures_are_refused_before_one_is_decoded(tmp_path: Path):
    for label, count in (("a", 50), ("rare", 3)):
        for i in range(count):
            (tmp_path / label).mkdir(exist_ok=True)
            (tmp_path / label / f"{i}.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"rare has 3.*at least 4"):
        read_source(FOLDER, replace(DATA, path=str(tmp_path)))


def test_memory_does_not_grow_with_the_set(tmp_path: Path):
    """3,000 pictures of 96x96 in colour are 83 MB, which a map or a copy would add."""
    random = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "set" / label).mkdir(parents=True)
        for i in range(1500):
            pixels = random.integers(0, 256, (4, 4, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / label / f"{i}.png")
    code = (
        "import resource, sys; from pathlib import Path; from toys import replace\n"
        "import test_download as t\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "t.build(Path(sys.argv[1]), replace(t.FOLDER, channels=3)); before = peak()\n"
        "t.build(Path(sys.argv[1]), replace(t.FOLDER, channels=3, image_size=96))\n"
        "print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "set"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert float(done.stdout) < 40


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

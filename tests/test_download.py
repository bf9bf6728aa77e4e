from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toys import ROOT, replace

from edgeke import params
from edgeke.data.dataset import load_dataset, save_dataset
from edgeke.data.sources import LabelledImages, read_source
from edgeke.data.splits import SPLITS
from edgeke.download import download

DIGITS = params.load(ROOT / "params.yaml").profile.data
CIFAR = ROOT.parent / "shared" / "data"


def test_digits_become_the_documented_splits(tmp_path: Path):
    dataset, metrics = download(read_source(DIGITS, Path()), DIGITS, "digits", seed=0)
    counts = {name: len(dataset[name].labels) for name in SPLITS}
    assert counts == {"train": 900, "validation": 180, "calibration": 360, "test": 357}
    assert {k.split("/")[0]: v for k, v in metrics.items() if k.endswith("/images")} == counts
    per_class = [metrics[f"train/images_of/{digit}"] for digit in range(10)]
    assert sum(per_class) == 900
    assert min(per_class) > 80
    save_dataset(dataset, tmp_path / "a")
    read = load_dataset(tmp_path / "a", SPLITS)
    assert read.name == "digits"
    assert read.image_shape == (1, 16, 16)


def test_statistics_leave_the_test_split_out():
    found = read_source(DIGITS, Path())
    dataset, _ = download(found, DIGITS, "digits", seed=0)
    seen = np.concatenate([dataset[n].images for n in SPLITS if n != "test"]) / 255
    assert dataset.mean[0] == pytest.approx(seen.mean(), abs=1e-9)
    assert dataset.std[0] == pytest.approx(seen.std(), abs=1e-9)


def test_duplicates_across_splits_are_reported():
    images = np.random.default_rng(0).integers(0, 255, (400, 1, 8, 8)).astype(np.uint8)
    images[200:] = images[:200]
    labels = np.arange(400, dtype=np.int64) % 2
    source = replace(DIGITS, validation=80, calibration=80, test=80)
    _, metrics = download(LabelledImages(images, labels, ("a", "b"), 400), source, "twins", 0)
    for split in ("validation", "calibration", "test"):
        # A partner stands among the 160 training images with probability 160 / 399.
        assert 10 < metrics[f"{split}/duplicates_of_train"] < 60


@pytest.mark.skipif(not CIFAR.is_dir(), reason="needs ../shared/data, which is not here")
def test_cifar100_strips_as_an_image_folder(tmp_path: Path):
    """A slice of the real CIFAR-100: four classes, as PNG files in train/ and test/."""
    for part in ("train", "test"):
        for strip in sorted((CIFAR / "cifar100" / part).glob("*.webp"))[:4]:
            folder = tmp_path / part / strip.stem
            folder.mkdir(parents=True)
            pixels = np.asarray(Image.open(strip).convert("RGB")).reshape(-1, 32, 32, 3)
            for number, image in enumerate(pixels[:60]):
                Image.fromarray(image).save(folder / f"{number:03d}.png")
    source = replace(
        params.load(ROOT / "params.yaml").profile.data,
        source="image_folder",
        image_size=32,
        channels=3,
        fit="exact",
        validation=20,
        calibration=0.1,
        test=None,
    )
    dataset, metrics = download(read_source(source, tmp_path), source, "cifar", seed=0)
    assert metrics["test/images"] == 240
    assert metrics["train/images"] == 240 - 20 - 48
    assert dataset.image_shape == (3, 32, 32)

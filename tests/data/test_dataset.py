import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save

from edgeke.data.dataset import Dataset, channel_statistics, load_dataset
from edgeke.errors import InputError


def test_round_trip_reads_only_what_is_named(dataset: Dataset, dataset_file: Path):
    read = load_dataset(dataset_file, ("train",))
    assert set(read.splits) == {"train"}
    assert (read["train"].images == dataset["train"].images).all()
    assert (read["train"].labels == dataset["train"].labels).all()
    assert (read.mean, read.std, read.classes) == (dataset.mean, dataset.std, dataset.classes)
    assert len(read.sha256) == 64


def test_the_file_is_what_safetensors_writes(dataset_file: Path):
    with safe_open(dataset_file, framework="np") as file:
        metadata = file.metadata()
    assert dataset_file.read_bytes() == save(load_file(dataset_file), metadata)


def test_images_stay_in_the_file_until_they_are_used(dataset_file: Path):
    images = load_dataset(dataset_file, ("validation",))["validation"].images
    assert not images.flags.writeable
    with dataset_file.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([images[-1, -1, -1, -1] ^ 255]))
    assert images[-1, -1, -1, -1] == dataset_file.read_bytes()[-1]


def test_statistics_are_those_of_a_direct_computation():
    images = np.random.default_rng(0).integers(0, 256, (50, 3, 8, 8)).astype(np.uint8)
    mean, std = channel_statistics(images)
    scaled = images / 255
    assert np.allclose(mean, scaled.mean(axis=(0, 2, 3)), atol=1e-12)
    assert np.allclose(std, scaled.std(axis=(0, 2, 3)), atol=1e-12)
    with pytest.raises(InputError, match="channel 0 has the same value"):
        channel_statistics(np.full((5, 1, 8, 8), 7, np.uint8))


@pytest.mark.parametrize("damage", ["cut", "foreign", "empty"])
def test_a_damaged_file_is_refused(dataset_file: Path, damage: str):
    content = dataset_file.read_bytes()
    damaged = {"cut": content[:-100], "foreign": b"PK" + content[2:], "empty": b""}[damage]
    dataset_file.write_bytes(damaged)
    with pytest.raises(InputError, match=r"truncated or not a dataset.*dvc repro download"):
        load_dataset(dataset_file, ("train",))


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="missing"):
        load_dataset(tmp_path / "dataset.safetensors", ("train",))

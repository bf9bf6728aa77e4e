"""Fixtures: a toy dataset, a short recipe, the paper's layout on the smallest backbone."""

from pathlib import Path

import pytest
from toys import CLASSES, SIZE, make_split, randomise

from edgeke.data.dataset import Dataset, channel_statistics, save_dataset
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Recipe


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    splits = {
        name: make_split(count, seed)
        for seed, (name, count) in enumerate(
            {"train": 96, "validation": 60, "calibration": 90, "test": 45}.items()
        )
    }
    mean, std = channel_statistics(splits["train"].images)
    return Dataset("toy", CLASSES, (1, SIZE, SIZE), mean, std, "toy", 0, "", splits)


@pytest.fixture
def dataset_file(dataset: Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "data" / "dataset.safetensors"
    save_dataset(dataset, path)
    return path


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return Recipe(
        epochs=2,
        batch_size=16,
        learning_rate=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        warmup=0.3,
        crop_padding=1,
        flip=False,
    )


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    """The paper's layout on the smallest backbone."""
    return Architecture.with_layout("edgeke", "resnet10", 4, 1, len(CLASSES))


@pytest.fixture
def network(architecture: Architecture) -> BranchyNet:
    """Random weights and batch-norm statistics, in evaluation mode."""
    return randomise(BranchyNet(architecture))

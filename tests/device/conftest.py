"""Bundles of a toy network, one per score, built as the pipeline builds them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundles import build
from toys import SIZE, randomise

from edgeke.data.dataset import channels_last
from edgeke.device.classifier import Classifier
from edgeke.graph.quantise import quantise_segments
from edgeke.graph.segments import export_segments, list_blocks
from edgeke.networks.branchynet import BranchyNet


@pytest.fixture(scope="session")
def bundles(architecture, dataset, tmp_path_factory) -> dict[str, Path]:
    """Folders by score: the one file and the segments; and `int8`, which is that.

    Tests must not change them.
    """
    root = tmp_path_factory.mktemp("bundles")
    torch.manual_seed(0)
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    coarse = quantise_segments(segments, channels_last(dataset["train"].images))
    blocks = list_blocks(network, SIZE)
    folders = {}
    for score in ("max_probability", "margin", "entropy", "learned"):
        folders[score] = build(root / score, segments, score, "", dataset, blocks)
    folders["int8"] = build(root / "int8", coarse, "margin", ".int8", dataset, blocks)
    return folders


@pytest.fixture
def bundle(bundles, tmp_path) -> Path:
    """A bundle of its own, to measure beside and to break."""
    return Path(shutil.copytree(bundles["margin"], tmp_path / "bundle"))


@pytest.fixture
def classifier(bundle) -> Classifier:
    return Classifier(bundle)


@pytest.fixture(scope="session")
def images(dataset) -> np.ndarray:
    """Images as a device gets them: uint8 `[N, H, W, C]`."""
    return channels_last(dataset["test"].images)

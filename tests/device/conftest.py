"""Bundles of a toy network, one per score, built as the pipeline builds them."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from toys import CLASSES, SIZE, randomise

from edgeke.calibrate import Answers, compose, freeze
from edgeke.device.classifier import Classifier
from edgeke.graph.manifest import Manifest
from edgeke.graph.runner import channels_last, segment_logits
from edgeke.graph.segments import export_segments
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Calibrate
from edgeke.policy.certify import certify

MACS, MAIN = (60, 80, 110), 90


@pytest.fixture(scope="session")
def bundles(architecture, dataset, tmp_path_factory) -> dict[str, Path]:
    """Folders by score: the one file, policy.json and the segments. Tests must not change them."""
    root = tmp_path_factory.mktemp("bundles")
    shared = root / "segments" / "fp32"
    shared.mkdir(parents=True)
    network = randomise(BranchyNet(architecture))
    names = []
    for number, model in enumerate(export_segments(network, dataset.mean, dataset.std, SIZE)):
        names.append(f"{number}.onnx")
        onnx.save(model, shared / names[-1])
    Manifest(tuple(names), MACS, MAIN, CLASSES, (SIZE, SIZE, 1)).write(shared)
    files = [shared / name for name in names]
    seen, held = (
        Answers(segment_logits(files, channels_last(dataset[name].images), 1), dataset[name].labels)
        for name in ("validation", "calibration")
    )
    folders = {}
    for score in ("max_probability", "margin", "entropy", "learned"):
        folders[score] = folder = root / score
        settings = Calibrate(score, (0.5, 0.5, 0.9), 0.05, 0.1, ())
        frozen, _ = freeze(seen, MACS, MAIN, settings)
        policy = certify(frozen, held.logits, held.labels, 0.1, ())
        shutil.copytree(root / "segments", folder / "segments")
        (folder / "edgeke.onnx").write_bytes(compose(files, policy, CLASSES, (SIZE, SIZE, 1)))
        (folder / "policy.json").write_text(json.dumps(policy.to_json()))
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

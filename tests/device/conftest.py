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
from edgeke.graph.quantise import quantise_segments
from edgeke.graph.runner import channels_last, segment_logits
from edgeke.graph.segments import export_segments
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Calibrate
from edgeke.policy.certify import certify

MACS, MAIN = (60, 80, 110), 90


@pytest.fixture(scope="session")
def bundles(architecture, dataset, tmp_path_factory) -> dict[str, Path]:
    """Folders by score: the one file, policy.json and the segments; and `int8`, which is that.

    Tests must not change them.
    """
    root = tmp_path_factory.mktemp("bundles")
    network = randomise(BranchyNet(architecture))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    coarse = quantise_segments(segments, channels_last(dataset["train"].images))
    folders = {}
    for score in ("max_probability", "margin", "entropy", "learned"):
        folders[score] = _build(root / score, segments, score, "", dataset)
    folders["int8"] = _build(root / "int8", coarse, "margin", ".int8", dataset)
    return folders


def _build(folder, segments, score, suffix, dataset) -> Path:
    place = folder / "segments" / (suffix[1:] or "fp32")
    place.mkdir(parents=True)
    files = [place / f"{number}.onnx" for number in range(len(segments))]
    for model, file in zip(segments, files, strict=True):
        onnx.save(model, file)
    names = tuple(file.name for file in files)
    Manifest(names, MACS, MAIN, CLASSES, (SIZE, SIZE, 1)).write(place)
    seen, held = (
        Answers(segment_logits(files, channels_last(dataset[name].images), 1), dataset[name].labels)
        for name in ("validation", "calibration")
    )
    settings = Calibrate(score, (0.5, 0.5, 0.9), 0.05, 0.1, ())
    frozen, _ = freeze(seen, MACS, MAIN, settings)
    policy = certify(frozen, held.logits, held.labels, 0.1, ())
    model = compose(files, policy, CLASSES, (SIZE, SIZE, 1))
    (folder / f"edgeke{suffix}.onnx").write_bytes(model)
    (folder / f"policy{suffix}.json").write_text(json.dumps(policy.to_json()))
    return folder


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

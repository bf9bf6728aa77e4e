import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from toys import CLASSES, SIZE, randomise, replace

from edgeke.data.augment import Normalise
from edgeke.device.manifest import read_manifest
from edgeke.errors import InputError
from edgeke.export import export
from edgeke.learning.checkpoints import Preprocessing
from edgeke.learning.images import predict
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Export

SETTINGS = Export(
    parity_images=50, parity_tolerance=1e-4, quantisation_images=40, int8_tolerance=0.2
)


@pytest.fixture
def teacher() -> BranchyNet:
    return randomise(BranchyNet(Architecture.single("resnet10", 8, 1, 3)), seed=1)


def test_everything_is_written_and_equal_to_pytorch(network, teacher, dataset, tmp_path: Path):
    metrics = export(
        network,
        teacher,
        Preprocessing.of(dataset),
        dataset["train"],
        SETTINGS,
        tmp_path,
    )
    manifest = read_manifest(tmp_path / "segments" / "fp32")
    assert manifest.classes == CLASSES
    assert manifest.image_shape == (SIZE, SIZE, 1)
    assert [metrics[f"cost/exit_{e}/macs"] for e in range(3)] == list(manifest.macs)
    assert metrics["cost/main/macs"] == manifest.main_macs
    for name in manifest.segments:
        for precision in ("fp32", "int8"):
            assert (tmp_path / "segments" / precision / name).is_file()
    assert read_manifest(tmp_path / "segments" / "int8") == manifest
    for name in ("teacher", "main", "teacher.int8", "main.int8"):
        assert (tmp_path / "static" / f"{name}.onnx").is_file()
    for name in ("exit_0", "exit_1", "exit_2", "teacher", "main"):
        assert 0 <= metrics[f"train/{name}/parity_difference"] < 1e-4
        assert metrics[f"train/{name}/int8_accuracy_lost"] <= 0.2


def test_a_graph_that_is_off_fails_and_writes_nothing(
    network, teacher, dataset, tmp_path: Path, monkeypatch
):
    from edgeke.graph import segments

    original = segments._Segment.forward

    def wrong(self, features: torch.Tensor):
        return original(self, features * 1.5)

    monkeypatch.setattr(segments._Segment, "forward", wrong)
    with pytest.raises(InputError, match=r"exit_0 in ONNX is off by .*export\.parity_tolerance"):
        export(
            network,
            teacher,
            Preprocessing.of(dataset),
            dataset["train"],
            SETTINGS,
            tmp_path,
        )
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_manifest_is_refused(tmp_path: Path):
    (tmp_path / "segments.json").write_text('{"segments": []}')
    with pytest.raises(InputError, match="cannot be read"):
        read_manifest(tmp_path)


def test_int8_that_loses_more_than_chance_fails(
    network, teacher, dataset, tmp_path: Path, monkeypatch
):
    from edgeke import export as module

    def broken(model, inputs):
        """A quantiser whose networks all answer class 0."""
        changed = copy.deepcopy(model)
        for tensor in changed.graph.initializer:
            if list(tensor.dims) == [len(CLASSES)]:  # the bias of the logits
                bias = np.array([100, 0, 0], np.float32)
                tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
        return changed

    monkeypatch.setattr(module, "quantise", broken)
    normalise = Normalise(dataset.mean, dataset.std, torch.device("cpu"))
    images = torch.from_numpy(dataset["train"].images)
    labels = predict(network, images, normalise)[-1].argmax(-1)
    known = replace(dataset["train"], labels=np.asarray(labels))
    settings = replace(SETTINGS, int8_tolerance=0.01)
    with pytest.raises(InputError, match=r"int8 answers .* export\.int8_tolerance = 0\.01 allows"):
        export(network, teacher, Preprocessing.of(dataset), known, settings, tmp_path)
    assert not list(tmp_path.iterdir())

import copy
import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper
from toys import CLASSES, SIZE, randomise, replace

from edgeke import export as module
from edgeke import files
from edgeke.data.augment import Normalise
from edgeke.data.dataset import channels_last
from edgeke.device.manifest import read_manifest
from edgeke.errors import InputError
from edgeke.export import export, left_out
from edgeke.graph import segments
from edgeke.graph.runner import segment_logits
from edgeke.learning.checkpoints import Preprocessing
from edgeke.learning.predict import predict
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.networks.layouts import single_exit
from edgeke.params import Export

SETTINGS = Export(
    parity_images=50,
    parity_tolerance=1e-4,
    quantisation_images=40,
    int8_tolerance=0.2,
    weight_bits=7,
    exits="all",
)


@pytest.fixture
def static(network) -> dict[str, BranchyNet]:
    """Networks without early exits: teacher, main exit, plain main network, a branch alone."""
    teacher = randomise(BranchyNet(single_exit(Backbone("resnet10", 1, 3, SIZE, 8))), seed=1)
    plain = randomise(network.branch(-1), seed=2)
    return {
        "teacher": teacher, "main": network.branch(-1), "plain": plain,
        "branch_0": network.branch(0),
    }  # fmt: skip


def run(network, static, dataset, folder, settings=SETTINGS, validation=None):
    validation = validation or dataset["validation"]
    own = Preprocessing.of(dataset)
    static = {name: (alone, own) for name, alone in static.items()}
    return export(network, static, own, dataset["train"], validation, settings, folder)


def test_everything_is_written_and_equal_to_pytorch(network, static, dataset, tmp_path: Path):
    metrics = run(network, static, dataset, tmp_path)
    manifest = read_manifest(tmp_path / "segments" / "fp32")
    assert read_manifest(tmp_path / "segments" / "int8") == manifest
    assert (manifest.classes, manifest.image_shape) == (CLASSES, (SIZE, SIZE, 1))
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.onnx")}
    assert written == {
        *(f"segments/{precision}/{e}.onnx" for precision in ("fp32", "int8") for e in range(3)),
        *(f"static/{name}{suffix}.onnx" for name in static for suffix in ("", ".int8")),
    }
    exits = [metrics[f"cost/exit_{e}/macs"] for e in range(3)]
    assert exits == list(manifest.macs)
    assert metrics["cost/main/macs"] == manifest.main_macs == metrics["cost/plain/macs"]
    assert metrics["cost/branch_0/macs"] == exit_costs(static["branch_0"], SIZE)[0].macs
    assert metrics["cost/branch_0/macs_share"] == exits[0] / manifest.main_macs
    for name in ("exit_0", "exit_1", "exit_2", *static):
        assert 0 <= metrics[f"train/{name}/parity_difference"] < 1e-4
        assert metrics[f"validation/{name}/int8_accuracy_lost"] <= 0.2
        assert f"validation/{name}/int8_accuracy_lost_before_refit" in metrics


@pytest.mark.parametrize("best", [0, 1, 2])
def test_exits_behind_the_best_on_validation_are_not_shipped(
    network, static, dataset, tmp_path: Path, best
):
    """Labels are what exit `best` answers, so that it is right everywhere; two exits are left."""
    split = dataset["validation"]
    own = Preprocessing.of(dataset)
    normalise = Normalise(own.mean, own.std, torch.device("cpu"))
    logits = predict(network, torch.tensor(split.images), normalise)
    labels = logits[best].argmax(-1).numpy()
    settings = replace(SETTINGS, exits="useful")
    metrics = run(network, static, dataset, tmp_path, settings, replace(split, labels=labels))
    shipped = max(best + 1, 2)
    whole = exit_costs(network, SIZE)
    for precision in ("fp32", "int8"):
        manifest = read_manifest(tmp_path / "segments" / precision)
        assert len(manifest.segments) == shipped
        assert list(manifest.macs) == [cost.macs for cost in whole[:shipped]]
        assert manifest.main_macs == metrics["cost/main/macs"]
        files = [tmp_path / "segments" / precision / name for name in manifest.segments]
        answers = segment_logits(files, channels_last(split.images), 1)
        if precision == "fp32":
            assert np.abs(answers - logits[:shipped].numpy()).max() < 1e-3
    assert metrics["validation/exits_left_out"] == 3 - shipped
    line = left_out(metrics)
    if shipped == 3:
        assert line is None
        return
    accuracy = 100 * float((logits[2].argmax(-1).numpy() == labels).mean())
    assert f"exit {best} has 100.0 % right" in line
    assert f"exit 2 has {accuracy:.1f} % right" in line
    assert "export.exits=all" in line


def test_a_graph_that_is_off_fails_and_writes_nothing(
    network, static, dataset, tmp_path: Path, monkeypatch
):
    original = segments._Segment.forward

    def wrong(self, features: torch.Tensor):
        return original(self, features * 1.5)

    monkeypatch.setattr(segments._Segment, "forward", wrong)
    with pytest.raises(InputError, match=r"exit_0 in ONNX is off by .*export\.parity_tolerance"):
        run(network, static, dataset, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_older_export(network, static, dataset, tmp_path, monkeypatch):
    """No file is replaced before all are written."""
    old = tmp_path / "segments" / "fp32" / "0.onnx"
    files.write_bytes(old, b"old")
    synced = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(InputError, match=r"no space left while writing .*static.*not changed"):
        run(network, static, dataset, tmp_path)
    assert old.read_bytes() == b"old"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [old]


def test_int8_that_loses_more_than_chance_fails(
    network, static, dataset, tmp_path: Path, monkeypatch
):
    def broken(models, exact, images):
        """Heads that all answer class 0."""
        changed = copy.deepcopy(models)
        for model in changed:
            for tensor in model.graph.initializer:
                if list(tensor.dims) == [len(CLASSES)]:  # the bias of the logits
                    bias = np.array([1e4, 0, 0], np.float32)
                    tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))
        return changed

    monkeypatch.setattr(module, "refit_heads", broken)
    normalise = Normalise(dataset.mean, dataset.std, torch.device("cpu"))
    images = torch.from_numpy(dataset["validation"].images)
    labels = predict(network, images, normalise)[-1].argmax(-1)
    known = replace(dataset["validation"], labels=np.asarray(labels))
    settings = replace(SETTINGS, int8_tolerance=0.01)
    with pytest.raises(
        InputError, match=r"exit_\d answers .* export\.int8_tolerance = 0\.01 allows"
    ):
        run(network, {"main": static["main"]}, dataset, tmp_path, settings, known)
    assert not list(tmp_path.iterdir())


def test_equal_networks_are_converted_once(network, static, dataset, tmp_path: Path, monkeypatch):
    calls = []
    original = module.quantise_segments

    def count(segments, *arguments, **options):
        calls.append(len(segments))
        return original(segments, *arguments, **options)

    monkeypatch.setattr(module, "quantise_segments", count)
    metrics = run(network, {"main": static["main"], "plain": static["main"]}, dataset, tmp_path)
    assert calls == [3, 1]
    key = "int8_accuracy_lost_before_refit"
    assert metrics[f"validation/plain/{key}"] == metrics[f"validation/main/{key}"]
    plain, main = (tmp_path / "static" / f"{name}.int8.onnx" for name in ("plain", "main"))
    assert plain.read_bytes() == main.read_bytes()

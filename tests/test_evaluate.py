import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from toys import CLASSES, SIZE, replace

from edgeke.calibrate import Answers, compose, freeze
from edgeke.device.policy import Answer
from edgeke.device.scores import Score, calibrated_probabilities
from edgeke.errors import InputError
from edgeke.evaluate import evaluate, kept
from edgeke.graph.runner import channels_last, segment_logits
from edgeke.graph.segments import export_segments, export_static
from edgeke.params import Calibrate, Evaluate
from edgeke.policy.cascade import run_cascade
from edgeke.policy.certify import certify
from edgeke.requirement import Requirement

MACS, MAIN = (60, 80, 110), 90
SETTINGS = Evaluate(threads=1, latency_images=12)


@pytest.fixture
def built(network, dataset, tmp_path: Path):
    files = []
    for number, model in enumerate(export_segments(network, dataset.mean, dataset.std, SIZE)):
        files.append(tmp_path / f"{number}.onnx")
        onnx.save(model, files[-1])
    static = {}
    for name in ("main", "teacher"):
        static[name] = tmp_path / f"{name}.onnx"
        onnx.save(export_static(network, dataset.mean, dataset.std, SIZE), static[name])
    answers = {
        name: Answers(segment_logits(files, channels_last(split.images), 1), split.labels)
        for name, split in dataset.splits.items()
    }
    calibration, asked = answers["calibration"], Requirement(None, None, 0.6, None)
    settings = Calibrate("learned", (0.5, 0.5, 0.9), 0.05, 0.1, (asked,))
    frozen, _ = freeze(answers["validation"], MACS, MAIN, settings)
    policy = certify(frozen, calibration.logits, calibration.labels, 0.1, settings.requirements)
    model = tmp_path / "edgeke.onnx"
    model.write_bytes(compose(files, policy, CLASSES, (SIZE, SIZE, 1)))
    return model, static, policy, answers["test"]


def test_accuracy_comes_from_the_file_and_everything_is_measured(built, dataset):
    model, static, policy, answers = built
    evaluation = evaluate(model, static, {"main": MAIN, "teacher": 200}, dataset["test"], SETTINGS)
    assert evaluation.policy == policy
    metrics = evaluation.metrics
    probabilities = calibrated_probabilities(answers.logits, policy.temperatures)
    scores = Score(policy.score, policy.score_weights).of(probabilities)
    assert {"full", "proportions", "default", "max_loss_0.6"} == set(policy.named)
    for label, point in policy.named.items():
        expected = run_cascade(probabilities, scores, point.thresholds, point.votes)
        assert metrics[f"test/{label}/accuracy"] == pytest.approx(
            expected.accuracy(dataset["test"].labels)
        )
        paid = [metrics[f"test/{label}/share_{e}"] for e in range(3)]
        assert paid == pytest.approx(expected.shares(3))
        cost = np.dot(paid, MACS) / MAIN
        assert metrics[f"test/{label}/cost_share"] == pytest.approx(cost)
    assert metrics["test/max_loss_0.6/kept"] == float(metrics["test/max_loss_0.6/loss"] <= 0.6)
    for name in ("exit_0", "exit_1", "exit_2", "main", "teacher", "full"):
        fastest, median, slow = (
            metrics[f"test/{name}/latency_ms_{key}"] for key in ("min", "median", "p95")
        )
        assert 0 < fastest <= median <= slow
    for name in ("edgeke", "main", "teacher"):
        assert metrics[f"test/{name}/peak_memory_mib"] > 10
        assert metrics[f"test/{name}/file_mib"] > 0.001
    assert metrics["test/main/accuracy"] == metrics["test/exit_2/accuracy"]
    assert {row["kind"] for row in evaluation.frontier} == {
        "operating point",
        "frontier",
        "exit",
        "static network",
    }
    calibrated = {
        f"{split}/{name}/{what}": 0.5
        for split in ("validation", "calibration")
        for name in ("exit_0", "exit_1", "exit_2", "default")
        for what in ("accuracy", "cost_share")
    }
    headline = evaluation.headline(calibrated)
    assert headline["test/default/accuracy"] == metrics["test/default/accuracy"]


def test_kept_compares_each_requirement_with_its_own_number(built):
    _, _, policy, _ = built
    asked = [
        Answer("max_cost_0.9", "max_cost", 0.9, 0.1, "full", None),
        Answer("min_accuracy_0.9", "min_accuracy", 0.9, 0.1, "full", None),
        Answer("max_loss_0.1", "max_loss", 0.1, 0.1, None, 0.2),
    ]
    metrics = {"test/max_cost_0.9/cost_share": 0.95, "test/min_accuracy_0.9/accuracy": 0.95}
    assert kept(replace(policy, requirements=tuple(asked)), metrics) == {
        "test/max_cost_0.9/kept": 0,
        "test/min_accuracy_0.9/kept": 1,
    }


def test_a_broken_file_is_reported_in_the_devices_words(built, dataset):
    model, static, _, _ = built
    model.write_bytes(model.read_bytes()[:200])
    with pytest.raises(InputError, match=r"device process failed: error: .*truncated"):
        evaluate(model, static, {"main": 1, "teacher": 1}, dataset["test"], SETTINGS)


def test_a_file_without_a_policy_is_refused(built, dataset):
    _, static, _, _ = built
    with pytest.raises(InputError, match="not an EdgeKE policy"):
        evaluate(static["main"], static, {"main": 1, "teacher": 1}, dataset["test"], SETTINGS)


def test_memory_of_one_model_is_measured_alone(built):
    model, _, _, _ = built
    done = subprocess.run(
        [sys.executable, "-m", "edgeke.device.measure", "--memory", str(model), "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 20 < float(done.stdout) < 300

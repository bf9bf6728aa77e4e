import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from toys import CLASSES, SIZE, replace

from edgeke import calibrate
from edgeke.calibrate import (
    Answers,
    check_composed,
    compose,
    exit_quality,
    freeze,
    point_metrics,
    vote_quality,
)
from edgeke.data.dataset import channels_last
from edgeke.device.manifest import Manifest
from edgeke.device.policy import parse_policy
from edgeke.device.session import open_session
from edgeke.errors import InputError
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments
from edgeke.params import Calibrate, Proportions, Requirement
from edgeke.policy.certify import certify

ASKED = tuple(
    Requirement(
        **{**dict.fromkeys(("max_cost", "min_accuracy", "max_degradation", "delta")), **asked}
    )
    for asked in ({"max_degradation": 0.05}, {"min_accuracy": 0.99}, {"max_cost": 1.0})
)
SETTINGS = Calibrate("max_probability", Proportions((0.5, 0.5, 0.9)), 0.05, 0.1, ASKED)
MACS, MAIN = (60, 80, 110), 90
MANIFEST = Manifest(("0.onnx", "1.onnx", "2.onnx"), MACS, MAIN, CLASSES, (SIZE, SIZE, 1), bits=12)


def drawn(seed: int, samples: int) -> Answers:
    """Three exits of rising quality; overconfident, so that temperatures matter."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 4, samples)
    hardness = random.normal(0, 1, samples)
    exits = []
    for strength in (1.5, 2.0, 3.0):
        logits = random.normal(0, 1, (samples, 4))
        logits[np.arange(samples), labels] += strength - hardness
        exits.append(6 * logits)
    return Answers(np.array(exits, np.float32), labels)


def fit(validation: Answers, calibration: Answers, settings: Calibrate = SETTINGS):
    frozen, _ = freeze(validation, MACS, MAIN, settings)
    return certify(frozen, calibration.logits, calibration.labels, 0.1, settings.requirements)


def test_named_points_and_requirements_are_reported():
    validation = drawn(0, 500)
    policy = fit(validation, drawn(1, 800))
    metrics = point_metrics(policy, validation)
    assert list(policy.named) == [
        "full",
        "proportions",
        "default",
        "max_degradation_0.05",
        "max_cost_1",
    ]
    for label, point in policy.named.items():
        assert metrics[f"calibration/{label}/accuracy"] == point.accuracy
        expected = metrics[f"calibration/{label}/cost_share"]
        assert metrics[f"calibration/{label}/promised_cost_share"] >= expected - 1e-12
    assert metrics["validation/full/cost_share"] == pytest.approx(110 / 90)
    assert metrics["calibration/max_degradation_0.05/met"] == 1
    assert (
        metrics["calibration/max_degradation_0.05/degradation"]
        < metrics["calibration/max_degradation_0.05/promised"]
    )
    assert metrics["calibration/max_degradation_0.05/promised"] <= 0.05
    assert metrics["calibration/max_cost_1/promised"] <= 1
    assert metrics["calibration/min_accuracy_0.99/met"] == 0
    assert 0.5 < metrics["calibration/min_accuracy_0.99/nearest"] < 0.99
    assert "calibration/min_accuracy_0.99/promised" not in metrics


def test_the_default_answers_the_first_requirement_that_can_be_met():
    policy = fit(drawn(0, 500), drawn(1, 800))
    assert policy.default == policy.named["max_degradation_0.05"].name
    costs = policy.cost_shares
    assert policy.point(policy.default).expected_cost(costs) < costs[-1]


def test_the_asked_proportions_leave():
    policy = fit(drawn(0, 500), drawn(0, 500))
    point = policy.point("proportions")
    assert point.shares == pytest.approx((0.5, 0.25, 0.25), abs=0.01)
    assert point.voted == pytest.approx(0.025, abs=0.005)


def test_calibration_fits_nothing():
    """Other calibration images change what is promised, and nothing that is fitted."""
    one, two = (fit(drawn(0, 500), drawn(seed, 300 * seed)) for seed in (1, 2))
    assert (one.score, one.temperatures) == (two.score, two.temperatures)
    fitted = [{p.name: (p.thresholds, p.votes, p.validation_accuracy) for p in of.points}
              for of in (one, two)]  # fmt: skip
    assert fitted[0] == fitted[1]
    assert one.samples != two.samples


def test_the_score_is_the_asked_one_or_the_best():
    validation = drawn(0, 300)
    for name in ("margin", "learned"):
        frozen, _ = freeze(validation, MACS, MAIN, replace(SETTINGS, score=name))
        assert frozen.tuning.score.name == name
    frozen, metrics = freeze(validation, MACS, MAIN, replace(SETTINGS, score="best"))
    mean = {
        name: sum(metrics[f"validation/score/{name}/exit_{e}/aurc"] for e in (0, 1))
        for name in ("max_probability", "margin", "entropy", "learned")
    }
    assert frozen.tuning.score.name == min(mean, key=lambda name: mean[name])


def test_votes_are_compared():
    quality = vote_quality(drawn(0, 2000))
    losses = {
        name: quality[f"validation/vote/{name}/negative_log_likelihood"]
        for name in ("fitted", "fixed", "none")
    }
    assert losses["fitted"] < losses["fixed"]
    assert losses["fitted"] < losses["none"] + 0.005
    assert all(0 < quality[f"validation/vote/{name}/accuracy"] < 1 for name in losses)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": np.full((3, 9, 4), np.nan, np.float32)}, "not finite"),
        ({"logits": np.zeros((1, 9, 4), np.float32)}, "at least two"),
        ({"labels": np.full(9, 4)}, "label 4 is not one of the 4 classes"),
    ],
)
def test_bad_logits_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        freeze(replace(drawn(0, 9), **change), MACS, MAIN, SETTINGS)


def test_temperatures_mend_overconfidence():
    answers = drawn(0, 2000)
    policy = fit(answers, drawn(1, 2000))
    quality = exit_quality(drawn(1, 2000), policy.temperatures, "calibration")
    for e in range(3):
        before = quality[f"calibration/exit_{e}/ece_uncalibrated"]
        assert quality[f"calibration/exit_{e}/ece"] < before / 2


@pytest.fixture(params=["max_probability", "margin", "entropy", "learned"])
def built(network, dataset, tmp_path: Path, request):
    """Real segments, their answers, a fitted policy and the composed file."""
    files = []
    for number, model in enumerate(export_segments(network, dataset.mean, dataset.std, SIZE)):
        files.append(tmp_path / f"{number}.onnx")
        onnx.save(model, files[-1])
    answers = [
        Answers(segment_logits(files, channels_last(dataset[name].images), 1), dataset[name].labels)
        for name in ("validation", "calibration")
    ]
    policy = fit(answers[0], answers[1], replace(SETTINGS, score=request.param))
    model = compose(files, policy, MANIFEST)
    return model, policy, answers[0], files


def test_the_one_file_carries_what_a_device_must_know(built):
    model, policy, _, _ = built
    carried = open_session(model).get_modelmeta().custom_metadata_map
    assert parse_policy(carried["policy"]) == policy
    assert json.loads(carried["classes"]) == list(CLASSES)
    assert json.loads(carried["image_shape"]) == [SIZE, SIZE, 1]
    assert json.loads(carried["bits"]) == 12


def test_the_one_file_equals_the_cascade(built, dataset):
    model, policy, answers, _ = built
    metrics = check_composed(model, policy, answers, dataset["validation"])
    assert metrics["validation/composed/parity_difference"] < 1e-5
    assert metrics["validation/composed/ties"] <= 2  # scores nearer than 1e-5 to a threshold


def test_a_file_of_another_policy_fails_the_stage(built, dataset):
    _, policy, answers, files = built
    hotter = replace(policy, temperatures=tuple(3 * t for t in policy.temperatures))
    model = compose(files, hotter, MANIFEST)
    with pytest.raises(InputError, match="the composed file"):
        check_composed(model, policy, answers, dataset["validation"])


def test_reliability_rows_cover_every_exit(built):
    _, policy, answers, _ = built
    rows = calibrate.reliability_rows(answers, policy.temperatures)
    assert {row["exit"] for row in rows} == {"exit 0", "exit 1", "exit 2"}
    assert sum(row["count"] for row in rows) == 3 * len(answers.labels)

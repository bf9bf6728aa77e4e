import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from toys import CLASSES, SIZE, replace

from edgeke import calibrate
from edgeke.calibrate import Answers, check_composed, compose, exit_quality, fit_policy
from edgeke.device.policy import parse_policy
from edgeke.device.session import open_session
from edgeke.errors import InputError
from edgeke.graph.runner import channels_last, segment_logits
from edgeke.graph.segments import export_segments
from edgeke.params import Calibrate

SETTINGS = Calibrate("max_probability", (0.5, 0.5, 0.9), 6)
MACS, MAIN = (60, 80, 110), 90


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


def test_points_are_ordered_and_reported_on_calibration():
    policy, metrics = fit_policy(drawn(0, 500), drawn(1, 800), MACS, MAIN, SETTINGS)
    names = [point.name for point in policy.points]
    assert names[0] == "full"
    assert "proportions" in names
    assert sum(name.startswith("frontier_") for name in names) >= 3
    costs = [metrics[f"validation/{name}/cost_share"] for name in names]
    assert all(b <= a for a, b in itertools.pairwise(costs))
    for point in policy.points:
        low, high = point.accuracy_interval
        assert low <= point.accuracy <= high
        assert point.accuracy == metrics[f"calibration/{point.name}/accuracy"]
        assert sum(point.shares) == pytest.approx(1)
        assert point.accuracy_samples == 800
    assert policy.points[0].shares == (0, 0, 1)
    assert metrics["validation/full/cost_share"] == pytest.approx(110 / 90)


def test_the_default_is_the_cheapest_no_worse_than_the_full_network():
    policy, metrics = fit_policy(drawn(0, 500), drawn(1, 800), MACS, MAIN, SETTINGS)
    full = metrics["validation/full/accuracy"]
    enough = [p for p in policy.points if metrics[f"validation/{p.name}/accuracy"] >= full]
    cheapest = min(enough, key=lambda p: metrics[f"validation/{p.name}/cost_share"])
    assert policy.default == cheapest.name
    assert metrics[f"validation/{policy.default}/cost_share"] < 110 / 90


def test_the_asked_proportions_leave():
    policy, _ = fit_policy(drawn(0, 500), drawn(0, 500), MACS, MAIN, SETTINGS)
    point = policy.point("proportions")
    assert point.shares == pytest.approx((0.5, 0.25, 0.25), abs=0.01)
    assert point.voted == pytest.approx(0.025, abs=0.005)


def test_calibration_fits_nothing():
    """Other calibration images change what is reported, and nothing that is chosen."""
    validation = drawn(0, 500)
    one, _ = fit_policy(validation, drawn(1, 800), MACS, MAIN, SETTINGS)
    two, _ = fit_policy(validation, drawn(2, 300), MACS, MAIN, SETTINGS)
    assert one.temperatures == two.temperatures
    assert one.default == two.default
    for a, b in zip(one.points, two.points, strict=True):
        assert (a.name, a.thresholds, a.votes) == (b.name, b.thresholds, b.votes)
        assert a.accuracy_samples != b.accuracy_samples


def test_temperatures_mend_overconfidence():
    answers = drawn(0, 2000)
    policy, _ = fit_policy(answers, drawn(1, 2000), MACS, MAIN, SETTINGS)
    quality = exit_quality(drawn(1, 2000), policy.temperatures, "calibration")
    for e in range(3):
        before = quality[f"calibration/exit_{e}/ece_uncalibrated"]
        assert quality[f"calibration/exit_{e}/ece"] < before / 2


@pytest.fixture
def built(network, dataset, tmp_path: Path):
    """Real segments, their answers, a fitted policy and the composed file."""
    files = []
    for number, model in enumerate(export_segments(network, dataset.mean, dataset.std, SIZE)):
        files.append(tmp_path / f"{number}.onnx")
        onnx.save(model, files[-1])
    answers = [
        Answers(segment_logits(files, channels_last(dataset[name].images), 1), dataset[name].labels)
        for name in ("validation", "calibration")
    ]
    policy, _ = fit_policy(answers[0], answers[1], MACS, MAIN, SETTINGS)
    model = compose(files, policy, CLASSES, (SIZE, SIZE, 1))
    return model, policy, answers[0], files


def test_the_one_file_carries_policy_classes_and_shape(built):
    model, policy, _, _ = built
    carried = open_session(model).get_modelmeta().custom_metadata_map
    assert parse_policy(carried["policy"]) == policy
    assert json.loads(carried["classes"]) == list(CLASSES)
    assert json.loads(carried["image_shape"]) == [SIZE, SIZE, 1]


def test_the_one_file_equals_the_cascade(built, dataset):
    model, policy, answers, _ = built
    metrics = check_composed(model, policy, answers, dataset["validation"])
    assert metrics["validation/composed/parity_difference"] < 1e-5
    assert metrics["validation/composed/ties"] == 0


def test_a_file_of_another_policy_fails_the_stage(built, dataset):
    _, policy, answers, files = built
    hotter = replace(policy, temperatures=tuple(3 * t for t in policy.temperatures))
    model = compose(files, hotter, CLASSES, (SIZE, SIZE, 1))
    with pytest.raises(InputError, match="the composed file"):
        check_composed(model, policy, answers, dataset["validation"])


def test_reliability_rows_cover_every_exit(built):
    _, policy, answers, _ = built
    rows = calibrate.reliability_rows(answers, policy.temperatures)
    assert {row["exit"] for row in rows} == {"exit 0", "exit 1", "exit 2"}
    assert sum(row["count"] for row in rows) == 3 * len(answers.labels)

import json
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from draws import draw, settings
from toys import CLASSES, SIZE, replace

from edgeke.calibrate import calibrate, check_composed, compose
from edgeke.data.dataset import channels_last
from edgeke.device.manifest import Manifest
from edgeke.device.policy import parse_policy
from edgeke.device.session import open_session
from edgeke.errors import InputError
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_segments
from edgeke.params import Requirement
from edgeke.policy.certify import certify
from edgeke.policy.fit import fit_policy
from edgeke.policy.report import point_metrics
from edgeke.policy.samples import ExitLogits
from stages.calibrate import warning

MACS, MAIN = (60, 80, 110), 90
REQUIREMENTS = (
    Requirement(max_degradation=0.1),
    Requirement(min_accuracy=0.99),
    Requirement(max_cost=1.0),
)


def overconfident(seed: int, samples: int) -> ExitLogits:
    split = draw(samples, seed)
    return ExitLogits(6 * split.logits, split.labels)


def test_named_points_and_requirements_are_reported():
    validation, chosen = overconfident(0, 500), settings(requirements=REQUIREMENTS)
    fitted, _ = fit_policy(validation, MACS, MAIN, chosen)
    policy = certify(fitted, overconfident(1, 800), chosen)
    metrics = point_metrics(policy, validation)
    labels = ["full", "proportions", "default", "max_degradation_0.1", "max_cost_1"]
    assert list(policy.named) == labels
    for label, point in policy.named.items():
        assert metrics[f"calibration/{label}/accuracy"] == point.accuracy
        expected = metrics[f"calibration/{label}/cost_share"]
        assert metrics[f"calibration/{label}/promised_cost_share"] >= expected - 1e-12
    assert metrics["validation/full/cost_share"] == pytest.approx(110 / 90)
    assert metrics["calibration/max_degradation_0.1/met"] == 1
    promised = metrics["calibration/max_degradation_0.1/promised"]
    assert metrics["calibration/max_degradation_0.1/degradation"] < promised <= 0.1
    assert metrics["calibration/max_cost_1/promised"] <= 1
    assert metrics["calibration/min_accuracy_0.99/met"] == 0
    assert 0.5 < metrics["calibration/min_accuracy_0.99/nearest"] < 0.99
    assert "calibration/min_accuracy_0.99/promised" not in metrics
    assert warning("int8", policy) == (
        "warning: int8 cannot promise min_accuracy_0.99 (the nearest is "
        f"{metrics['calibration/min_accuracy_0.99/nearest']:.4g}); the default point is full"
    )


@pytest.fixture(params=["max_probability", "margin", "entropy", "learned"])
def built(network, dataset, tmp_path: Path, request):
    """Real segments, and what the stage makes of them."""
    files = []
    for number, model in enumerate(export_segments(network, dataset.mean, dataset.std, SIZE)):
        files.append(tmp_path / f"{number}.onnx")
        onnx.save(model, files[-1])
    names = tuple(file.name for file in files)
    manifest = Manifest(names, MACS, MAIN, CLASSES, (SIZE, SIZE, 1))
    chosen = settings(score=request.param)
    return calibrate(files, manifest, dataset.splits, chosen), files, manifest


def test_the_one_file_equals_the_cascade_and_carries_its_policy(built):
    result, _, _ = built
    assert result.metrics["validation/composed/parity_difference"] < 1e-5
    assert result.metrics["validation/composed/ties"] <= 2  # scores as near as 1e-5 to thresholds
    metadata = open_session(result.model).get_modelmeta().custom_metadata_map
    assert parse_policy(metadata["policy"]) == result.policy
    assert json.loads(metadata["classes"]) == list(CLASSES)
    assert json.loads(metadata["image_shape"]) == [SIZE, SIZE, 1]


def test_a_file_of_another_policy_fails_the_stage(built, dataset):
    result, files, manifest = built
    hotter = replace(result.policy, temperatures=tuple(3 * t for t in result.policy.temperatures))
    model = compose(files, hotter, manifest)
    split = dataset["validation"]
    answers = ExitLogits(np.zeros((3, len(split.labels), 3), np.float32), split.labels)
    with pytest.raises(InputError, match="the composed file"):
        check_composed(model, result.policy, answers, split)


def test_a_policy_that_no_device_would_read_is_not_shipped(built):
    result, files, manifest = built
    points = (*result.policy.points, result.policy.points[0])
    with pytest.raises(InputError, match=re.escape("(names of points)")):
        compose(files, replace(result.policy, points=points), manifest)


def test_of_each_group_one_calibration_image_is_counted(network, dataset, tmp_path: Path):
    files = []
    for number, model in enumerate(export_segments(network, dataset.mean, dataset.std, SIZE)):
        files.append(tmp_path / f"{number}.onnx")
        onnx.save(model, files[-1])
    manifest = Manifest(
        tuple(file.name for file in files), MACS, MAIN, CLASSES, (SIZE, SIZE, 1), fit="pad"
    )
    split = dataset["calibration"]
    groups = np.arange(len(split.labels)) // 3
    splits = {**dataset.splits, "calibration": replace(split, groups=groups)}
    fp32 = calibrate(files, manifest, splits, settings())
    int8 = calibrate(files, manifest, splits, settings(), fp32)
    for result in (fp32, int8):
        assert {point.samples for point in result.policy.points} == {len(split.labels) // 3}
    metadata = open_session(fp32.model).get_modelmeta().custom_metadata_map
    assert json.loads(metadata["fit"]) == "pad"


def test_degradation_is_measured_against_the_best_exit(network, dataset, tmp_path: Path):
    """A main exit that knows less than an earlier one is no reference, in no precision."""
    files = []
    for number, model in enumerate(export_segments(network, dataset.mean, dataset.std, SIZE)):
        files.append(tmp_path / f"{number}.onnx")
        onnx.save(model, files[-1])
    manifest = Manifest(tuple(f.name for f in files), MACS, MAIN, CLASSES, (SIZE, SIZE, 1))
    splits = {}
    for name in ("validation", "calibration"):
        split = dataset[name]
        answers = segment_logits(files, channels_last(split.images), 1).argmax(-1)
        splits[name] = replace(split, labels=answers[1].astype(np.int64))  # exit 1 is always right
    fp32 = calibrate(files, manifest, splits, settings())
    again = calibrate(files, manifest, splits, settings(), fp32)
    wrong = int((answers[2] != answers[1]).sum())
    assert wrong > 0
    for result in (fp32, again):
        assert result.policy.reference_exit == 1
        full = result.policy.point("full")
        assert (full.degraded, full.wrong) == (wrong, wrong)
        assert parse_policy(json.dumps(result.policy.to_json())) == result.policy

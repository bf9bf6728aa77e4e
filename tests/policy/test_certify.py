import json

import numpy as np
import pytest
from draws import draw, settings

from edgeke.device.policy import Policy, parse_policy
from edgeke.params import Requirement
from edgeke.policy.certify import certify
from edgeke.policy.fit import FittedPolicy, fit_policy
from edgeke.policy.samples import ExitLogits

MACS, MAIN = (40, 70, 120), 100
DEGRADATION, SURER = (
    Requirement(max_degradation=0.03),
    Requirement(max_degradation=0.03, delta=0.01),
)
ACCURACY, COST = Requirement(min_accuracy=0.8), Requirement(max_cost=0.7)


@pytest.fixture(scope="module")
def fitted() -> FittedPolicy:
    return fit_policy(draw(1000, 1), MACS, MAIN, settings())[0]


def certified(fitted: FittedPolicy, split: ExitLogits, *requirements: Requirement) -> Policy:
    return certify(fitted, split, settings(requirements=requirements))


def test_each_requirement_gets_a_point(fitted):
    policy = certified(fitted, draw(2000, 2), DEGRADATION, SURER, ACCURACY, COST)
    assert [result.name for result in policy.requirements] == [
        "max_degradation_0.03",
        "max_degradation_0.03_delta_0.01",
        "min_accuracy_0.8",
        "max_cost_0.7",
    ]
    costs = policy.cost_shares
    cheap, surer, accurate, by_cost = (policy.point(r.point) for r in policy.requirements)
    assert cheap.promised("max_degradation", 0.1, 2) <= 0.03
    assert surer.promised("max_degradation", 0.01, 2) <= 0.03
    assert cheap.expected_cost(costs) <= surer.expected_cost(costs) < 1.2
    assert 1 - accurate.promised("max_error", 0.1, 2) >= 0.8
    assert policy.promised_cost(by_cost, costs) <= 0.7
    assert policy.point(policy.default) == surer  # the cheapest that keeps all three of quality
    assert parse_policy(json.dumps(policy.to_json())) == policy


def test_points_hold_what_calibration_showed(fitted):
    split = draw(2000, 2)
    policy, samples = certified(fitted, split), fitted.tuning.samples(split)
    for point in policy.points:
        costs = policy.cost_shares
        assert point.accuracy == pytest.approx(samples.correct_at(point.thresholds).mean())
        assert point.degradation == pytest.approx(samples.degraded_at(point.thresholds).mean())
        assert point.expected_cost(costs) == pytest.approx(samples.cost(point.thresholds, costs))
        assert policy.promised_cost(point, costs) >= point.expected_cost(costs) - 1e-9
    assert 15 <= len(policy.points) <= 30
    assert policy.points[0].name == "full"
    assert policy.points[-1].name == "exit_0"
    assert policy.point("proportions").evidence == ()
    assert policy.caps == (0, 1, 2)


def test_evidence_is_the_worst_count_so_far(fitted):
    split = draw(2000, 2)
    policy, samples = certified(fitted, split), fitted.tuning.samples(split)
    for sequence in fitted.sequences:
        degraded = wrong = 0
        for candidate, for_degradation, for_error in zip(
            sequence.candidates, sequence.for_degradation, sequence.for_error, strict=True
        ):
            if for_degradation:
                degraded = max(degraded, samples.degraded_at(candidate.thresholds).sum())
            if for_error:
                wrong = max(wrong, (~samples.correct_at(candidate.thresholds)).sum())
            evidence = {item.cap: item for item in policy.point(candidate.name).evidence}
            assert evidence[sequence.cap].degraded == (degraded if for_degradation else None)
            assert evidence[sequence.cap].wrong == (wrong if for_error else None)


def test_what_cannot_be_met_is_recorded_with_the_nearest(fitted):
    impossible = (
        Requirement(min_accuracy=0.999),
        Requirement(max_cost=0.3),
        Requirement(max_degradation=0.001),
    )
    policy = certified(fitted, draw(300, 2), *impossible)
    accuracy, cost, degradation = policy.requirements
    assert {result.point for result in policy.requirements} == {None}
    assert policy.unmet == policy.requirements
    assert 0.8 < accuracy.nearest < 0.95
    assert cost.nearest == pytest.approx(0.4)
    assert degradation.nearest == pytest.approx(1 - 0.1 ** (1 / 300))


def test_the_default_is_never_chosen_by_cost_while_quality_cannot_be_promised(fitted):
    few = draw(60, 2)  # too few for 3 %
    kept = Requirement(min_accuracy=0.7), Requirement(max_cost=0.9)
    policy = certified(fitted, few, DEGRADATION, *kept)
    assert [result.point is None for result in policy.requirements] == [True, False, False]
    # A cheaper point is clearly better than `full` on validation, and none is better than it.
    best = max(policy.points, key=lambda point: point.validation_accuracy)
    assert policy.point(policy.default).validation_accuracy == best.validation_accuracy
    assert certified(fitted, few).default == "full"
    assert certified(fitted, few, Requirement(max_cost=0.3)).default == "full"
    by_cost = certified(fitted, few, COST)
    assert by_cost.default == by_cost.requirements[0].point != "full"


def test_a_main_exit_that_is_worse_than_an_earlier_one_is_no_default():
    """Overthinking: nothing is promised, and the full network is the worst that could answer."""
    worse = fit_policy(overthinking(180, 3), (76, 100, 124), 100, settings())[0]
    policy = certified(worse, overthinking(360, 4), Requirement(min_accuracy=0.99))
    default = policy.point(policy.default)
    assert policy.unmet
    assert default.validation_accuracy == max(p.validation_accuracy for p in policy.points)
    assert default.validation_accuracy > policy.point("full").validation_accuracy + 0.1


def overthinking(count: int, seed: int) -> ExitLogits:
    """Exits that have 95, 90 and 60 % right, each sure of itself."""
    generator = np.random.default_rng(seed)
    labels, hard = generator.integers(0, 10, count), generator.random(count)
    logits = generator.normal(0, 1, (3, count, 10)).astype(np.float32)
    for exit, accuracy in enumerate((0.95, 0.9, 0.6)):
        other = (labels + generator.integers(1, 10, count)) % 10
        top = np.where(hard < accuracy, labels, other)
        logits[exit, np.arange(count), top] += 5 * (1 + generator.random(count))
    return ExitLogits(logits, labels)


def test_other_calibration_images_change_promises_and_nothing_that_was_fitted(fitted):
    one, two = (certified(fitted, draw(n, n)) for n in (500, 900))
    names = [
        {(p.name, p.thresholds, p.votes, p.validation_accuracy) for p in policy.points}
        for policy in (one, two)
    ]
    assert names[0] == names[1]
    assert (one.temperatures, one.score_weights) == (two.temperatures, two.score_weights)
    assert {p.evidence for p in one.points} != {p.evidence for p in two.points}


def test_int8_is_measured_against_the_full_network_of_fp32():
    """Also its own full network then loses answers, and promises no more than it keeps."""
    fp32 = [draw(1000, 1), draw(2000, 2)]
    random = np.random.default_rng(0)
    coarse = [split.logits + random.normal(0, 0.7, split.logits.shape) for split in fp32]
    validation, calibration = (
        ExitLogits(logits.astype(np.float32), split.labels, split.correct_at(-1))
        for logits, split in zip(coarse, fp32, strict=True)
    )
    policy = certify(fit_policy(validation, MACS, MAIN, settings())[0], calibration, settings())
    full = policy.point("full")
    lost = calibration.reference & (calibration.logits[-1].argmax(-1) != calibration.labels)
    assert full.degraded == lost.sum() > 0
    assert full.promised("max_degradation", 0.1, 2) > lost.mean()

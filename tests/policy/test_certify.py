import json

import numpy as np
import pytest
from draws import draw

from edgeke.device.policy import parse_policy
from edgeke.errors import InputError
from edgeke.params import Requirement
from edgeke.policy.candidates import Candidate, propose
from edgeke.policy.certify import Frozen, certify
from edgeke.policy.promises import running_bounds, upper_bound
from edgeke.policy.tuning import tune

MACS, MAIN = (40, 70, 120), 100


def freeze(samples: int = 1000, score: str = "max_probability") -> Frozen:
    logits, labels = draw(samples, 1)
    tuning = tune(logits, labels, score)
    seen = tuning.samples(logits, labels)
    sequences = propose(seen, [m / MAIN for m in MACS], 0.05)
    extra = (Candidate("proportions", (0.6, 0.6, 0.2)),)
    every = [c for s in sequences.values() for c in s] + list(extra)
    accuracy = {c.name: float(1 - seen.wrong(c.thresholds).mean()) for c in every}
    return Frozen(tuning, sequences, extra, accuracy, MACS, MAIN)


def ask(**asked: float) -> Requirement:
    empty = dict.fromkeys(("max_cost", "min_accuracy", "max_degradation", "delta"))
    return Requirement(**{**empty, **asked})


FROZEN = freeze()
ASKED = (
    ask(max_degradation=0.03),
    ask(max_degradation=0.03, delta=0.01),
    ask(min_accuracy=0.8),
    ask(max_cost=0.7),
)


def test_a_policy_says_what_was_asked_and_keeps_it_as_json():
    policy = certify(FROZEN, *draw(2000, 2), 0.1, ASKED)
    assert [of.name for of in policy.requirements] == [
        "max_degradation_0.03",
        "max_degradation_0.03_delta_0.01",
        "min_accuracy_0.8",
        "max_cost_0.7",
    ]
    assert all(of.point is not None for of in policy.requirements)
    assert policy.default == policy.requirements[0].point
    costs = policy.cost_shares
    by_loss, surer, _, by_cost = (policy.point(of.point) for of in policy.requirements)
    assert by_loss.promised("max_degradation", 0.1, 2) <= 0.03
    assert surer.promised("max_degradation", 0.01, 2) <= 0.03
    assert by_loss.expected_cost(costs) <= surer.expected_cost(costs) < 1.2
    assert by_cost.promised_cost(costs) <= 0.7
    assert parse_policy(json.dumps(policy.to_json())) == policy


def test_points_hold_what_calibration_showed():
    logits, labels = draw(2000, 2)
    policy = certify(FROZEN, logits, labels, 0.1, ASKED)
    samples = FROZEN.tuning.samples(logits, labels)
    for point in policy.points:
        result = samples.result(point.thresholds, policy.cost_shares)
        assert point.accuracy == pytest.approx(result.accuracy)
        assert point.degradation == pytest.approx(result.degradation)
        assert point.expected_cost(policy.cost_shares) == pytest.approx(result.cost)
        assert point.promised_cost(policy.cost_shares) >= result.cost - 1e-9
        low, high = point.accuracy_interval
        assert low <= point.accuracy <= high
    thresholds = [point.thresholds for point in policy.points]
    assert len(set(thresholds)) == len(thresholds)
    assert policy.points[0].name == "full"
    assert policy.point("proportions").promises == ()


def test_promises_are_the_running_bounds_of_their_sequence():
    logits, labels = draw(2000, 2)
    policy = certify(FROZEN, logits, labels, 0.1, ())
    samples = FROZEN.tuning.samples(logits, labels)
    sequence = FROZEN.sequences["degradation", 2]
    bounds = running_bounds(np.stack([samples.degradations(c.thresholds) for c in sequence]), 0.1)
    by_thresholds = {point.thresholds: point for point in policy.points}
    for candidate, bound in zip(sequence, bounds, strict=True):
        promised = by_thresholds[candidate.thresholds].promised("max_degradation", 0.1, 2)
        assert promised <= bound
    assert policy.point("full").promised("max_degradation", 0.1, 2) == upper_bound(0, 2000, 0.1)


def test_what_cannot_be_met_is_recorded_with_the_nearest():
    asked = (
        ask(min_accuracy=0.999),
        ask(max_cost=0.3),
        ask(max_degradation=0.001),
        ask(max_cost=0.9),
    )
    policy = certify(FROZEN, *draw(300, 2), 0.1, asked)
    floor, cost, loss, met = policy.requirements
    assert (floor.point, cost.point, loss.point) == (None, None, None)
    assert 0.8 < floor.nearest < 0.95
    assert cost.nearest == pytest.approx(0.4)
    assert loss.nearest == pytest.approx(1 - 0.1 ** (1 / 300))
    assert policy.default == met.point
    assert certify(FROZEN, *draw(300, 2), 0.1, asked[:3]).default == "full"


def test_other_calibration_images_change_promises_and_nothing_that_was_fitted():
    one, two = (certify(FROZEN, *draw(n, n), 0.1, ()) for n in (500, 900))
    fitted = lambda policy: {(p.name, p.thresholds, p.votes) for p in policy.points}  # noqa: E731
    assert fitted(one) == fitted(two)
    assert (one.temperatures, one.score_weights) == (two.temperatures, two.score_weights)
    bounds = [[p.bound for point in policy.points for p in point.promises] for policy in (one, two)]
    assert sorted(bounds[0]) != sorted(bounds[1])


def test_broken_calibration_logits_are_refused():
    logits, labels = draw(100, 2)
    logits[1, 3] = np.nan
    with pytest.raises(InputError, match="exit 1 are not finite at sample 3"):
        certify(FROZEN, logits, labels, 0.1, ())

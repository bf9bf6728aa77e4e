"""Promises hold as often as they say, on draws whose truth is known."""

from dataclasses import dataclass

import numpy as np
import pytest
from draws import digits, draw, settings

from edgeke.device.policy import Policy
from edgeke.policy.candidates import fixed_sequences, propose
from edgeke.policy.certify import certify
from edgeke.policy.fit import FittedPolicy, fit_policy
from edgeke.policy.samples import ExitLogits, one_of_each
from edgeke.policy.tuning import tune

MACS, MAIN, COSTS = (30, 60, 100), 100, (0.3, 0.6, 1.0)
DRAWS, SAMPLES = 1000, 500


@dataclass
class Case:
    """Policies of many calibration draws; each point's true degradation, error and cost.

    `degradation` and `error` are the hardest requests: just below the truth of a candidate.
    """

    policies: list[Policy]
    truth: dict[str, tuple[float, float, float]]
    degradation: float
    error: float

    def broken(self, delta: float, degradation: float | None, error: float | None) -> float:
        """The share of draws in which a point that is certified for all of this breaks it."""
        broken = certified = 0
        for policy in self.policies:
            points = policy.points
            if degradation is not None:
                points = [
                    p for p in points if p.promised("max_degradation", delta, 2) <= degradation
                ]
            if error is not None:
                points = [p for p in points if p.promised("max_error", delta, 2) <= error]
            certified += bool(points)
            truth = [self.truth[point.name] for point in points]
            broken += any(true[0] > (degradation or 1) or true[1] > (error or 1) for true in truth)
        assert certified > DRAWS / 2  # a test of promises that are never made would be empty
        return broken / DRAWS


@pytest.fixture(scope="module", params=["known law", "real digits"])
def case(request) -> Case:
    if request.param == "known law":
        validation, pool = draw(1000, 1), draw(200_000, 2)
    else:
        validation, pool = (digits().at(np.arange(*ends)) for ends in ((0, 400), (400, 1197)))
    fitted, _ = fit_policy(validation, MACS, MAIN, settings())
    samples, random = fitted.tuning.samples(pool), np.random.default_rng(0)
    truth = {
        c.name: (
            samples.degraded_at(c.thresholds).mean(),
            1 - samples.correct_at(c.thresholds).mean(),
            samples.cost(c.thresholds, COSTS),
        )
        for c in fitted.candidates
    }
    policies = [
        certify(fitted, pool.at(random.integers(0, len(pool.labels), SAMPLES)), settings())
        for _ in range(DRAWS)
    ]
    degradation, error, _ = truth[fitted.sequences[0].candidates[-4].name]
    return Case(policies, truth, degradation - 1e-9, error - 1e-9)


def allowed(delta: float, draws: int = DRAWS) -> float:
    """Violations that chance explains: delta and three standard errors."""
    return delta + 3 * (delta * (1 - delta) / draws) ** 0.5


@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_one_risk_is_kept(case, delta):
    assert case.broken(delta, case.degradation, None) <= allowed(delta)
    assert case.broken(delta, None, case.error) <= allowed(delta)


@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_two_risks_are_kept_together_at_the_same_delta(case, delta):
    assert case.broken(delta, case.degradation, case.error) <= allowed(delta)


def test_costs_of_all_points_are_kept_at_once(case):
    broken = 0
    for policy in case.policies:
        costs = [(policy.promised_cost(p, COSTS), case.truth[p.name][2]) for p in policy.points]
        broken += any(promised < true - 1e-12 for promised, true in costs)
    assert broken / DRAWS <= allowed(0.1)


def test_certified_points_are_nearly_as_cheap_as_the_truth_allows(case):
    """With 500 samples they cost at most a fifth more than an oracle's choice."""
    oracle = min(cost for lost, _, cost in case.truth.values() if lost <= case.degradation)
    paid = []
    for policy in case.policies[:200]:
        bounds = {p.name: p.promised("max_degradation", 0.1, 2) for p in policy.points}
        kept = [name for name, bound in bounds.items() if bound <= case.degradation]
        paid.append(min((case.truth[name][2] for name in kept), default=COSTS[-1]))
    assert np.mean(paid) <= 1.2 * oracle


def test_fitting_and_certifying_on_one_split_breaks_the_promise():
    """Why calibration is a split of its own."""
    error, delta, draws, pool = 0.22, 0.1, 60, draw(10_000, 2)
    many = settings(points=200)
    broken = {"own": 0, "same": 0}
    for seed in range(draws):
        validation, calibration = draw(150, 1000 + seed), draw(150, 5000 + seed)
        tuning = tune(validation, many)
        proposed, proportions = propose(tuning.samples(validation), COSTS, many)
        sequences = fixed_sequences(tuning.samples(validation), proposed)
        accuracy = dict.fromkeys((c.name for s in sequences for c in s.candidates), 0.5)
        accuracy["proportions"] = 0.5  # decides nothing here
        fitted = FittedPolicy(tuning, sequences, proportions, accuracy, MACS, MAIN)
        truth = tuning.samples(pool)
        for name, split in (("own", calibration), ("same", validation)):
            points = certify(fitted, split, settings()).points
            certified = [p for p in points if p.promised("max_error", delta, 2) <= error]
            broken[name] += any(
                truth.correct_at(p.thresholds).mean() < 1 - error for p in certified
            )
    assert broken["own"] / draws <= allowed(delta, draws)
    assert broken["same"] > 2 * max(broken["own"], delta * draws)


def test_promises_on_groups_hold_with_one_image_of_each_and_break_with_all():
    """Parts of five photographs that show nearly the same: hard for all exits, or for none."""
    shots, parts, delta, law = 5, 100, 0.1, 20_000
    fitted, _ = fit_policy(draw(1000, 1), MACS, MAIN, settings())
    pool = grouped(law, shots, seed=2)
    truth = fitted.tuning.samples(pool)
    error = {c.name: 1 - truth.correct_at(c.thresholds).mean() for c in fitted.candidates}
    limit = error[fitted.sequences[0].candidates[-4].name] - 1e-9
    random, broken = np.random.default_rng(0), {"one": 0, "all": 0}
    for _ in range(DRAWS):
        which = random.integers(0, law, parts)
        groups = np.repeat(np.arange(parts), shots)
        calibration = pool.at((which[:, None] * shots + np.arange(shots)).ravel())
        for name, split in (("one", calibration.at(one_of_each(groups))), ("all", calibration)):
            points = certify(fitted, split, settings()).points
            broken[name] += any(
                error[point.name] > limit and point.promised("max_error", delta, 2) <= limit
                for point in points
            )
    assert broken["one"] / DRAWS <= allowed(delta)
    assert broken["all"] / DRAWS > 1.5 * delta


def grouped(parts: int, shots: int, seed: int) -> ExitLogits:
    """Each part of `draw` photographed several times, with a little noise."""
    one, random = draw(parts, seed), np.random.default_rng(seed)
    logits = np.repeat(one.logits, shots, axis=1)
    noise = random.normal(0, 0.3, logits.shape).astype(np.float32)
    return ExitLogits(logits + noise, np.repeat(one.labels, shots))

"""Promises hold as often as they say, on draws whose truth is known."""

from collections.abc import Callable

import numpy as np
import pytest
from draws import digits, draw
from scipy.stats import binom

from edgeke.device.policy import force_exit
from edgeke.policy.candidates import Sequences, propose
from edgeke.policy.promises import certified_prefix, reach_bounds
from edgeke.policy.samples import Samples
from edgeke.policy.solver import Solver
from edgeke.policy.tuning import tune

COSTS = (0.3, 0.6, 1.0)
DRAWS = 1000


def allowed(delta: float) -> float:
    """Violations that chance explains: delta and three standard errors."""
    return delta + 3 * (delta * (1 - delta) / DRAWS) ** 0.5


Case = tuple[Sequences, Samples, Callable[[np.random.Generator, int], np.ndarray]]


@pytest.fixture(scope="module", params=["known law", "real digits"])
def case(request) -> Case:
    """Frozen candidates, a pool whose rates are the truth, and how to draw from it."""
    if request.param == "known law":
        logits, labels = draw(1000, 1)
        pool = draw(200_000, 2)
    else:
        logits, labels = (part[..., :400, :] if part.ndim == 3 else part[:400] for part in digits())
        pool = digits()[0][:, 400:], digits()[1][400:]
    tuning = tune(logits, labels, "max_probability")
    sequences = propose(tuning.samples(logits, labels), COSTS, 0.025)
    samples = tuning.samples(*pool)
    return sequences, samples, lambda random, n: random.integers(0, len(pool[1]), n)


def bad(case: Case, objective: str) -> np.ndarray:
    sequences, samples, _ = case
    judge = samples.degradations if objective == "degradation" else samples.wrong
    return np.stack([judge(c.thresholds) for c in sequences[objective, 2]])


@pytest.mark.parametrize(
    ("objective", "epsilon"), [("degradation", 0.01), ("degradation", 0.03), ("accuracy", 0.08)]
)
@pytest.mark.parametrize("delta", [0.1, 0.3])
def test_certified_rates_hold(case, objective, epsilon, delta):
    outcomes, pick = bad(case, objective), case[2]
    truth, random = outcomes.mean(axis=1), np.random.default_rng(0)
    broken = certified = 0
    for _ in range(DRAWS):
        prefix = certified_prefix(outcomes[:, pick(random, 500)], epsilon, delta)
        certified += prefix > 0
        broken += bool(prefix) and truth[:prefix].max() > epsilon
    assert broken / DRAWS <= allowed(delta)
    if truth[0] < epsilon / 2:
        assert certified > DRAWS / 2  # a test of promises that are never made would be empty


def test_cost_bounds_hold_all_at_once(case):
    sequences, samples, pick = case
    thresholds = sorted({c.thresholds for s in sequences.values() for c in s})
    exits = np.stack([samples.exits(t) for t in thresholds])
    truth = np.stack([(exits >= e).mean(axis=1) for e in range(3)], axis=1)
    steps, random = np.diff([0, *COSTS]), np.random.default_rng(0)
    broken = over = 0
    for _ in range(DRAWS):
        bounds = reach_bounds(exits[:, pick(random, 500)], thresholds, 3, 0.1)
        broken += bool((bounds < truth - 1e-12).any())
        over += bool((bounds @ steps < truth @ steps - 1e-12).any())
    assert broken / DRAWS <= allowed(0.1)
    assert over <= broken


def test_fitting_and_certifying_on_one_split_breaks_the_promise():
    """Why calibration is a split of its own."""
    n, epsilon, delta, draws = 270, 0.02, 0.1, 150
    passes = int(np.flatnonzero(binom.cdf(np.arange(n), n, epsilon) <= delta).max())
    pool, broken = draw(10_000, 2), {"own": 0, "same": 0}
    for seed in range(draws):
        fitted, certified = draw(n, 1000 + seed), draw(n, 5000 + seed)
        tuning = tune(*fitted, "max_probability")
        samples, unseen, truth = (tuning.samples(*of) for of in (fitted, certified, pool))
        solver = Solver(samples, COSTS, "degradation")
        # The cheapest thresholds that the split they were fitted on would certify.
        boldest = solver.at_least(-passes / n)
        broken["same"] += truth.degradations(boldest).mean() > epsilon
        sequence = [force_exit(2, 3), *(solver.at_least(-k / n) for k in range(passes + 4))]
        outcomes = np.stack([unseen.degradations(thresholds) for thresholds in sequence])
        prefix = certified_prefix(outcomes, epsilon, delta)
        if prefix:
            broken["own"] += truth.degradations(sequence[prefix - 1]).mean() > epsilon
    assert broken["own"] / draws <= delta + 3 * (delta * (1 - delta) / draws) ** 0.5
    assert broken["same"] > 2 * max(broken["own"], delta * draws)


def test_power():
    """With 4,000 samples the certified point costs at most a tenth more than the oracle's."""
    tuning = tune(*draw(1000, 1), "max_probability")
    sequence = propose(tuning.samples(*draw(1000, 1)), COSTS, 0.025)["degradation", 2]
    pool = tuning.samples(*draw(200_000, 2))
    outcomes = np.stack([pool.degradations(c.thresholds) for c in sequence])
    costs = np.array([pool.result(c.thresholds, COSTS).cost for c in sequence])
    oracle = costs[outcomes.mean(axis=1) <= 0.01].min()
    random, paid = np.random.default_rng(0), []
    for _ in range(200):
        prefix = certified_prefix(outcomes[:, random.integers(0, 200_000, 4000)], 0.01, 0.1)
        paid.append(costs[max(prefix, 1) - 1])
    assert np.mean(paid) <= 1.1 * oracle

import itertools

import numpy as np
import pytest
from draws import digits, draw

from edgeke.errors import InputError
from edgeke.policy.samples import Samples
from edgeke.policy.solver import Solver
from edgeke.policy.tuning import tune

COSTS = (0.4, 0.7, 1.2)


def make(logits: np.ndarray, labels: np.ndarray) -> Samples:
    return tune(logits, labels, "max_probability").samples(logits, labels)


@pytest.fixture(scope="module", params=["drawn", "digits"])
def samples(request) -> Samples:
    logits, labels = draw(400) if request.param == "drawn" else digits()
    return make(logits[:, :400], labels[:400])


@pytest.fixture(scope="module")
def exhaustive(samples) -> list:
    """Every pair of thresholds in steps of 0.01, with nobody and with everybody voting."""
    grid = np.linspace(0, 1, 101)
    return [samples.result((a, b, last), COSTS) for a in grid for b in grid for last in (-1.0, 2.0)]


def test_within_a_budget_no_grid_is_better(samples, exhaustive):
    solver = Solver(samples, COSTS)
    for budget in np.arange(0.4, 1.21, 0.05):
        found = samples.result(solver.within(budget), COSTS)
        assert found.cost <= budget + 1e-9
        rival = max(r.accuracy for r in exhaustive if r.cost <= budget + 1e-9)
        assert found.accuracy >= rival - 0.001


def test_at_a_floor_no_grid_is_cheaper(samples, exhaustive):
    solver, best = Solver(samples, COSTS), max(r.accuracy for r in exhaustive)
    for floor in np.linspace(samples.correct[0].mean(), best, 9):
        found = samples.result(solver.at_least(floor), COSTS)
        assert found.accuracy >= floor - 1e-9
        rival = min(r.cost for r in exhaustive if r.accuracy >= floor - 1e-9)
        assert found.cost <= rival * 1.005


def test_the_least_loss_is_found_too(samples, exhaustive):
    solver = Solver(samples, COSTS, "degradation")
    for budget in (0.5, 0.7, 0.9):
        found = samples.result(solver.within(budget), COSTS)
        assert (
            found.degradation <= min(r.degradation for r in exhaustive if r.cost <= budget) + 0.001
        )
    found = samples.result(solver.at_least(-0.02), COSTS)
    assert found.degradation <= 0.02
    assert found.cost <= 1.005 * min(r.cost for r in exhaustive if r.degradation <= 0.02)


def test_a_cap_is_never_passed(samples):
    for cap in (1, 2):
        thresholds = Solver(samples, COSTS, cap=cap).within(1.0)
        assert samples.exits(thresholds).max() <= (cap if cap < 2 else 3)
    assert Solver(samples, COSTS, cap=1).within(1.0)[1:] == (-1, -1)


def test_more_budget_never_gives_less(samples):
    solver = Solver(samples, COSTS)
    gains = [samples.result(solver.within(b), COSTS).accuracy for b in np.linspace(0.4, 1.2, 20)]
    assert all(b >= a for a, b in itertools.pairwise(gains))


def test_five_exits_are_solved_as_well():
    logits, labels = draw(300, strengths=(1.0, 1.5, 2.0, 3.0, 4.0))
    samples, costs = make(logits, labels), (1, 2, 3, 4, 5)
    found = samples.result(Solver(samples, costs).within(3.0), costs)
    random = np.random.default_rng(0)
    tried = [samples.result(tuple(random.random(5)), costs) for _ in range(5000)]
    assert found.cost <= 3
    assert found.accuracy >= max(r.accuracy for r in tried if r.cost <= 3)


def test_what_cannot_be_had_is_refused_with_the_nearest():
    samples = make(*draw(200))
    with pytest.raises(InputError, match=r"cannot be met: the first exit alone costs 0\.4"):
        Solver(samples, COSTS).within(0.3)
    with pytest.raises(InputError, match=r"0\.9999 cannot be reached: the best .* is 0\.9"):
        Solver(samples, COSTS).at_least(0.9999)
    with pytest.raises(InputError, match="increase"):
        Solver(samples, (1, 1, 2))


def test_equal_scores_everywhere():
    logits, labels = draw(50)
    logits[:] = np.round(logits[:, :1])  # every image gets the same answer
    samples = make(logits, labels)
    thresholds = Solver(samples, COSTS).within(0.5)
    assert samples.result(thresholds, COSTS).cost == pytest.approx(0.4)

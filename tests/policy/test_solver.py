import itertools

import numpy as np
import pytest
from draws import digits, draw, settings

from edgeke.policy.samples import ExitLogits, Samples
from edgeke.policy.solver import best_thresholds
from edgeke.policy.tuning import tune

COSTS = (0.4, 0.7, 1.2)
BUDGETS = np.linspace(0.4, 1.2, 17).tolist()


def make(split: ExitLogits) -> Samples:
    return tune(split, settings()).samples(split)


def total(samples: Samples, gain: np.ndarray, thresholds: tuple[float, ...]) -> float:
    exit = samples.exits(thresholds)
    return gain[exit, np.arange(len(exit))].sum()


@pytest.fixture(scope="module", params=["drawn", "digits"])
def samples(request) -> Samples:
    split = draw(400) if request.param == "drawn" else digits()
    return make(split.at(np.arange(400)))


def test_no_grid_of_thresholds_is_better(samples):
    """Every pair of thresholds in steps of 0.01, with nobody and with everybody voting."""
    gain = samples.gain()
    grid = itertools.product(np.linspace(0, 1, 101), np.linspace(0, 1, 101), (-1.0, 2.0))
    tried = [(samples.cost(each, COSTS), total(samples, gain, each)) for each in grid]
    found = [each for each in best_thresholds(samples, gain, COSTS, BUDGETS) if each]
    solved = [(samples.cost(each, COSTS), total(samples, gain, each)) for each in found]
    for budget in BUDGETS:
        best = max(value for cost, value in solved if cost <= budget + 1e-9)
        assert best >= max(value for cost, value in tried if cost <= budget + 1e-9) - 1e-9


def test_a_cap_is_never_passed(samples):
    found = best_thresholds(samples, samples.gain(), COSTS, [0.5, 0.6, 0.7], cap=1)
    assert all(each is not None and each[1] == -1 for each in found)
    assert samples.exits(found[-1]).max() == 1


def test_many_exits_are_solved_as_well():
    samples, costs = make(draw(300, strengths=np.linspace(1, 4, 12))), np.arange(1.0, 13.0)
    gain, random = samples.gain(), np.random.default_rng(0)
    best = total(samples, gain, best_thresholds(samples, gain, costs, [5.5, 6.0])[1])
    tried = [tuple(random.random(12)) for _ in range(5000)]
    assert best > max(total(samples, gain, each) for each in tried if samples.cost(each, costs) < 6)


def test_equal_scores_everywhere():
    split = draw(50)
    logits = np.broadcast_to(np.round(split.logits[:, :1]), split.logits.shape)
    samples = make(ExitLogits(logits, split.labels))  # every image gets the same answer
    found = best_thresholds(samples, samples.gain(), COSTS, [0.5, 0.6, 1.2])
    assert found[1] is None
    assert [samples.cost(found[i], COSTS) for i in (0, 2)] == pytest.approx([0.4, 1.2])

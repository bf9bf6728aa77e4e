import itertools

import numpy as np
import pytest

from edgeke.device.policy import force_exit
from edgeke.policy.frontier import Samples, fit_frontier, judge
from edgeke.policy.scores import calibrated_probabilities, max_probability

COSTS = (0.4, 0.7, 1.2)
VOTES = (0.2, 0.3, 0.5)


def make(samples: int = 400) -> tuple[Samples, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, samples)
    hardness = random.normal(0, 1.5, samples)
    exits = []
    for strength in (1.5, 2.5, 3.5):
        logits = random.normal(0, 1, (samples, 5))
        logits[np.arange(samples), labels] += strength - hardness
        exits.append(logits)
    probabilities = calibrated_probabilities(np.array(exits, np.float32), [1.0] * 3)
    scores = max_probability(probabilities)
    return Samples.of(probabilities, scores, labels, VOTES), labels


def test_judge_by_hand():
    samples, _ = make()
    full = judge(force_exit(2, 3), samples, COSTS)
    assert full.cost == pytest.approx(1.2)
    assert full.accuracy == samples.correct[2].mean()
    voted = judge(force_exit(3, 3), samples, COSTS)
    assert voted.cost == pytest.approx(1.2)
    assert voted.accuracy == samples.correct[3].mean()


def test_ordered_cautious_to_bold_and_undominated():
    samples, _ = make()
    frontier = fit_frontier(samples, COSTS, 8)
    assert 4 <= len(frontier) <= 8
    for cautious, bold in itertools.pairwise(frontier):
        assert bold.cost < cautious.cost
        assert bold.accuracy <= cautious.accuracy
    assert frontier[-1].cost == pytest.approx(0.4)


def test_no_grid_of_thresholds_is_much_better():
    samples, _ = make()
    grid = np.linspace(0.2, 1, 41)
    exhaustive = [
        judge((a, b, last), samples, COSTS) for a in grid for b in grid for last in (-1.0, 2.0)
    ]
    gaps = []
    for point in fit_frontier(samples, COSTS, 100):
        rivals = [rival.accuracy for rival in exhaustive if rival.cost <= point.cost]
        gaps.append(max(rivals, default=0) - point.accuracy)
    # Shares in steps of 1/40 against thresholds in steps of 0.02, on 400 samples.
    assert np.mean(gaps) < 0.003
    assert max(gaps) < 0.015


def test_one_exit_is_a_frontier_of_one_cost():
    samples, _ = make()
    alone = Samples(samples.scores[:1], samples.correct[[0, 0]], samples.log_likelihood[[0, 0]])
    assert [point.cost for point in fit_frontier(alone, (1.0,), 5)] == [1.0]

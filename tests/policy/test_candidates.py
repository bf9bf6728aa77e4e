import itertools

import numpy as np
import pytest
from draws import draw, settings

from edgeke.policy.candidates import budgets_by_cap, fixed_sequences, propose
from edgeke.policy.samples import ExitLogits
from edgeke.policy.tuning import tune

COSTS = (0.4, 0.7, 1.2)


@pytest.mark.parametrize("exits", [2, 3, 4, 5, 9, 17])
def test_the_number_of_points_is_bounded(exits):
    for first in (0.05, 0.4, 0.9):
        budgets = budgets_by_cap(np.linspace(first, 1.3, exits), 30)
        assert len(budgets) == min(exits, 5)
        assert {0, exits - 1} <= set(budgets)
        assert 18 <= sum(map(len, budgets.values())) + len(budgets) + 1 <= 30


def sequences(split: ExitLogits, costs=COSTS, points: int = 30):
    samples = tune(split, settings()).samples(split)
    proposed, _ = propose(samples, costs, settings(points=points))
    return samples, proposed, fixed_sequences(samples, proposed)


def test_sequences_run_from_conservative_to_aggressive():
    samples, _, fixed = sequences(draw(500))
    assert [sequence.cap for sequence in fixed] == [2, 1, 0]
    for sequence in fixed:
        costs = [samples.cost(c.thresholds, COSTS) for c in sequence.candidates]
        assert all(a > b for a, b in itertools.pairwise(costs))
        exits = [samples.exits(c.thresholds).max() for c in sequence.candidates]
        assert max(exits) <= (3 if sequence.cap == 2 else sequence.cap)
        assert sequence.candidates[-1].name == "exit_0"
    names = [candidate.name for candidate in fixed[0].candidates]
    assert names[0] == "full"
    assert fixed[0].candidates[0].thresholds == (2, 2, -1)
    assert set(names[1:-1]) <= {f"cost_{k * 0.04:g}" for k in range(11, 30)}
    assert {name.partition("_by_")[2] for name in (c.name for c in fixed[1].candidates)} == {
        "",
        "exit_1",
    }


@pytest.mark.parametrize("macs", [(7496, 9000, 12504), (7500, 9000, 12500), (7499, 7504, 7509)])
def test_names_differ_whatever_the_costs(macs):
    costs = [m / 10_000 for m in macs]
    for seed in range(3):
        _, proposed, fixed = sequences(draw(300, seed), costs)
        for candidates in proposed.values():
            assert len({c.name for c in candidates}) == len(candidates)
        points = {c for sequence in fixed for c in sequence.candidates}
        assert len({c.name for c in points}) == len({c.thresholds for c in points}) == len(points)


def test_a_main_exit_that_is_worse_does_not_end_the_test_of_the_error():
    split = draw(500, strengths=(3.5, 2.5, 0.5))
    samples, _, (deepest, *_) = sequences(split)
    full, *others = deepest.for_error
    assert not full
    assert any(others)
    assert deepest.for_degradation[0]  # by definition it loses nothing
    wrong = np.array([(~samples.correct_at(c.thresholds)).mean() for c in deepest.candidates])
    assert wrong[list(deepest.for_error)].max() < wrong[0] - 0.1

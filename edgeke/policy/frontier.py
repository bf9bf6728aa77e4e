"""Candidate operating points: the best accuracy seen for each mean cost."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeke.policy.cascade import leave_at, vote
from edgeke.policy.thresholds import thresholds_for_proportions

__all__ = ["Candidate", "answered_right", "fit_frontier", "judge"]

_MOST_CANDIDATES = 4000


@dataclass(frozen=True)
class Candidate:
    """Thresholds `[E]` with the accuracy and mean cost they gave on some samples."""

    thresholds: tuple[float, ...]
    accuracy: float
    cost: float


def fit_frontier(
    probabilities: NDArray[np.float32],
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    votes: Sequence[float],
    costs: Sequence[float],
    points: int,
) -> list[Candidate]:
    """At most `points` candidates, cautious to bold: falling cost, falling accuracy.

    `probabilities` `[E, N, K]`, `scores` `[E, N]`, `costs` `[E]`. Tries a grid of shares per exit,
    each with and without the vote, keeps those that no other beats in both accuracy and cost, and
    spreads `points` of them evenly over the cost.
    """
    exits = len(scores)
    steps = max(2, int((_MOST_CANDIDATES / 2) ** (1 / max(1, exits - 1))))
    grid = np.linspace(0, 1, min(steps, 41))
    correct = answered_right(probabilities, labels, votes)
    tried = [
        judge(thresholds_for_proportions(scores, (*shares, last)), scores, correct, costs)
        for shares in itertools.product(grid, repeat=exits - 1)
        for last in (0.0, 1.0)
    ]
    best: list[Candidate] = []
    for candidate in sorted(tried, key=lambda c: (c.cost, -c.accuracy)):
        if not best or candidate.accuracy > best[-1].accuracy:
            best.append(candidate)
    best.reverse()
    goals = np.linspace(best[0].cost, best[-1].cost, points)
    chosen = {min(range(len(best)), key=lambda i: abs(best[i].cost - goal)) for goal in goals}
    return [best[i] for i in sorted(chosen)]


def answered_right(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], votes: Sequence[float]
) -> NDArray[np.bool_]:
    """Whether each exit, and last the vote, answers each sample right: `[E + 1, N]`."""
    answers = np.concatenate([probabilities, vote(probabilities, votes)[None]])
    right: NDArray[np.bool_] = answers.argmax(axis=-1) == labels
    return right


def judge(
    thresholds: Sequence[float],
    scores: NDArray[np.float32],
    correct: NDArray[np.bool_],
    costs: Sequence[float],
) -> Candidate:
    """Accuracy and mean cost of thresholds `[E]`; `scores` `[E, N]`, `correct` `[E + 1, N]`."""
    exit = leave_at(scores, thresholds)
    cost = np.asarray(costs, np.float64)[np.minimum(exit, len(scores) - 1)].mean()
    accuracy = correct[exit, np.arange(len(exit))].mean()
    return Candidate(tuple(thresholds), float(accuracy), float(cost))

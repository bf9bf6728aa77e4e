"""Candidate operating points: the best accuracy seen for each mean cost."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeke.policy.cascade import leave_at, vote
from edgeke.policy.thresholds import thresholds_for_proportions

__all__ = ["Candidate", "Samples", "fit_frontier", "judge"]

_MOST_CANDIDATES = 4000


@dataclass(frozen=True)
class Samples:
    """What every exit, and last the vote, would answer on some samples.

    `scores` `[E, N]`; `correct` and `log_likelihood` `[E + 1, N]`: whether the answer is right, and
    the logarithm of the probability it gives the label.
    """

    scores: NDArray[np.float32]
    correct: NDArray[np.bool_]
    log_likelihood: NDArray[np.float64]

    @classmethod
    def of(
        cls,
        probabilities: NDArray[np.float32],
        scores: NDArray[np.float32],
        labels: NDArray[np.int64],
        votes: Sequence[float],
    ) -> "Samples":
        """From probabilities `[E, N, K]`, scores `[E, N]`, labels `[N]` and votes `[E]`."""
        answers = np.concatenate([probabilities, vote(probabilities, votes)[None]])
        of_label = answers[:, np.arange(len(labels)), labels].astype(np.float64)
        return cls(scores, answers.argmax(axis=-1) == labels, np.log(of_label + 1e-12))


@dataclass(frozen=True)
class Candidate:
    """Thresholds `[E]` with what they gave on some samples: means over samples."""

    thresholds: tuple[float, ...]
    accuracy: float
    log_likelihood: float
    cost: float


def fit_frontier(samples: Samples, costs: Sequence[float], points: int) -> list[Candidate]:
    """At most `points` candidates, cautious to bold: falling cost, falling accuracy.

    `costs` `[E]`. Tries a grid of shares per exit, each with and without the vote, keeps those
    that no other beats in both accuracy and cost, and spreads `points` of them evenly over the
    cost. Equal accuracy, common on few samples, is decided by the likelihood of the labels.
    """
    exits = len(samples.scores)
    steps = max(2, int((_MOST_CANDIDATES / 2) ** (1 / max(1, exits - 1))))
    grid = np.linspace(0, 1, min(steps, 41))
    tried = [
        judge(thresholds_for_proportions(samples.scores, (*shares, last)), samples, costs)
        for shares in itertools.product(grid, repeat=exits - 1)
        for last in (0.0, 1.0)
    ]
    best: list[Candidate] = []
    for candidate in sorted(tried, key=lambda c: (c.cost, -c.accuracy, -c.log_likelihood)):
        if not best or _quality(candidate) > _quality(best[-1]):
            best.append(candidate)
    best.reverse()
    goals = np.linspace(best[0].cost, best[-1].cost, points)
    chosen = {min(range(len(best)), key=lambda i: abs(best[i].cost - goal)) for goal in goals}
    return [best[i] for i in sorted(chosen)]


def judge(thresholds: Sequence[float], samples: Samples, costs: Sequence[float]) -> Candidate:
    """What thresholds `[E]` give on the samples, at costs `[E]`."""
    exit = leave_at(samples.scores, thresholds)
    every = np.arange(len(exit))
    cost = np.asarray(costs, np.float64)[np.minimum(exit, len(samples.scores) - 1)].mean()
    return Candidate(
        tuple(thresholds),
        float(samples.correct[exit, every].mean()),
        float(samples.log_likelihood[exit, every].mean()),
        float(cost),
    )


def _quality(candidate: Candidate) -> tuple[float, float]:
    return candidate.accuracy, candidate.log_likelihood

"""Candidate thresholds, fitted on validation and frozen before calibration is looked at."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from edgeke.device.policy import ALWAYS, NEVER
from edgeke.policy.samples import OBJECTIVES, Objective, Samples, check_costs, check_logits
from edgeke.policy.solver import Solver
from edgeke.policy.tuning import folds, tune

__all__ = ["SMALL", "Candidate", "Sequences", "budgets", "cross_fitted_accuracy", "propose"]

# Below this many samples thresholds are fitted so closely that their own accuracy flatters.
SMALL = 2000


@dataclass(frozen=True)
class Candidate:
    """Thresholds `[E]`, named by the objective, its budget, and the deepest exit allowed."""

    name: str
    thresholds: tuple[float, ...]


# For each objective and cap: candidates from conservative to aggressive.
Sequences = dict[tuple[Objective, int], tuple[Candidate, ...]]


def propose(samples: Samples, costs: Sequence[float], step: float) -> Sequences:
    """For every cap and every budget on a grid, the most accurate and the least lossy thresholds.

    `costs` `[E]`; budgets are the multiples of `step` between the first exit's cost and the cap's,
    largest first, so that each sequence runs from conservative to aggressive. Without a cap the least lossy
    sequence begins with `full`, which loses nothing. Neighbours may be equal.
    """
    exits = len(samples.scores)
    check_costs(costs, exits)
    found: Sequences = {}
    for cap in reversed(range(exits)):
        name = "full" if cap == exits - 1 else f"exit_{cap}"
        always = Candidate(name, tuple(ALWAYS if e >= cap else NEVER for e in range(exits)))
        if cap == 0:
            found["accuracy", 0] = found["degradation", 0] = (always,)
            continue
        suffix = "" if cap == exits - 1 else f"_by_exit_{cap}"
        for objective in OBJECTIVES:
            solver, kept, most = Solver(samples, costs, objective, cap), None, -np.inf
            fitted = []
            for budget in reversed(budgets(costs[0], costs[cap], step)):
                thresholds = solver.within(budget)
                result = samples.result(thresholds, costs)
                worth = result.accuracy if objective == "accuracy" else -result.degradation
                if kept is None or worth >= most:  # what a smaller budget bought is still for sale
                    kept, most = thresholds, worth
                fitted.append(Candidate(f"{objective}_{budget:.3f}{suffix}", kept))
            first = [always] if objective == "degradation" and cap == exits - 1 else []
            found[objective, cap] = (*first, *reversed(fitted))
    return found


def budgets(least: float, most: float, step: float) -> list[float]:
    """The multiples of `step` in (least, most], falling, and `least` itself at the end."""
    multiples = np.arange(np.floor(most / step + 1e-9), np.ceil(least / step - 1e-9) - 1, -1) * step
    inside = [float(b) for b in multiples if b > least]
    return [*([most] if not inside or inside[0] < most else []), *inside, least]


def cross_fitted_accuracy(
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    costs: Sequence[float],
    score: str,
    step: float,
) -> dict[str, float]:
    """Accuracy per candidate's name on samples it was not fitted on; empty for large sets.

    Everything is fitted again without each fold. Candidates are matched by name: the same
    objective, budget and cap. `logits` `[E, N, K]`, `labels` `[N]`, `costs` `[E]`.
    """
    check_logits(logits, labels)
    if len(labels) >= SMALL:
        return {}
    right: dict[str, int] = {}
    for tuning, held in folds(logits, labels, partial(tune, score=score)):
        rest = np.setdiff1d(np.arange(len(labels)), held)
        fitted = propose(tuning.samples(logits[:, rest], labels[rest]), costs, step)
        unseen = tuning.samples(logits[:, held], labels[held])
        answered = {
            candidate.name: int((~unseen.wrong(candidate.thresholds)).sum())
            for candidate in itertools.chain.from_iterable(fitted.values())
        }
        right = {name: right.get(name, 0) + count for name, count in answered.items()}
    return {name: count / len(labels) for name, count in right.items()}

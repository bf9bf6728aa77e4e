"""Candidate thresholds, fitted on validation and frozen before calibration is read."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeke.device.policy import force_exit
from edgeke.params import Calibrate
from edgeke.policy.samples import Samples
from edgeke.policy.solver import best_thresholds
from edgeke.policy.thresholds import thresholds_for_proportions

_CAPS = 5  # sequences at most
_STEP = 0.005  # budgets are multiples of a multiple of this, so that names are short


@dataclass(frozen=True)
class Candidate:
    """Thresholds `[E]`, named by the greatest mean cost and the deepest exit allowed.

    `bias` `[K]` is added to the answer's log-probabilities (empty: zeros). With `unsure`, what no
    exit is sure of has no answer.
    """

    name: str
    thresholds: tuple[float, ...]
    bias: tuple[float, ...] = ()
    unsure: bool = False


@dataclass(frozen=True)
class FixedSequence:
    """Candidates that never pass the exit `cap`, from conservative to aggressive.

    `for_degradation`, `for_error`: which of them are tested for that risk; `for_miss`: which for
    degradation among the images of a class, by the class's number.
    """

    cap: int
    candidates: tuple[Candidate, ...]
    for_degradation: tuple[bool, ...]
    for_error: tuple[bool, ...]
    for_miss: dict[int, tuple[bool, ...]] = field(default_factory=dict)


def budgets_by_cap(costs: Sequence[float], points: int) -> dict[int, list[float]]:
    """The budgets of every sequence's candidates, by its cap, ascending.

    Costs `[E]` are shares of the plain main network's. Every exit is a cap, of many exits a few.
    Budgets are multiples of a step, of twice the step below the last exit: those sequences are for
    deadlines alone. It is the smallest under which all sequences together, with one candidate per
    cap that always answers there and the point `proportions`, have at most `points` candidates.
    """
    exits = len(costs)
    caps = sorted({round(cap) for cap in np.linspace(0, exits - 1, min(exits, _CAPS))})
    size = 0
    while True:
        size += 1
        budgets = {}
        for cap in caps:
            # In whole steps of _STEP: floating-point multiples would miss or repeat the ends.
            step = size if cap == exits - 1 else 2 * size
            first = int(np.floor(costs[0] / _STEP / step + 1e-9)) + 1
            end = int(np.ceil(costs[cap] / _STEP / step - 1e-9))
            budgets[cap] = [round(k * step * _STEP, 3) for k in range(first, end)]
        if sum(map(len, budgets.values())) <= max(0, points - len(caps) - 1):
            return budgets


def propose(
    samples: Samples, costs: Sequence[float], settings: Calibrate
) -> tuple[dict[int, list[Candidate]], Candidate]:
    """Candidates by cap, conservative to aggressive, and the candidate `proportions`.

    `costs` `[E]` are shares of the plain main network's. In each sequence the first candidate
    always answers at the cap, the last at exit 0. Between them there is one for each budget: the
    best thresholds that cost more than the next smaller budget. Neighbours may be equal, names
    never are.
    """
    exits, gain = len(costs), samples.gain()
    first = Candidate("exit_0", force_exit(0, exits))
    sequences = {0: [first]}
    for cap, budgets in budgets_by_cap(costs, settings.points).items():
        if cap == 0:
            continue
        name, suffix = ("full", "") if cap == exits - 1 else (f"exit_{cap}", f"_by_exit_{cap}")
        sequence = [first]
        solved = best_thresholds(samples, gain, costs, budgets, cap) if budgets else []
        for budget, thresholds in zip(budgets, solved, strict=True):
            # Where nothing costs that much, what costs less is the best that there is.
            known = sequence[-1].thresholds if thresholds is None else thresholds
            sequence.append(Candidate(f"cost_{budget:g}{suffix}", known))
        sequences[cap] = [Candidate(name, force_exit(cap, exits)), *reversed(sequence)]
    thresholds = thresholds_for_proportions(samples.scores, settings.shares(exits))
    return sequences, Candidate("proportions", thresholds)


def fixed_sequences(
    samples: Samples, proposed: dict[int, list[Candidate]], miss: Sequence[int] = ()
) -> tuple[FixedSequence, ...]:
    """The sequences as they are tested, deepest cap first: equal thresholds once, by one name.

    A candidate is tested for a risk unless a cheaper one of the sequence is better on these samples
    by more than a standard error: a main exit that is worse than an earlier one would otherwise end
    the test at once. What is tested for no risk is left out, but for `full`. `miss`: the classes
    whose misses are a risk of their own.
    """
    names: dict[tuple[float, ...], str] = {}
    sequences = []
    for cap, sequence in sorted(proposed.items(), reverse=True):
        for candidate in [sequence[0], *reversed(sequence)]:  # of equal ones the smallest budget
            names.setdefault(candidate.thresholds, candidate.name)
        thresholds = list(dict.fromkeys(candidate.thresholds for candidate in sequence))
        bad = np.stack([samples.degraded_at(each) for each in thresholds])
        degraded = _tested(bad)
        missed = [_tested(bad[:, samples.labels == label]) for label in miss]
        wrong = _tested(np.stack([~samples.correct_at(each) for each in thresholds]))
        rows = [
            (Candidate(names[each], each), *tested)
            for each, *tested in zip(thresholds, degraded, wrong, *missed, strict=True)
            if any(tested) or names[each] == "full"
        ]
        candidates, for_degradation, for_error, *for_miss = zip(*rows, strict=True)
        by_class = dict(zip(miss, for_miss, strict=True))
        sequences.append(FixedSequence(cap, candidates, for_degradation, for_error, by_class))
    return tuple(sequences)


def _tested(bad: NDArray[np.bool_]) -> list[bool]:
    """For each candidate of `bad` `[M, N]`, whether no later one is clearly better.

    The standard error of the difference of two counts is about the root of the number of samples on
    which the two differ (McNemar 1947).
    """
    tested = []
    for place, each in enumerate(bad):
        later = bad[place + 1 :]
        worse, better = (each & ~later).sum(axis=1), (later & ~each).sum(axis=1)
        tested.append(bool((worse - better <= np.sqrt(worse + better)).all()))
    return tested

"""Candidates of their own: answers that favour a class, thresholds that leave images unsure.

Both are fitted on validation and tested on calibration in one order each, from the candidate that
is least likely to break its promise on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeke.device.policy import Risk, force_exit
from edgeke.policy.candidates import Candidate, FixedSequence
from edgeke.policy.samples import Samples
from edgeke.policy.solver import best_thresholds

_BASES = 3  # sets of thresholds for the biases of a class
_RATES = np.geomspace(0.001, 0.3, 12)  # errors that pay for one more sure image
# Of candidates whose expected bounds are within this ratio one is tested: any other promises little
# more, and is one more test that can fail.
_APART = 1.3


@dataclass(frozen=True)
class Family:
    """Candidates in the order in which they are tested for one risk; `label` of which class."""

    risk: Risk
    class_name: str | None
    label: int | None
    candidates: tuple[Candidate, ...]


def recall_family(samples: Samples, sequence: FixedSequence, class_name: str, label: int) -> Family:
    """Biases of a class at some thresholds of the sequence, the fewest expected misses first.

    A bias is fitted to the images of the class that would be missed without it: it is what the
    nearest, half of them, and the furthest lack, and for images yet unseen some more. Expected
    misses are counted half as observed and half by the calibrated probabilities, so that more bias
    is always expected to miss less. What misses no less, alarms no less and costs no less than
    another is left out.
    """
    known = list(sequence.candidates)
    places = dict.fromkeys(np.linspace(0, len(known) - 1, _BASES).round().astype(int).tolist())
    inside = samples.labels == label
    rows = []
    for place in places:
        base = known[place]
        answers = samples.answers_at(base.thresholds).astype(np.float64)
        logs = np.log(answers + 1e-12)
        others = np.delete(logs, label, axis=1).max(axis=1)
        lacking = (others - logs[:, label])[inside]
        lacking = lacking[lacking > 0]
        top = float(lacking.max(initial=0.0))
        fitted = np.quantile(lacking, [0.25, 0.5, 0.75]).tolist() if len(lacking) else []
        depth = int(np.minimum(samples.exits(base.thresholds), len(samples.scores) - 1).sum())
        for bias in sorted({0.0, *(round(b + 0.005, 2) for b in (*fitted, top)), *_more(top)}):
            raised = logs[:, label] + bias
            taken = raised > others
            chance = 1 / (1 + np.exp(np.clip(others - raised, -50, 50)))
            missed = 0.5 * (~taken[inside]).mean() + 0.5 * (1 - chance[inside]).mean()
            alarms = int(taken[~inside].sum())
            vector = tuple(bias * (k == label) for k in range(answers.shape[1])) if bias else ()
            name = f"recall_{class_name}_{base.name}_{bias:g}" if bias else base.name
            rows.append((missed, alarms, depth, Candidate(name, base.thresholds, vector)))
    kept = [
        row
        for row in rows
        if not any(
            other[:3] != row[:3] and all(a <= b for a, b in zip(other[:3], row[:3], strict=True))
            for other in rows
        )
    ]
    kept.sort(key=lambda row: (row[0], -row[1]))
    return Family("min_recall", class_name, label, tuple(row[3] for row in kept))


def _more(top: float) -> list[float]:
    return [round(top + more, 2) for more in (1.0, 2.0, 4.0)]


def sure_family(samples: Samples, costs: Sequence[float], delta: float) -> Family:
    """Thresholds of most sure images less wrong ones, for several prices of a wrong one.

    An answer is worth 1, less a price where it is wrong; what no exit is sure of is worth nothing.
    Wrong is half what is observed and half what the probabilities say, so that thresholds do not
    end just beyond the last error of a small split. Of equals the cheaper. The
    first candidate is the one with the least bound to be expected; each next one has more sure
    images. Where none is sure of anything, the full network's answers are the only candidate.
    """
    exits, count = samples.scores.shape
    wrong = 0.5 * ~samples.correct[:exits] + 0.5 * (1 - samples.confidence()[:exits])
    paid = 0.5 * np.asarray(costs, np.float64)[:, None] / costs[-1] / count
    rows = []
    proposed = []
    for rate in _RATES:
        gain = np.zeros((exits + 1, count))
        gain[:exits] = 1 - wrong / rate - paid
        gain[exits] = -paid[-1]
        (thresholds,) = best_thresholds(samples, gain, costs, [costs[-1]])
        if thresholds is not None:
            proposed.append((f"sure_{rate:.2g}", thresholds))
    for name, thresholds in proposed:
        exit = samples.exits(thresholds)
        sure = exit < exits
        if not sure.any():
            continue
        error = float(wrong[exit[sure], np.flatnonzero(sure)].mean())
        surprise = math.log(1 / delta) / sure.sum()  # how far a rate exceeds what is observed
        bound = error + math.sqrt(2 * surprise * error) + surprise
        rows.append((bound, -int(sure.sum()), Candidate(name, thresholds, (), True)))
    rows.sort(key=lambda row: row[:2])
    kept: list[tuple[float, int, Candidate]] = []
    least = 0.0  # bound of a group, of which the candidate with most sure images is kept
    for row in rows:
        if kept and row[1] >= kept[-1][1]:  # no more sure images
            continue
        if kept and row[0] <= _APART * least:
            kept.pop()
        else:
            least = row[0]
        kept.append(row)
    everything = Candidate("sure_all", force_exit(exits - 1, exits), (), True)
    candidates = [row[2] for row in kept] or [everything]
    return Family("max_sure_error", None, None, tuple(candidates))


def pairs_so_far(counts: Sequence[tuple[int, int]]) -> list[tuple[tuple[int, int], ...]]:
    """For each candidate the counts (bad, images) of it and of those before it.

    A pair that has no more bad of no fewer images than another has no greater bound at any delta,
    and is left out.
    """
    kept: list[tuple[int, int]] = []
    history = []
    for bad, images in counts:
        if not any(b >= bad and n <= images for b, n in kept):
            kept = [(b, n) for b, n in kept if not (bad >= b and images <= n)]
            kept.append((bad, images))
        history.append(tuple(kept))
    return history

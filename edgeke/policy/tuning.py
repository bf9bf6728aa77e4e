"""What turns logits into answers and scores: temperatures, a score, votes. Fitted on validation."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeke.device.scores import SCORES, Score, calibrated_probabilities
from edgeke.policy.learned import fit_learned
from edgeke.policy.ranking import area_under_risk_coverage, auroc
from edgeke.policy.samples import Samples
from edgeke.policy.temperatures import fit_temperature
from edgeke.policy.votes import fit_votes

__all__ = ["SCORE_NAMES", "Tuning", "folds", "rank_scores", "tune"]

SCORE_NAMES = (*SCORES, "learned")

_FOLDS = 5

_Floats = NDArray[np.float32]
_Integers = NDArray[np.int64]
_Fitted = TypeVar("_Fitted")


@dataclass(frozen=True)
class Tuning:
    """Temperatures and votes `[E]`, and the score."""

    temperatures: tuple[float, ...]
    votes: tuple[float, ...]
    score: Score

    def probabilities(self, logits: _Floats) -> _Floats:
        """Calibrated probabilities of logits `[E, N, K]`."""
        return calibrated_probabilities(logits, self.temperatures)

    def samples(self, logits: _Floats, labels: _Integers) -> Samples:
        """What logits `[E, N, K]` answer under this tuning."""
        probabilities = self.probabilities(logits)
        return Samples.of(probabilities, self.score.of(probabilities), labels, self.votes)


def tune(logits: _Floats, labels: _Integers, score: str) -> Tuning:
    """Fit temperatures, votes and the named score to logits `[E, N, K]` and labels `[N]`."""
    temperatures = tuple(fit_temperature(at_exit, labels) for at_exit in logits)
    probabilities = calibrated_probabilities(logits, temperatures)
    fitted = fit_learned(probabilities, labels) if score == "learned" else Score(score)
    return Tuning(temperatures, fit_votes(probabilities, labels), fitted)


def folds(
    logits: _Floats, labels: _Integers, fit: Callable[[_Floats, _Integers], _Fitted]
) -> Iterator[tuple[_Fitted, _Integers]]:
    """Cross-fitting: what `fit` makes of all but a fold, and the fold's indices; five times.

    Samples are dealt to the folds in a fixed random order, fewer folds where samples are few.
    """
    order = np.random.default_rng(0).permutation(len(labels))
    for held in np.array_split(order, min(_FOLDS, len(labels))):
        rest = np.setdiff1d(order, held)
        rest = rest if len(rest) else held
        yield fit(logits[:, rest], labels[rest]), held


def rank_scores(logits: _Floats, labels: _Integers) -> tuple[str, dict[str, float]]:
    """The score that ranks best, and every score's AURC and AUROC per exit, cross-fitted.

    Best is the least mean AURC over the exits where something can still be skipped (all but the
    last); of equals the simplest. Each sample is scored by what was fitted without it.
    """
    right = logits.argmax(axis=-1) == labels
    metrics: dict[str, float] = {}
    mean: dict[str, float] = {}
    for name in SCORE_NAMES:
        scores = np.empty(right.shape, np.float32)
        for tuning, held in folds(logits, labels, partial(tune, score=name)):
            scores[:, held] = tuning.score.of(tuning.probabilities(logits[:, held]))
        risks = []
        for exit, (at_exit, correct) in enumerate(zip(scores, right, strict=True)):
            risks.append(area_under_risk_coverage(at_exit, correct))
            metrics[f"score/{name}/exit_{exit}/aurc"] = risks[-1]
            metrics[f"score/{name}/exit_{exit}/auroc"] = auroc(at_exit, correct)
        mean[name] = float(np.mean(risks[:-1]))
    return min(mean, key=lambda name: mean[name]), metrics

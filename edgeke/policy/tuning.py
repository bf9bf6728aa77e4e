"""What turns logits into answers and scores: temperatures, a score, votes. Fitted on validation."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeke.device.scores import SCORES, Score, calibrated_probabilities
from edgeke.params import Calibrate
from edgeke.policy.learned import fit_learned
from edgeke.policy.ranking import area_under_risk_coverage, auroc
from edgeke.policy.samples import ExitLogits, Samples
from edgeke.policy.temperatures import fit_temperature
from edgeke.policy.votes import fit_votes

_FOLDS = 5


@dataclass(frozen=True)
class Tuning:
    """Temperatures and votes `[E]`, and the score."""

    temperatures: tuple[float, ...]
    votes: tuple[float, ...]
    score: Score

    def probabilities(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Calibrated probabilities of logits `[E, N, K]`."""
        return calibrated_probabilities(logits, self.temperatures)

    def samples(self, split: ExitLogits) -> Samples:
        """What the exits answer under this tuning."""
        probabilities = self.probabilities(split.logits)
        scores = self.score.of(probabilities)
        return Samples.of(probabilities, scores, split.labels, self.votes, split.reference)

    def with_score(self, name: str, split: ExitLogits) -> "Tuning":
        """The same with the named score, fitted to the split where it is learned."""
        if name != "learned":
            return replace(self, score=Score(name))
        return replace(self, score=fit_learned(self.probabilities(split.logits), split.labels))


@dataclass(frozen=True)
class Fold:
    """What was fitted to `fitted`, all but a fold, and `left_out`: the fold's indices `[M]`."""

    tuning: Tuning
    fitted: ExitLogits
    left_out: NDArray[np.int64]


def tune(split: ExitLogits, settings: Calibrate) -> Tuning:
    """Fit temperatures and votes, unless they are fixed; the score is the maximal probability."""
    exits = len(split.logits)
    temperatures = (1.0,) * exits
    if settings.temperatures == "fitted":
        temperatures = tuple(fit_temperature(at_exit, split.labels) for at_exit in split.logits)
    votes = settings.votes
    if votes == "fitted":
        votes = fit_votes(calibrated_probabilities(split.logits, temperatures), split.labels)
    return Tuning(temperatures, votes, Score("max_probability"))


def cross_fit(split: ExitLogits, settings: Calibrate) -> list[Fold]:
    """Fit again without each of five folds (fewer where samples are few).

    Samples are dealt to the folds in a fixed random order.
    """
    order = np.random.default_rng(0).permutation(len(split.labels))
    folds = []
    for left_out in np.array_split(order, min(_FOLDS, len(order))):
        rest = np.setdiff1d(order, left_out)
        fitted = split.at(rest if len(rest) else left_out)
        folds.append(Fold(tune(fitted, settings), fitted, left_out))
    return folds


def rank_scores(split: ExitLogits, folds: list[Fold]) -> tuple[str, dict[str, float]]:
    """The score that ranks best, and every score's AURC and AUROC per exit, cross-fitted.

    Best is the least mean AURC over the exits where something can still be skipped (all but the
    last); of equals the simplest. Each sample is scored by what was fitted without it.
    """
    right = split.logits.argmax(axis=-1) == split.labels
    metrics: dict[str, float] = {}
    mean: dict[str, float] = {}
    for name in (*SCORES, "learned"):
        scores = np.empty(right.shape, np.float32)
        for fold in folds:
            tuning = fold.tuning.with_score(name, fold.fitted)
            probabilities = tuning.probabilities(split.logits[:, fold.left_out])
            scores[:, fold.left_out] = tuning.score.of(probabilities)
        risks = []
        for exit, (at_exit, correct) in enumerate(zip(scores, right, strict=True)):
            risks.append(area_under_risk_coverage(at_exit, correct))
            metrics[f"score/{name}/exit_{exit}/aurc"] = risks[-1]
            metrics[f"score/{name}/exit_{exit}/auroc"] = auroc(at_exit, correct)
        mean[name] = float(np.mean(risks[:-1]))
    return min(mean, key=lambda name: mean[name]), metrics

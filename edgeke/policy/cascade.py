"""The cascade over saved answers: every sample and every exit at once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeke.device.scores import vote

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """What the cascade answered: `exit` `[N]` in 0..E (E = voted), `probabilities` `[N, K]`."""

    exit: Integers
    probabilities: Floats


def leave_at(scores: Floats, thresholds: Sequence[float]) -> Integers:
    """The first exit whose score exceeds its threshold, E where none does: `[E, N]` to `[N]`."""
    sure = scores > np.asarray(thresholds, np.float32)[:, None]
    return np.where(sure.any(axis=0), sure.argmax(axis=0), len(scores)).astype(np.int64)


def run_cascade(
    probabilities: Floats, scores: Floats, thresholds: Sequence[float], votes: Sequence[float]
) -> Outcome:
    """Answer every sample at the first exit that is sure, or by vote.

    `probabilities` `[E, N, K]`, `scores` `[E, N]`, `thresholds` and `votes` `[E]`.
    """
    exit = leave_at(scores, thresholds)
    answers = np.concatenate([probabilities, vote(probabilities, votes)[None]])
    return Outcome(exit, answers[exit, np.arange(len(exit))])

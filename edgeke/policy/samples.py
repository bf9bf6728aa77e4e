"""What every exit answered on some samples, and what thresholds make of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgeke.device.scores import vote
from edgeke.errors import InputError
from edgeke.policy.cascade import leave_at

__all__ = ["OBJECTIVES", "Objective", "Result", "Samples", "check_costs", "check_logits"]

Objective = Literal["accuracy", "degradation"]
OBJECTIVES: tuple[Objective, ...] = ("accuracy", "degradation")

_LEAST = 1e-12  # probability below which every miss is equally bad


@dataclass(frozen=True)
class Result:
    """Means over samples: accuracy, loss (full network right, answer wrong), and cost."""

    accuracy: float
    degradation: float
    cost: float


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
        return cls(scores, answers.argmax(axis=-1) == labels, np.log(of_label + _LEAST))

    @property
    def degraded(self) -> NDArray[np.bool_]:
        """Where the full network is right and the answer wrong, `[E + 1, N]`."""
        degraded: NDArray[np.bool_] = self.correct[len(self.scores) - 1] & ~self.correct
        return degraded

    def gain(self, objective: Objective) -> NDArray[np.float64]:
        """What an answer is worth, `[E + 1, N]`: one for a right one, or minus one for a lost one.

        Equal sums, common on few samples, are decided by the likelihood of the labels: it is scaled
        so that over all samples it cannot outweigh a single answer.
        """
        worth = self.correct if objective == "accuracy" else -self.degraded.astype(np.float64)
        gain: NDArray[np.float64] = worth + self.log_likelihood / (
            -np.log(_LEAST) * 1.1 * self.correct.shape[1]
        )
        return gain

    def exits(self, thresholds: Sequence[float]) -> NDArray[np.int64]:
        """Where each sample leaves, `[N]`; E = voted."""
        return leave_at(self.scores, thresholds)

    def wrong(self, thresholds: Sequence[float]) -> NDArray[np.bool_]:
        """Which samples are answered wrong, `[N]`."""
        return ~self._pick(self.correct, thresholds)

    def degradations(self, thresholds: Sequence[float]) -> NDArray[np.bool_]:
        """Which samples the full network answers right and the thresholds wrong, `[N]`."""
        return self._pick(self.degraded, thresholds)

    def result(self, thresholds: Sequence[float], costs: Sequence[float]) -> Result:
        """What thresholds `[E]` give at costs `[E]`; voted samples pay for the last exit."""
        paid = np.minimum(self.exits(thresholds), len(self.scores) - 1)
        return Result(
            float(1 - self.wrong(thresholds).mean()),
            float(self.degradations(thresholds).mean()),
            float(np.asarray(costs, np.float64)[paid].mean()),
        )

    def _pick(self, table: NDArray[np.bool_], thresholds: Sequence[float]) -> NDArray[np.bool_]:
        exit = self.exits(thresholds)
        return table[exit, np.arange(len(exit))]


def check_logits(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> None:
    """Refuse logits `[E, N, K]` and labels `[N]` that no policy can be fitted on."""
    if logits.ndim != 3 or logits.shape[0] < 2:
        raise InputError(
            f"logits of shape {list(logits.shape)}: a policy chooses between exits and needs at "
            "least two of them, as [exits, samples, classes]; add an exit to branchynet.layout"
        )
    if len(labels) != logits.shape[1] or not len(labels):
        raise InputError(
            f"{logits.shape[1]} samples and {len(labels)} labels: give one label per sample, and "
            "at least one sample"
        )
    if not np.isfinite(logits).all():
        exit, sample, _ = np.argwhere(~np.isfinite(logits))[0]
        raise InputError(
            f"logits of exit {exit} are not finite at sample {sample}; the network diverged or the "
            "file is broken: train or export again"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[2]:
        wrong = int(labels[(labels < 0) | (labels >= logits.shape[2])][0])
        raise InputError(
            f"label {wrong} is not one of the {logits.shape[2]} classes 0 to {logits.shape[2] - 1}"
        )


def check_costs(costs: Sequence[float], exits: int) -> None:
    """Refuse costs that are not `[E]` positive and increasing."""
    sound = len(costs) == exits and bool(np.isfinite(costs).all()) and costs[0] > 0
    if not sound or any(b <= a for a, b in zip(costs, costs[1:], strict=False)):
        raise InputError(
            f"costs {list(costs)} must be {exits} positive numbers that increase from exit to exit;"
            " an exit that costs no less than a deeper one is better left out"
        )

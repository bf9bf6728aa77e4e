"""What every exit answered on some samples, and what thresholds make of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeke.device.scores import biased, vote
from edgeke.errors import InputError
from edgeke.policy.cascade import leave_at

_LEAST = 1e-12  # probability below which every miss is equally bad
# What a right answer is worth where the reference is wrong: it raises accuracy, but not does not
# lower degradation. Half of a whole answer serves requests for either (docs/results.md).
_CORRECTED = 0.5


@dataclass(frozen=True)
class ExitLogits:
    """What the exits answered on one split: logits `[E, N, K]` and labels `[N]`.

    `reference` `[N]`: where the network that degradation is measured against is right; by default
    where the last exit is. Errors: InputError for what no policy can be fitted on.
    """

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]
    reference: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        logits, labels = self.logits, self.labels
        if logits.ndim != 3 or logits.shape[0] < 2:
            raise InputError(
                f"logits of shape {list(logits.shape)}: a policy chooses between exits and needs "
                "at least two of them, as [exits, samples, classes]; add an exit to "
                "branchynet.layout"
            )
        if len(labels) != logits.shape[1] or not len(labels):
            raise InputError(
                f"{logits.shape[1]} samples and {len(labels)} labels: give one label per sample, "
                "and at least one sample"
            )
        if not np.isfinite(logits).all():
            exit, sample, _ = np.argwhere(~np.isfinite(logits))[0]
            raise InputError(
                f"logits of exit {exit} are not finite at sample {sample}; the network diverged or "
                "the file is broken: train or export again"
            )
        if labels.min() < 0 or labels.max() >= logits.shape[2]:
            wrong = int(labels[(labels < 0) | (labels >= logits.shape[2])][0])
            raise InputError(
                f"label {wrong} is not one of the {logits.shape[2]} classes 0 to "
                f"{logits.shape[2] - 1}"
            )

    def correct_at(self, exit: int) -> NDArray[np.bool_]:
        """Where exit `exit` is right, `[N]`."""
        correct: NDArray[np.bool_] = self.logits[exit].argmax(-1) == self.labels
        return correct

    def at(self, samples: NDArray[np.int64]) -> "ExitLogits":
        """The same for some of the samples, by their indices."""
        reference = None if self.reference is None else self.reference[samples]
        return ExitLogits(self.logits[:, samples], self.labels[samples], reference)


def one_of_each(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The index of one sample of each group, in order; `groups` `[N]` are their numbers.

    Drawn with a fixed seed, whatever the answers are: samples of different groups are independent,
    and those of one group are not.
    """
    order = np.random.default_rng(0).permutation(len(groups))
    first = np.unique(groups[order], return_index=True)[1]
    return np.sort(order[first])


@dataclass(frozen=True)
class Samples:
    """What every exit, and last the vote, would answer on some samples.

    `scores` `[E, N]`; `correct` and `log_likelihood` `[E + 1, N]`: whether the answer is right, and
    the logarithm of the probability it gives the label. `reference` `[N]`: where the network is
    right that degradation is measured against. `answers` `[E + 1, N, K]` are their probabilities,
    `labels` `[N]` the images' classes.
    """

    scores: NDArray[np.float32]
    correct: NDArray[np.bool_]
    log_likelihood: NDArray[np.float64]
    reference: NDArray[np.bool_]
    answers: NDArray[np.float32]
    labels: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        probabilities: NDArray[np.float32],
        scores: NDArray[np.float32],
        labels: NDArray[np.int64],
        votes: Sequence[float],
        reference: NDArray[np.bool_] | None = None,
    ) -> "Samples":
        """From probabilities `[E, N, K]`, scores `[E, N]`, labels `[N]` and votes `[E]`."""
        answers = np.concatenate([probabilities, vote(probabilities, votes)[None]])
        likelihood = answers[:, np.arange(len(labels)), labels].astype(np.float64)
        correct = answers.argmax(axis=-1) == labels
        reference = correct[len(scores) - 1] if reference is None else reference
        return cls(scores, correct, np.log(likelihood + _LEAST), reference, answers, labels)

    def gain(self) -> NDArray[np.float64]:
        """What an answer is worth, `[E + 1, N]`: a right one 1, where the reference is wrong half.

        Equal sums, common on few samples, are decided by the likelihood of the labels: it is scaled
        so that over all samples it cannot outweigh half an answer.
        """
        worth = np.where(self.reference, 1.0, _CORRECTED) * self.correct
        scale = -np.log(_LEAST) * 1.1 * self.correct.shape[1] / _CORRECTED
        gain: NDArray[np.float64] = worth + self.log_likelihood / scale
        return gain

    def exits(self, thresholds: Sequence[float]) -> NDArray[np.int64]:
        """Where each sample leaves, `[N]`; E = voted."""
        return leave_at(self.scores, thresholds)

    def correct_at(self, thresholds: Sequence[float]) -> NDArray[np.bool_]:
        """Which samples are answered right, `[N]`."""
        exit = self.exits(thresholds)
        return self.correct[exit, np.arange(len(exit))]

    def degraded_at(self, thresholds: Sequence[float]) -> NDArray[np.bool_]:
        """Which samples the reference answers right and the thresholds wrong, `[N]`."""
        degraded: NDArray[np.bool_] = self.reference & ~self.correct_at(thresholds)
        return degraded

    def confidence(self) -> NDArray[np.float64]:
        """The probability of each answer, `[E + 1, N]`."""
        confidence: NDArray[np.float64] = self.answers.max(axis=-1).astype(np.float64)
        return confidence

    def answers_at(self, thresholds: Sequence[float]) -> NDArray[np.float32]:
        """The probabilities with which each sample leaves, `[N, K]`."""
        exit = self.exits(thresholds)
        return self.answers[exit, np.arange(len(exit))]

    def labels_at(
        self, thresholds: Sequence[float], bias: Sequence[float] = (), unsure: bool = False
    ) -> NDArray[np.int64]:
        """Each sample's answer, `[N]`; -1 where no exit is sure and that counts as no answer."""
        answers = self.answers_at(thresholds)
        answer: NDArray[np.int64] = (biased(answers, bias) if bias else answers).argmax(axis=-1)
        if unsure:
            answer = np.where(self.exits(thresholds) == len(self.scores), -1, answer)
        return answer

    def cost(self, thresholds: Sequence[float], costs: Sequence[float]) -> float:
        """The mean cost at costs `[E]`; voted samples pay for the last exit."""
        paid = np.minimum(self.exits(thresholds), len(self.scores) - 1)
        return float(np.asarray(costs, np.float64)[paid].mean())


@dataclass(frozen=True)
class EitherSamples(Samples):
    """Samples that may be answered as in `other` instead: an answer is as bad as the worse one.

    Both leave at the same exits; only what the last one says differs, and with it the vote.
    """

    other: Samples

    def correct_at(self, thresholds: Sequence[float]) -> NDArray[np.bool_]:
        """Which samples both answer right, `[N]`."""
        return super().correct_at(thresholds) & self.other.correct_at(thresholds)

    def labels_at(
        self, thresholds: Sequence[float], bias: Sequence[float] = (), unsure: bool = False
    ) -> NDArray[np.int64]:
        """A wrong answer where there is one, -1 where one of both is unsure, else the right one."""
        own, other = (
            super().labels_at(thresholds, bias, unsure),
            self.other.labels_at(thresholds, bias, unsure),
        )
        worse = np.where((own < 0) | (other < 0), -1, own)
        for each in (other, own):
            worse = np.where((each >= 0) & (each != self.labels), each, worse)
        return worse


def check_costs(costs: Sequence[float], exits: int) -> None:
    """Refuse costs that are not `[E]` positive and increasing."""
    sound = len(costs) == exits and bool(np.isfinite(costs).all()) and costs[0] > 0
    if not sound or any(b <= a for a, b in zip(costs, costs[1:], strict=False)):
        raise InputError(
            f"costs {list(costs)} must be {exits} positive numbers that increase from exit to exit;"
            " an exit that costs no less than a deeper one is better left out"
        )

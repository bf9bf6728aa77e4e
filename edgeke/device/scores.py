"""From logits to calibrated probabilities, scores (how sure an exit is, in [0, 1]) and the vote."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Keeps the logarithm finite where a probability is 0; the graph uses the same.
_SMALLEST = 1e-12


def calibrated_probabilities(logits: Floats, temperatures: Sequence[float]) -> Floats:
    """Softmax of each exit's logits `[E, N, K]` over its temperature `[E]`; float32 `[E, N, K]`.

    Single precision throughout, as the exported graph computes it.
    """
    scaled = logits.astype(np.float32) / np.asarray(temperatures, np.float32)[:, None, None]
    raised = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    probabilities: Floats = raised / raised.sum(axis=-1, keepdims=True)
    return probabilities


def max_probability(probabilities: Floats) -> Floats:
    """The largest class probability: `[..., K]` to `[...]` in [0, 1]."""
    score: Floats = probabilities.max(axis=-1)
    return score


def margin(probabilities: Floats) -> Floats:
    """The largest class probability less the second: `[..., K]` to `[...]` in [0, 1]."""
    two = np.partition(probabilities, -2, axis=-1)[..., -2:]
    score: Floats = two[..., 1] - two[..., 0]
    return score


def entropy(probabilities: Floats) -> Floats:
    """One less the entropy over its greatest value ln K: `[..., K]` to `[...]` in [0, 1]."""
    logs = np.log(np.maximum(probabilities, np.float32(_SMALLEST)))
    spread = -(probabilities * logs).sum(axis=-1) / np.float32(np.log(probabilities.shape[-1]))
    score: Floats = np.clip(1 - spread, 0, 1).astype(np.float32)
    return score


SCORES: dict[str, Callable[[Floats], Floats]] = {
    "max_probability": max_probability,
    "margin": margin,
    "entropy": entropy,
}


def agreement(one: Floats, other: Floats) -> Floats:
    """The probability that two exits, drawing a class each, draw the same: `[N, K]` to `[N]`."""
    score: Floats = (one * other).sum(axis=-1)
    return score


def statistics(probabilities: Floats, exit: int) -> Floats:
    """What the learned score reads at an exit, `[N, 4 exit + 3]`, from probabilities `[E, N, K]`.

    The three plain scores of this and every earlier exit, shallow to deep, then the agreement of
    each earlier exit with this one.
    """
    plain = [score(p) for p in probabilities[: exit + 1] for score in SCORES.values()]
    agreements = [agreement(earlier, probabilities[exit]) for earlier in probabilities[:exit]]
    return np.stack([*plain, *agreements], axis=-1)


@dataclass(frozen=True)
class Score:
    """A score by name; `learned` has a bias and one weight per statistic, for every exit."""

    name: str
    weights: tuple[tuple[float, ...], ...] = ()

    def of(self, probabilities: Floats) -> Floats:
        """How sure every exit is of every sample: `[E, N, K]` to `[E, N]`."""
        return np.stack([self.at(probabilities, exit) for exit in range(len(probabilities))])

    def at(self, probabilities: Floats, exit: int) -> Floats:
        """How sure one exit is, `[N]`, from probabilities `[E, N, K]` of exits up to it at least.

        Deeper exits are never read, so a device can decide before it runs them.
        """
        if self.name in SCORES:
            return SCORES[self.name](probabilities[exit])
        bias, *weights = self.weights[exit]
        logit = statistics(probabilities, exit) @ np.asarray(weights, np.float32) + np.float32(bias)
        # Half a tanh is the logistic function without an overflow.
        sure: Floats = np.float32(0.5) + np.float32(0.5) * np.tanh(logit / np.float32(2))
        return sure.astype(np.float32)


def biased(probabilities: Floats, bias: Sequence[float]) -> Floats:
    """Probabilities `[N, K]` after `bias` `[K]` is added to their logarithms, summing to what they
    did. A bias of zeros changes no bit.
    """
    raised = probabilities * np.exp(np.asarray(bias, np.float32))
    total = raised.sum(axis=-1, keepdims=True) / probabilities.sum(axis=-1, keepdims=True)
    shifted: Floats = raised / total
    return shifted


def vote(probabilities: Floats, votes: Sequence[float]) -> Floats:
    """The exits' probabilities `[E, N, K]` averaged with weights `votes` `[E]`: `[N, K]`."""
    weights = np.asarray(votes, np.float32)
    averaged: Floats = np.tensordot(weights / weights.sum(), probabilities, axes=1)
    return averaged.astype(np.float32)

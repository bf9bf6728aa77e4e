"""From logits to calibrated probabilities and scores."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

__all__ = ["SCORES", "calibrated_probabilities", "max_probability"]

Floats = NDArray[np.float32]


def calibrated_probabilities(logits: Floats, temperatures: Sequence[float]) -> Floats:
    """Softmax of each exit's logits `[E, N, K]` over its temperature `[E]`; float32 `[E, N, K]`.

    Single precision throughout, as the exported graph computes it.
    """
    scaled = logits.astype(np.float32) / np.asarray(temperatures, np.float32)[:, None, None]
    probabilities: Floats = softmax(scaled, axis=-1).astype(np.float32)
    return probabilities


def max_probability(probabilities: Floats) -> Floats:
    """The largest class probability: `[..., K]` to `[...]` in [0, 1]."""
    score: Floats = probabilities.max(axis=-1)
    return score


SCORES: dict[str, Callable[[Floats], Floats]] = {"max_probability": max_probability}

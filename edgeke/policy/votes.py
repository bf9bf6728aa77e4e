"""Weights of the vote that answers when no exit was sure."""

import numpy as np
from numpy.typing import NDArray

_STEPS = 200


def fit_votes(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[float, ...]:
    """Weights `[E]`, summing to 1, under which the mixture of exits is most likely.

    `probabilities` `[E, N, K]`. Expectation maximisation for mixture weights (Dempster et al.
    1977): the likelihood is concave in them, and every step raises it.
    """
    likelihood = probabilities[:, np.arange(len(labels)), labels].astype(np.float64) + 1e-12
    weights = np.full(len(likelihood), 1 / len(likelihood))
    for _ in range(_STEPS):
        joint = weights[:, None] * likelihood
        weights = (joint / joint.sum(axis=0)).mean(axis=1)
    return tuple(weights.tolist())

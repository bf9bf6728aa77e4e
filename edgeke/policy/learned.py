"""The learned score: how likely each exit's answer is right."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

from edgeke.device.scores import Score, statistics


def fit_learned(probabilities: NDArray[np.float32], labels: NDArray[np.int64]) -> Score:
    """Logistic regression of "this answer is right" per exit, on `statistics`.

    `probabilities` `[E, N, K]`, `labels` `[N]`. The standardised weights have a Gaussian prior of
    variance 1, so that few samples, or none that is wrong, give small weights.
    """
    weights = []
    for exit, at_exit in enumerate(probabilities):
        right = at_exit.argmax(axis=-1) == labels
        weights.append(_logistic(statistics(probabilities, exit).astype(np.float64), right))
    return Score("learned", tuple(weights))


def _logistic(inputs: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[float, ...]:
    """Bias and weights `[1 + F]` for inputs `[N, F]` that are not standardised."""
    mean, spread = inputs.mean(axis=0), inputs.std(axis=0) + 1e-6
    design = np.column_stack([np.ones(len(inputs)), (inputs - mean) / spread])

    def loss(at: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        logits = design @ at
        value = np.logaddexp(0, np.where(right, -logits, logits)).sum() + 0.5 * at @ at
        return float(value), design.T @ (expit(logits) - right) + at

    fitted = minimize(loss, np.zeros(design.shape[1]), jac=True, method="L-BFGS-B").x
    slopes = fitted[1:] / spread
    return (float(fitted[0] - slopes @ mean), *slopes.tolist())

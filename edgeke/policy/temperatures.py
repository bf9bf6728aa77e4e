"""Temperature scaling per exit (Guo et al. 2017), and how well probabilities match accuracy."""

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

# A temperature beyond this range says that the samples do not determine it.
_LOG_RANGE = (np.log(0.05), np.log(20.0))


def negative_log_likelihood(
    logits: NDArray[np.float32], labels: NDArray[np.int64], temperature: float
) -> float:
    """Mean of -ln softmax(logits / temperature)[label]; logits `[N, K]`."""
    log_probabilities = log_softmax(logits.astype(np.float64) / temperature, axis=-1)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def fit_temperature(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The temperature in [0.05, 20] with the least negative log-likelihood; logits `[N, K]`.

    One more answer is counted as uniform over the classes (as Platt 1999 smooths his targets): on
    few samples without an error the likelihood alone would sharpen without end.
    """
    others = 1 / (len(labels) + 1)
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    right = shifted[np.arange(len(labels)), labels].mean()
    target = (1 - others) * right + others * shifted.mean()

    def loss(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        normaliser = np.log(np.exp(shifted / temperature).sum(axis=-1)).mean()
        return float(normaliser - target / temperature)

    fitted = minimize_scalar(loss, bounds=_LOG_RANGE, method="bounded")
    return float(np.exp(fitted.x))


def reliability(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], bins: int = 10
) -> list[dict[str, float]]:
    """Mean confidence, accuracy and count per occupied bin of max probability `[N, K]`."""
    confidence = probabilities.max(axis=-1).astype(np.float64)
    correct = probabilities.argmax(axis=-1) == labels
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    return [
        {
            "confidence": float(confidence[bin_of == b].mean()),
            "accuracy": float(correct[bin_of == b].mean()),
            "count": int((bin_of == b).sum()),
        }
        for b in np.unique(bin_of)
    ]


def calibration_error(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], bins: int = 15
) -> float:
    """Expected calibration error: |accuracy - confidence| averaged over samples' bins."""
    rows = reliability(probabilities, labels, bins)
    gaps = sum(row["count"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return gaps / len(labels)

"""Which exits are worth having, on the validation split."""

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

from edgeke.policy.temperatures import fit_temperature

_ONE_SIDED = 1.645  # standard errors: 5 % of a normal distribution lie above


def losses(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cross-entropy of each answer, `[E, N]`, at the temperature that fits its exit best."""
    scaled = [answers / fit_temperature(answers, labels) for answers in logits.astype(np.float64)]
    result: NDArray[np.float64] = -log_softmax(scaled, axis=-1)[:, np.arange(len(labels)), labels]
    return result


def best_exit(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> int:
    """The exit with the most right answers; of several the one of least loss. `[E, N, K]`."""
    right = (logits.argmax(-1) == labels).sum(-1)
    loss = losses(logits, labels).mean(-1)
    return max(range(len(logits)), key=lambda exit: (right[exit], -loss[exit]))


def last_useful(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> int:
    """The deepest exit that may be as good as the best, and no less than the second exit.

    Worse are those whose loss is above the best exit's in a paired one-sided test at 5 %: on few
    images the number of right answers tells little. A policy needs two exits.
    """
    best, loss = best_exit(logits, labels), losses(logits, labels)
    more = loss - loss[best]
    chance = _ONE_SIDED * more.std(-1) / len(labels) ** 0.5
    useful = [e for e in range(len(loss)) if e == best or more[e].mean() < chance[e]]
    return max(useful[-1], 1)

"""Logits to fit policies on: drawn with a known law, or of real digits."""

from functools import cache

import numpy as np
from scipy.special import log_softmax

STRENGTHS = (1.5, 2.5, 3.5)


def draw(
    samples: int, seed: int = 0, classes: int = 5, strengths: tuple[float, ...] = STRENGTHS
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[E, N, K]` and labels `[N]`: deeper exits are surer, hard images are hard for all."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, samples)
    hardness = random.normal(0, 1.5, samples)
    exits = []
    for strength in strengths:
        logits = random.normal(0, 1, (samples, classes))
        logits[np.arange(samples), labels] += strength - hardness
        exits.append(logits)
    return np.array(exits, np.float32), labels


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Logits `[3, 1197, 10]` and labels of real digits, from three classifiers of rising strength.

    They see 2 x 2 averages, 4 x 4 averages, and all 8 x 8 pixels, and learnt on 600 other images.
    """
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import SVC

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order] / 16, labels[order]
    exits = []
    for side, model in (
        (2, LogisticRegression(max_iter=500)),
        (4, LogisticRegression(max_iter=500)),
        (8, SVC()),
    ):
        block = 8 // side
        seen = (
            images.reshape(-1, side, block, side, block).mean(axis=(2, 4)).reshape(len(images), -1)
        )
        model.fit(seen[:600], labels[:600])
        exits.append(log_softmax(model.decision_function(seen[600:]), axis=1))
    return np.array(exits, np.float32), labels[600:].astype(np.int64)

"""Logits to fit policies on: drawn with a known law, or of real digits."""

from functools import cache

import numpy as np
from scipy.special import log_softmax

from edgeke.params import Calibrate
from edgeke.policy.samples import ExitLogits

STRENGTHS = (1.5, 2.5, 3.5)


def settings(**changes: object) -> Calibrate:
    """Parameters of calibration; fast, since the score is not chosen."""
    values = {
        "score": "max_probability",
        "proportions": 0.5,
        "points": 30,
        "temperatures": "fitted",
        "votes": "fitted",
        "delta": 0.1,
        "requirements": (),
        "partitions": (),
    }
    return Calibrate(**{**values, **changes})


def draw(
    samples: int, seed: int = 0, classes: int = 5, strengths: tuple[float, ...] = STRENGTHS
) -> ExitLogits:
    """A split of a known law: deeper exits are surer, hard images are hard for all."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, samples)
    hardness = random.normal(0, 1.5, samples)
    exits = []
    for strength in strengths:
        logits = random.normal(0, 1, (samples, classes))
        logits[np.arange(samples), labels] += strength - hardness
        exits.append(logits)
    return ExitLogits(np.array(exits, np.float32), labels)


@cache
def digits() -> ExitLogits:
    """1,197 real digits, answered by three classifiers of rising strength.

    Their inputs are 2 x 2 averages, 4 x 4 averages, and all 8 x 8 pixels; they were trained on 600
    other images.
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
        inputs = images.reshape(-1, side, block, side, block).mean(axis=(2, 4))
        inputs = inputs.reshape(len(images), -1)
        model.fit(inputs[:600], labels[:600])
        exits.append(log_softmax(model.decision_function(inputs[600:]), axis=1))
    return ExitLogits(np.array(exits, np.float32), labels[600:].astype(np.int64))

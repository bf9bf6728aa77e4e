"""One model's ways of answering, timed against each other on this device."""

import collections
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from edgeke.device.classifier import Classifier
from edgeke.device.policy import force_exit
from edgeke.device.timing import summary, time_interleaved

__all__ = ["benchmark"]

_BATCH = 32
_SECONDS = 20.0


def benchmark(classifier: Classifier, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds (min, median, p95) of every way to answer, over up to `rounds` rounds, on noise.

    `exit_<e>`: the one file, forced to leave there. With segments also `stream`, all exits of one
    image, and `batch_exit_<e>`, per image of a batch of 32 in which all leave there.
    """
    exits, votes = len(classifier.policy.macs), classifier.policy.points[0].votes
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (_BATCH, *classifier.image_shape), np.uint8)
    contenders: dict[str, Callable[[], Any]] = {}
    for exit in range(exits):
        contenders[f"exit_{exit}"] = functools.partial(classifier.forced(exit), images[0])
    segments = classifier.open_segments()
    if segments is not None:
        contenders["stream"] = lambda: collections.deque(classifier.stream(images[0]), maxlen=0)
        for exit in range(exits):
            contenders[f"batch_exit_{exit}"] = functools.partial(
                segments.answer, images, force_exit(exit, exits), votes
            )
    found = {}
    for name, values in time_interleaved(contenders, rounds, _SECONDS).items():
        shared = _BATCH if name.startswith("batch") else 1
        found[name] = summary([value / shared for value in values])
    return found

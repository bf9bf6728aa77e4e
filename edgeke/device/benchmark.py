"""One model's ways of answering, timed against each other on this device."""

import collections
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from edgeke.device.classifier import Classifier
from edgeke.device.policy import force_exit
from edgeke.device.timing import summary, time_interleaved

_BATCH = 32
_SECONDS = 20.0


def benchmark(classifier: Classifier, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds (min, median, p95) of every way to answer, on noise, in at most 20 seconds.

    `exit_<e>`: the one file, forced to leave there. With segments also `stream`, all exits of one
    image, and `batch_exit_<e>`, per image of a batch of 32 in which all leave there. Errors:
    InputError for fewer than one round.
    """
    exits, votes = len(classifier.policy.macs), classifier.policy.points[0].votes
    images = np.random.default_rng(0).integers(0, 256, (_BATCH, *classifier.image_shape), np.uint8)
    calls: dict[str, Callable[[], Any]] = {
        f"exit_{exit}": partial(classifier.forced(exit), images[0]) for exit in range(exits)
    }
    segments = classifier.open_segments()
    if segments is not None:
        calls["stream"] = lambda: collections.deque(classifier.stream(images[0]), maxlen=0)
        for exit in range(exits):
            thresholds = force_exit(exit, exits)
            calls[f"batch_exit_{exit}"] = partial(segments.answer, images, thresholds, votes)
    return {
        name: summary([value / (_BATCH if name.startswith("batch") else 1) for value in values])
        for name, values in time_interleaved(calls, rounds, _SECONDS).items()
    }

"""What a batch costs in each segment, on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from edgeke.device.classifier import Classifier
from edgeke.device.segments import Segments
from edgeke.device.timing import time_interleaved


@dataclass(frozen=True)
class SegmentCosts:
    """Seconds of segment k for a batch of n: `first[k] + (n - 1) each[k]`; medians.

    `worst` `[E]`: how many times the median the 95th percentile is.
    """

    first: tuple[float, ...]
    each: tuple[float, ...]
    worst: tuple[float, ...]

    def batch(self, segment: int, count: int) -> float:
        """Seconds of one batch in one segment."""
        return self.first[segment] + (count - 1) * self.each[segment]

    def between(self, segment: int, exit: int, count: int) -> float:
        """Seconds of `count` images from a segment to an exit, in one batch, at worst."""
        return sum(self.batch(k, count) * self.worst[k] for k in range(segment, exit + 1))

    def largest(self, segment: int, seconds: float, most: int) -> int:
        """The most images, up to `most`, that a segment runs in so many seconds; 1 at least."""
        return max(1, min(most, 1 + int((seconds - self.first[segment]) / self.each[segment])))


def measure(classifier: Classifier, segments: Segments, most: int, seconds: float) -> SegmentCosts:
    """Every segment on noise, with 1 and with `most` images, in about so many seconds."""
    exits = len(classifier.policy.macs)
    shape = (most, *classifier.image_shape)
    features = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    calls = {}
    for exit in range(exits):
        for count in {1, most}:
            calls[f"{exit} {count}"] = partial(segments.probabilities, exit, features[:count])
        _, features = segments.probabilities(exit, features)
    times = time_interleaved(calls, 100, seconds)
    one = [_summary(times[f"{exit} 1"]) for exit in range(exits)]
    many = [_summary(times[f"{exit} {most}"]) for exit in range(exits)]
    each = [
        max((many[k][0] - one[k][0]) / (most - 1), 1e-6) if most > 1 else one[k][0]
        for k in range(exits)
    ]
    first = tuple(median for median, _ in one)
    return SegmentCosts(first, tuple(each), tuple(p95 / median for median, p95 in one))


def _summary(milliseconds: Sequence[float]) -> tuple[float, float]:
    median, p95 = np.percentile(milliseconds, [50, 95]) / 1e3
    return max(float(median), 1e-6), max(float(p95), 1e-6)

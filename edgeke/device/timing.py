"""Timing calls against each other, so that drift and cold caches hit all alike."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["summary", "time_interleaved"]

_WARM_UP = 5
_FEWEST = 20


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    seconds: float,
    before_round: Callable[[int], None] = lambda number: None,
) -> dict[str, list[float]]:
    """Milliseconds of every call, all of them once a round, in a new order each round.

    After a warm-up, up to `rounds` rounds; no more than 20 once `seconds` have passed.
    `before_round`, such as the choice of an image, gets the round's number and is not timed.
    """
    for run in calls.values():
        for _ in range(_WARM_UP):
            run()
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= _FEWEST and time.perf_counter() > end:
            break
        before_round(number)
        shuffle(order)
        for name, run in order:
            started = time.perf_counter()
            run()
            milliseconds[name].append((time.perf_counter() - started) * 1e3)
    return milliseconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Min, median and 95th percentile."""
    return {
        "min": float(np.min(values)),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
    }

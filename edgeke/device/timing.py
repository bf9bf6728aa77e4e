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
    contenders: Mapping[str, Callable[[], Any]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Milliseconds of every call, all contenders once a round, in a new order each round.

    After a warm-up, up to `rounds` rounds; no more than 20 once `seconds` have passed.
    """
    for run in contenders.values():
        for _ in range(_WARM_UP):
            run()
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    order, shuffle = list(contenders.items()), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for number in range(rounds):
        if number >= _FEWEST and time.perf_counter() > end:
            break
        shuffle(order)
        for name, run in order:
            started = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - started) * 1e3)
    return taken


def summary(values: Sequence[float]) -> dict[str, float]:
    """Min, median and 95th percentile."""
    return {
        "min": float(np.min(values)),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
    }

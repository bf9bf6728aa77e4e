"""Timing calls against each other, so that drift and caches favour none of them."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from edgeke.errors import InputError

_WARM_UP = 5


def time_interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    seconds: float,
    before_round: Callable[[int], None] = lambda number: None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of every call, all of them once a round, in a new order each round.

    An untimed call goes before each timed one. Otherwise calls that share a network, such as the
    exits of one file, would find it in the cache more often than a network that has only one.
    A warm-up of up to 5 rounds takes a fifth of `seconds`, or one round; then up to `rounds` rounds
    are timed, at least one, and none that would last beyond `seconds` in all. `before_round`, such
    as the choice of an image, gets the round's number and is not timed. `clock` gives the seconds
    that are reported. Errors: InputError for fewer than one round.
    """
    if rounds < 1:
        raise InputError(f"rounds = {rounds!r} must be at least 1")
    started = time.perf_counter()
    for _ in range(_WARM_UP):
        for run in calls.values():
            run()
        if time.perf_counter() - started > seconds / 5:
            break
    milliseconds: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    for number in range(rounds):
        began = time.perf_counter()
        before_round(number)
        shuffle(order)
        for name, run in order:
            run()
            before = clock()
            run()
            milliseconds[name].append((clock() - before) * 1e3)
        now = time.perf_counter()
        if (now - started) + (now - began) > seconds:
            break
    return milliseconds


def summary(values: Sequence[float]) -> dict[str, float]:
    """Min, median and 95th percentile."""
    return {
        "min": float(np.min(values)),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
    }

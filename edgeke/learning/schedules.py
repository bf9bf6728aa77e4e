"""Learning-rate schedules as pure functions of progress: nothing to save, nothing to resume."""

import math
from collections.abc import Callable

__all__ = ["SCHEDULES", "cosine", "one_cycle", "step"]

# The paper drops the rate tenfold at epochs 100, 200 and 320 of 400.
_MILESTONES = (0.25, 0.5, 0.8)


def one_cycle(progress: float, warmup: float) -> float:
    """Up from 1/25 to 1 along a cosine, then down to 1/250,000 (Smith and Topin 2019).

    `progress` in [0, 1] and `warmup` are shares of all steps; the same curve as torch's OneCycleLR.
    """
    if progress < warmup:
        return _between(1 / 25, 1.0, progress / warmup)
    return _between(1.0, 1 / 25e4, (progress - warmup) / (1 - warmup))


def cosine(progress: float, warmup: float) -> float:
    """A straight line up from 0, then a cosine down to 0 (Loshchilov and Hutter 2017)."""
    if progress < warmup:
        return progress / warmup
    return _between(1.0, 0.0, (progress - warmup) / (1 - warmup))


def step(progress: float, warmup: float) -> float:
    """A straight line up, then 1, 0.1, 0.01, 0.001 behind 25, 50 and 80 % (the paper's)."""
    if progress < warmup:
        return progress / warmup
    return float(0.1 ** sum(progress >= milestone for milestone in _MILESTONES))


def _between(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


SCHEDULES: dict[str, Callable[[float, float], float]] = {
    "one_cycle": one_cycle,
    "cosine": cosine,
    "step": step,
}

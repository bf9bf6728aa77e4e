"""Learning-rate schedules as pure functions of progress: nothing to save, nothing to resume."""

import math
from collections.abc import Sequence

from edgeke.params import Plan


def learning_rate(plan: Plan, step_number: int, steps: int) -> float:
    """The rate of a step, counted from 0 over all epochs of `steps` steps each."""
    recipe, schedule = plan.recipe, plan.optimisation.schedule
    progress = step_number / max(1, recipe.epochs * steps - 1)
    if schedule == "one_cycle":
        factor = one_cycle(progress, recipe.warmup)
    elif schedule == "cosine":
        factor = cosine(progress, recipe.warmup)
    else:
        epochs = recipe.epochs
        milestones = [m if m <= 1 else m / epochs for m in plan.optimisation.milestones]
        factor = step(progress, recipe.warmup, milestones)
    return recipe.learning_rate * factor


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


def step(progress: float, warmup: float, milestones: Sequence[float]) -> float:
    """A straight line up, then a tenth of the rate after each milestone, a share of all steps."""
    if progress < warmup:
        return progress / warmup
    return float(0.1 ** sum(progress >= milestone for milestone in milestones))


def _between(first: float, last: float, share: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

"""From a requirement to an operating point, with a device's own costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgeke.device.policy import OperatingPoint, Policy
from edgeke.errors import InputError

__all__ = ["Request", "UnmetError", "choose", "samples_needed"]


class UnmetError(InputError):
    """No operating point meets a request; `nearest` is the nearest attainable value."""

    def __init__(self, message: str, nearest: float | None) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True)
class Request:
    """What is asked for; None where nothing is. Costs are in the unit of the device's own.

    `mean_cost`: the mean over many images, as promised. `deadline`: for every single image, by
    leaving the exits out that are too deep. `min_accuracy`, `max_degradation`: as promised with
    probability 1 - `delta` (None: the policy's).
    """

    mean_cost: float | None = None
    deadline: float | None = None
    min_accuracy: float | None = None
    max_degradation: float | None = None
    delta: float | None = None


def choose(
    policy: Policy, request: Request, costs: Sequence[float], worst: Sequence[float] | None = None
) -> OperatingPoint:
    """The operating point for a request, at a device's increasing costs `[E]`.

    A mean cost or a deadline buys the most accuracy (on validation) that fits; accuracy or loss
    alone is bought as cheaply as possible. Nothing asked for gives the default. `worst` `[E]` are
    the costs a deadline is compared with (default: `costs`).
    Errors: UnmetError, naming the nearest attainable value; InputError for a senseless request.
    """
    _check(request, costs, len(policy.macs))
    if request == Request(delta=request.delta):
        return policy.point(policy.default)
    cap = len(policy.macs) - 1
    if request.deadline is not None:
        cap = _deepest(request.deadline, worst or costs)
    delta = policy.delta if request.delta is None else request.delta
    left = [point for point in policy.points if point.deepest <= cap]
    if not left:
        nearest = (worst or costs)[min(point.deepest for point in policy.points)]
        raise UnmetError(
            f"a deadline of {request.deadline:g} cannot be met: no operating point stops that "
            f"early; the nearest attainable is {_rounded(nearest, math.ceil)}",
            nearest,
        )

    def keep(asked: float, what: str, value: Callable[[OperatingPoint], float]) -> None:
        """Keep the points whose value is at most `asked`."""
        nonlocal left
        best = min(map(value, left))
        left = [point for point in left if value(point) <= asked + 1e-12]
        if not left:
            raise _unmet(what, asked, best, policy, delta)

    if request.max_degradation is not None:
        keep(
            request.max_degradation,
            "max_degradation",
            lambda p: p.promised("max_degradation", delta, cap),
        )
    if request.min_accuracy is not None:
        error = 1 - request.min_accuracy
        keep(error, "min_accuracy", lambda p: p.promised("max_error", delta, cap))
    if request.mean_cost is not None:
        keep(request.mean_cost, "mean cost", lambda p: p.promised_cost(costs))
    bought = (
        request.mean_cost is not None or request.min_accuracy is request.max_degradation is None
    )
    if bought:
        return max(left, key=lambda p: (p.validation_accuracy, -p.expected_cost(costs)))
    return min(left, key=lambda p: (p.expected_cost(costs), -p.validation_accuracy))


def samples_needed(epsilon: float, delta: float) -> int:
    """The least number of samples that can certify a rate of at most `epsilon`: none of them bad.

    230 for 1 % at delta 0.1. Errors: InputError when either lies outside (0, 1).
    """
    for name, value in (("epsilon", epsilon), ("delta", delta)):
        _check_probability(name, value)
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def _deepest(deadline: float, worst: Sequence[float]) -> int:
    fitting = [exit for exit, cost in enumerate(worst) if cost <= deadline]
    if not fitting:
        raise UnmetError(
            f"a deadline of {deadline:g} cannot be met: the first exit alone takes "
            f"{_rounded(worst[0], math.ceil)}; "
            "ask for at least that",
            worst[0],
        )
    return fitting[-1]


def _unmet(what: str, asked: float, best: float, policy: Policy, delta: float) -> UnmetError:
    nearest = None if math.isinf(best) else best
    if what == "min_accuracy":
        asked, nearest = 1 - asked, None if nearest is None else 1 - nearest
    if nearest is None:
        deltas = {p.delta for point in policy.points for p in point.promises}
        return UnmetError(
            f"{what} {asked:g} cannot be promised with delta {delta:g}: calibration certified "
            f"promises for delta {', '.join(f'{d:g}' for d in sorted(deltas))}; ask for one of "
            "these or list the requirement under calibrate.requirements",
            None,
        )
    why = ""
    if what != "mean cost":
        error = asked if what == "max_degradation" else 1 - asked
        needed = samples_needed(error, delta)
        if policy.samples < needed:
            why = f"; {policy.samples} calibration samples are too few, it takes {needed}"
    return UnmetError(
        f"{what} {asked:g} cannot be promised{why}; the nearest attainable is "
        f"{_rounded(nearest, math.floor if what == 'min_accuracy' else math.ceil)}",
        nearest,
    )


def _rounded(value: float, towards: Callable[[float], int]) -> str:
    """Four digits, rounded to the side on which they can be attained when asked for."""
    if value <= 0:
        return f"{value:g}"
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    slack = -1e-9 if towards is math.ceil else 1e-9  # 0.3 stays 0.3, whatever its last bit
    return f"{towards(value * scale + slack) / scale:.4g}"


def _check(request: Request, costs: Sequence[float], exits: int) -> None:
    if len(costs) != exits or any(b <= a for a, b in zip([0, *costs], costs, strict=False)):
        raise InputError(
            f"costs {list(costs)} must be {exits} positive numbers that increase from exit to exit;"
            " measure them again"
        )
    for name in ("mean_cost", "deadline"):
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} = {value!r} must be a positive number")
    for name in ("min_accuracy", "max_degradation", "delta"):
        value = getattr(request, name)
        if value is not None:
            _check_probability(name, value)


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name} = {value!r} must lie between 0 and 1, such as 0.05")

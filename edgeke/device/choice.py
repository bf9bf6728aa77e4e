"""From a request to an operating point, with a device's own costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from edgeke.device.policy import OperatingPoint, Policy
from edgeke.device.promises import samples_needed
from edgeke.errors import InputError


class UnmetError(InputError):
    """No operating point meets a request; `nearest` is the nearest attainable value."""

    def __init__(self, message: str, nearest: float | None) -> None:
        super().__init__(message)
        self.nearest = nearest

    def __reduce__(self) -> tuple[Any, ...]:
        """Also from a worker process, which sends its errors back."""
        return type(self), (str(self), self.nearest)


@dataclass(frozen=True)
class Request:
    """What an answer must keep; None where nothing is requested. Costs are in the device's unit.

    `mean_cost`: the promised mean over many images. `deadline`: for every single image; exits that
    are too deep are left out. `min_accuracy`, `max_degradation`: promised rates. Promises hold
    with probability 1 - `delta` (None: the policy's).
    Errors: InputError for what is no number or out of range.
    """

    mean_cost: float | None = None
    deadline: float | None = None
    min_accuracy: float | None = None
    max_degradation: float | None = None
    delta: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            most, words = 1.0, "a number between 0 and 1"
            if name in ("mean_cost", "deadline"):
                most, words = 1e15, "a positive number"
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < most):
                raise InputError(f"{name} = {value!r:.40} must be {words}")


@dataclass(frozen=True)
class _Limit:
    """A requested limit: points are kept whose `value` is at most `most`; accuracy as its error."""

    name: str
    most: float
    value: Callable[[OperatingPoint], float]

    def allows(self, point: OperatingPoint) -> bool:
        return self.value(point) <= self.most + 1e-12

    def as_requested(self, value: float) -> float:
        return 1 - value if self.name == "min_accuracy" else value

    def text(self, value: float) -> str:
        """The limit at a value, rounded to the side on which it can be attained."""
        towards = math.floor if self.name == "min_accuracy" else math.ceil
        return f"{self.name} {_rounded(self.as_requested(value), towards)}"


def choose(
    policy: Policy, request: Request, costs: Sequence[float], worst: Sequence[float] | None = None
) -> OperatingPoint:
    """The operating point for a request, at a device's increasing costs `[E]`.

    With a mean cost or a deadline: the most accurate point (on validation) that fits. With
    accuracy or degradation alone: the cheapest. With nothing requested: the default. `worst` `[E]`
    are the costs that a deadline is compared with (default: `costs`). Accuracy and degradation
    together are kept by one point that calibration certifies for both (docs/promises.md).
    Errors: UnmetError, naming the nearest attainable value; InputError for costs that do not
    increase.
    """
    exits, worst = len(policy.macs), worst or costs
    if len(costs) != exits or any(b <= a for a, b in zip([0, *costs], costs, strict=False)):
        raise InputError(
            f"costs {list(costs)} must be {exits} positive numbers that increase from exit to exit;"
            " measure them again"
        )
    if request == Request(delta=request.delta):
        return policy.point(policy.default)
    deepest = exits - 1 if request.deadline is None else _deepest(request.deadline, worst)
    points = [point for point in policy.points if point.deepest <= deepest]
    delta = policy.delta if request.delta is None else request.delta
    limits = _limits(policy, request, costs, deepest, delta)
    kept = [point for point in points if all(limit.allows(point) for limit in limits)]
    if not kept:
        raise _unmet(points, limits, delta)
    quality = request.min_accuracy is not None or request.max_degradation is not None
    if request.mean_cost is None and quality:
        return min(kept, key=lambda p: (p.expected_cost(costs), -p.validation_accuracy))
    return max(kept, key=lambda p: (p.validation_accuracy, -p.expected_cost(costs)))


def _deepest(deadline: float, worst: Sequence[float]) -> int:
    fitting = [exit for exit, cost in enumerate(worst) if cost <= deadline]
    if not fitting:
        raise UnmetError(
            f"a deadline of {deadline:g} cannot be met: the first exit alone takes "
            f"{_rounded(worst[0], math.ceil)}; ask for at least that",
            worst[0],
        )
    return fitting[-1]


def _limits(
    policy: Policy, request: Request, costs: Sequence[float], deepest: int, delta: float
) -> list[_Limit]:
    """The requested limits but the deadline.

    Evidence is that of the deepest cap within the deadline: which one does not depend on
    calibration, so its promises hold for the request.
    """
    cap = max((cap for cap in policy.caps if cap <= deepest), default=deepest)
    error = None if request.min_accuracy is None else 1 - request.min_accuracy
    every: list[tuple[str, float | None, Callable[[OperatingPoint], float]]] = [
        (
            "max_degradation",
            request.max_degradation,
            lambda p: p.promised("max_degradation", delta, cap),
        ),
        ("min_accuracy", error, lambda p: p.promised("max_error", delta, cap)),
        ("mean cost", request.mean_cost, lambda p: policy.promised_cost(p, costs, delta)),
    ]
    return [_Limit(name, most, value) for name, most, value in every if most is not None]


def _unmet(points: Sequence[OperatingPoint], limits: Sequence[_Limit], delta: float) -> UnmetError:
    """What cannot be promised, and for each limit the nearest value with all others kept."""
    requested = " and ".join(f"{each.name} {each.as_requested(each.most):g}" for each in limits)
    together = " together" if len(limits) > 1 else ""
    words = " with all else kept" if together else ""
    ways = []
    for limit in limits:
        others = [p for p in points if all(each.allows(p) for each in limits if each is not limit)]
        ways.append((limit, min(map(limit.value, others), default=math.inf)))
    nearest = [limit.as_requested(value) for limit, value in ways if math.isfinite(value)]
    if not nearest:
        words = " alone"
        ways = [(limit, min(map(limit.value, points))) for limit in limits]
    texts = [limit.text(value) for limit, value in ways if math.isfinite(value)]
    few, samples = "", points[0].samples
    for limit in limits:
        needed = 0 if limit.name == "mean cost" else samples_needed(limit.most, delta)
        if samples < needed:
            few = f"; {samples} calibration samples are too few for {limit.name}, it takes {needed}"
    return UnmetError(
        f"{requested} cannot be promised{together}{few}; the nearest attainable{words} is "
        f"{' or '.join(texts) or 'nothing'}",
        nearest[-1] if nearest else None,
    )


def _rounded(value: float, towards: Callable[[float], int]) -> str:
    """Four digits, rounded to the side on which they can be attained when they are requested."""
    if value <= 0:
        return f"{value:g}"
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    slack = -1e-9 if towards is math.ceil else 1e-9  # 0.3 stays 0.3, whatever its last bit
    return f"{towards(value * scale + slack) / scale:.4g}"

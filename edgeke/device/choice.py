"""From a request to an operating point, with a device's own costs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real

from edgeke.device.policy import OperatingPoint, Policy
from edgeke.device.promises import check_probability, samples_needed
from edgeke.errors import InputError


class UnmetError(InputError):
    """No operating point meets a request; `nearest` is the nearest attainable value."""

    def __init__(self, message: str, nearest: float | None) -> None:
        super().__init__(message)
        self.nearest = nearest


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
        for name in [field.name for field in fields(self)]:
            value = getattr(self, name)
            if value is None:
                continue
            number = isinstance(value, Real) and not isinstance(value, bool)
            if name in ("mean_cost", "deadline"):
                if not (number and 0 < value < 1e15):
                    raise InputError(f"{name} = {value!r:.40} must be a positive number")
            elif not number:
                raise InputError(f"{name} = {value!r:.40} must be a number between 0 and 1")
            else:
                check_probability(name, value)
            object.__setattr__(self, name, float(value))


@dataclass(frozen=True)
class _Limit:
    """A requested limit on what points promise: at least that accuracy, at most anything else."""

    name: str
    requested: float
    value: Callable[[OperatingPoint], float]

    def allows(self, point: OperatingPoint) -> bool:
        if self.name == "min_accuracy":
            return self.value(point) >= self.requested - 1e-12
        return self.value(point) <= self.requested + 1e-12

    def nearest(self, points: Sequence[OperatingPoint]) -> float | None:
        """The nearest value that one of these points promises; None where none promises any."""
        values = [value for value in map(self.value, points) if math.isfinite(value)]
        if not values:
            return None
        return max(values) if self.name == "min_accuracy" else min(values)

    def rounded(self, value: float) -> str:
        return _rounded(value, math.floor if self.name == "min_accuracy" else math.ceil)


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
    if not points:
        nearest = worst[min(point.deepest for point in policy.points)]
        raise UnmetError(
            f"a deadline of {request.deadline:g} cannot be met: no operating point stops that "
            f"early; the nearest attainable is {_rounded(nearest, math.ceil)}",
            nearest,
        )
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
    values: dict[str, tuple[float | None, Callable[[OperatingPoint], float]]] = {
        "max_degradation": (
            request.max_degradation,
            lambda point: point.promised("max_degradation", delta, cap),
        ),
        "min_accuracy": (
            request.min_accuracy,
            lambda point: 1 - point.promised("max_error", delta, cap),
        ),
        "mean cost": (
            request.mean_cost,
            lambda point: policy.promised_cost(point, costs, delta),
        ),
    }
    return [
        _Limit(name, requested, value)
        for name, (requested, value) in values.items()
        if requested is not None
    ]


def _unmet(points: Sequence[OperatingPoint], limits: Sequence[_Limit], delta: float) -> UnmetError:
    """What cannot be promised, and for each limit the nearest value with all others kept."""
    nearest, values = None, []
    for limit in limits:
        others = [p for p in points if all(o.allows(p) for o in limits if o is not limit)]
        value = limit.nearest(others)
        if value is not None:
            nearest = value
            values.append(f"{limit.name} {limit.rounded(value)}")
    requested = " and ".join(f"{limit.name} {limit.requested:g}" for limit in limits)
    if len(limits) == 1:
        remedy = f"the nearest attainable is {values[0].split()[-1]}" if values else "nothing is"
    elif values:
        remedy = f"attainable with all else kept is {' or '.join(values)}"
    else:
        alone = [(limit, limit.nearest(points)) for limit in limits]
        values = [f"{limit.name} {limit.rounded(v)}" for limit, v in alone if v is not None]
        remedy = f"attainable alone is {', '.join(values)}" if values else "nothing is"
    together = " together" if len(limits) > 1 else ""
    return UnmetError(
        f"{requested} cannot be promised{together}{_too_few(points[0].samples, limits, delta)}; "
        f"{remedy}",
        nearest,
    )


def _too_few(samples: int, limits: Sequence[_Limit], delta: float) -> str:
    for limit in limits:
        error = 1 - limit.requested if limit.name == "min_accuracy" else limit.requested
        if limit.name != "mean cost" and samples < samples_needed(error, delta):
            needed = samples_needed(error, delta)
            return (
                f"; {samples} calibration samples are too few for {limit.name} "
                f"{limit.requested:g}, it takes {needed}"
            )
    return ""


def _rounded(value: float, towards: Callable[[float], int]) -> str:
    """Four digits, rounded to the side on which they can be attained when they are requested."""
    if value <= 0:
        return f"{value:g}"
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    slack = -1e-9 if towards is math.ceil else 1e-9  # 0.3 stays 0.3, whatever its last bit
    return f"{towards(value * scale + slack) / scale:.4g}"

"""From a request to an operating point, with a device's own costs."""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from edgeke.device.policy import OperatingPoint, Policy, Risk
from edgeke.device.promises import samples_needed
from edgeke.errors import InputError


class UnmetError(InputError):
    """No operating point meets a request; `nearest` is the nearest attainable value.

    `few` says which images are too few, and how many it takes; empty where that is not why.
    """

    def __init__(self, message: str, nearest: float | None, few: str = "") -> None:
        super().__init__(message)
        self.nearest, self.few = nearest, few

    def __reduce__(self) -> tuple[Any, ...]:
        """Also from a worker process, which sends its errors back."""
        return type(self), (str(self), self.nearest, self.few)


@dataclass(frozen=True)
class ClassShare:
    """A share of the images of a class."""

    class_name: str
    share: float

    @classmethod
    def of(cls, name: str, value: Any) -> "ClassShare":
        """From {"class": "crack", "share": 0.99} or "crack=0.99".

        Errors: InputError for anything else.
        """
        if isinstance(value, ClassShare):
            return value
        content = value
        if isinstance(value, str):
            key, _, share = value.rpartition("=")
            with contextlib.suppress(ValueError):
                content = {"class": key, "share": float(share)}
        if isinstance(content, Mapping) and set(content) == {"class", "share"}:
            key, number = content["class"], content["share"]
            real = isinstance(number, Real) and not isinstance(number, bool)
            if isinstance(key, str) and key and real and 0 < number < 1:
                return cls(key, float(number))
        raise InputError(
            f"{name} = {value!r:.80} must be a class and a share between 0 and 1, such as "
            '{"class": "crack", "share": 0.99} or "crack=0.99"'
        )


@dataclass(frozen=True)
class Request:
    """What an answer must keep; None where nothing is requested. Costs are in the device's unit.

    `mean_cost`: the promised mean over many images. `deadline`: for every single image; exits that
    are too deep are left out. `min_accuracy`, `max_degradation`: promised rates. Promises hold
    with probability 1 - `delta` (None: the policy's). `max_miss`, `min_recall`: of a class, as
    `ClassShare.of` takes them. `max_sure_error`: among the images that some exit was sure of.
    Errors: InputError for what is no number, out of range, or kept by no single point.
    """

    mean_cost: float | None = None
    deadline: float | None = None
    min_accuracy: float | None = None
    max_degradation: float | None = None
    delta: float | None = None
    max_miss: ClassShare | None = None
    min_recall: ClassShare | None = None
    max_sure_error: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_miss", "min_recall"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, ClassShare.of(name, value))
        for name, value in vars(self).items():
            if name in ("max_miss", "min_recall"):
                continue
            most, words = 1.0, "a number between 0 and 1"
            if name in ("mean_cost", "deadline"):
                most, words = 1e15, "a positive number"
            number = isinstance(value, Real) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < most):
                raise InputError(f"{name} = {value!r:.40} must be {words}")
        quality = [name for name in _QUALITIES if getattr(self, name) is not None]
        alone = [name for name in quality if name in ("max_sure_error", "min_recall")]
        if alone and len(quality) > 1:
            raise InputError(
                f"{' and '.join(quality)} cannot be requested together: {alone[0]} is kept by "
                "points that promise nothing else about answers; ask for one of them"
            )


_QUALITIES = ("max_degradation", "min_accuracy", "max_miss", "min_recall", "max_sure_error")


@dataclass(frozen=True)
class _Limit:
    """A requested limit: points are kept whose `value` is at most `most`.

    Accuracy and recall as what is lacking. `images`: how many calibration images it is tested on.
    """

    name: str
    most: float
    value: Callable[[OperatingPoint], float]
    images: int
    kind: str = "samples"

    def allows(self, point: OperatingPoint) -> bool:
        return self.value(point) <= self.most + 1e-12

    def as_requested(self, value: float) -> float:
        return 1 - value if self.name.startswith("min_") else value

    def text(self, value: float) -> str:
        """The limit at a value, rounded to the side on which it can be attained."""
        towards = math.floor if self.name.startswith("min_") else math.ceil
        return f"{self.name} {_rounded(self.as_requested(value), towards)}"


def choose(
    policy: Policy, request: Request, costs: Sequence[float], worst: Sequence[float] | None = None
) -> OperatingPoint:
    """The operating point for a request, at a device's increasing costs `[E]`.

    With a mean cost or a deadline: the most accurate point (on validation) that fits. With
    accuracy or degradation alone: the cheapest. With a recall: the fewest false alarms. With an
    error among the sure: the most sure images. With nothing requested: the default. `worst` `[E]`
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
    points = [point for point in _family(policy, request) if point.deepest <= deepest]
    delta = policy.delta if request.delta is None else request.delta
    limits = _limits(policy, request, costs, deepest, delta)
    kept = [point for point in points if all(limit.allows(point) for limit in limits)]
    if not kept:
        raise _unmet(points, limits, delta)
    if request.max_sure_error is not None:
        return min(kept, key=lambda p: (p.voted, p.expected_cost(costs)))
    if request.min_recall is not None:
        name = request.min_recall.class_name
        return min(kept, key=lambda p: (_false_alarms(p, name), p.expected_cost(costs)))
    qualities = (request.min_accuracy, request.max_degradation, request.max_miss)
    if request.mean_cost is None and any(value is not None for value in qualities):
        return min(kept, key=lambda p: (p.expected_cost(costs), -p.validation_accuracy))
    return max(kept, key=lambda p: (p.validation_accuracy, -p.expected_cost(costs)))


def _family(policy: Policy, request: Request) -> list[OperatingPoint]:
    """The points that may answer a request.

    Errors: InputError for a risk that calibration was not told to test.
    """
    risks: list[tuple[Risk, ClassShare | float | None]] = [
        ("max_miss", request.max_miss),
        ("min_recall", request.min_recall),
        ("max_sure_error", request.max_sure_error),
    ]
    points = [p for p in policy.points if not p.unsure and not any(p.bias)]
    for risk, value in risks:
        if value is None:
            continue
        name = value.class_name if isinstance(value, ClassShare) else None
        tested = [e for p in policy.points for e in p.inspections if e.risk == risk]
        if name not in {each.class_name for each in tested}:
            known = sorted({str(each.class_name) for each in tested if each.class_name})
            raise InputError(
                f"this model has no points for {risk}{f' of class {name}' if name else ''}"
                f"{', only of ' + ', '.join(known) if known else ''}; add it to "
                "calibrate.requirements, and run the stage calibrate again"
            )
        if risk != "max_miss":
            tests = {(risk, name)}
            points = [
                p for p in policy.points if {(e.risk, e.class_name) for e in p.inspections} & tests
            ]
    return points


def _false_alarms(point: OperatingPoint, class_name: str) -> int:
    every = (each for each in point.inspections if each.class_name == class_name)
    return next(each.false_alarms for each in every if each.false_alarms is not None)


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
    limits = [
        _Limit(name, most, value, policy.samples) for name, most, value in every if most is not None
    ]
    if request.max_miss is not None:
        limits.insert(0, _of_class(policy, "max_miss", request.max_miss, delta, cap))
    if request.min_recall is not None:
        limits.insert(0, _of_class(policy, "min_recall", request.min_recall, delta, cap))
    if request.max_sure_error is not None:
        images = max(p.samples - p.voted for p in policy.points if p.unsure)
        limits.insert(
            0,
            _Limit(
                "max_sure_error",
                request.max_sure_error,
                lambda p: p.promised("max_sure_error", delta, cap),
                images,
                "images that an exit is sure of",
            ),
        )
    return limits


def _of_class(policy: Policy, risk: Risk, value: ClassShare, delta: float, cap: int) -> _Limit:
    name = value.class_name
    images = max(
        each.images
        for point in policy.points
        for each in point.inspections
        if (each.risk, each.class_name) == (risk, name)
    )
    most = 1 - value.share if risk == "min_recall" else value.share
    return _Limit(
        f"{risk} of {name}",
        most,
        lambda p: p.promised(risk, delta, cap, name),
        images,
        f"images of class {name}",
    )


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
        ways = [(limit, min(map(limit.value, points), default=math.inf)) for limit in limits]
    texts = [limit.text(value) for limit, value in ways if math.isfinite(value)]
    few = ""
    for limit in limits:
        needed = 0 if limit.name == "mean cost" else samples_needed(limit.most, delta)
        if limit.images < needed:
            few = (
                f"{limit.images} calibration {limit.kind} are too few for {limit.name}, "
                f"it takes {needed}"
            )
    because = f"; {few}" if few else ""
    return UnmetError(
        f"{requested} cannot be promised{together}{because}; the nearest attainable{words} is "
        f"{' or '.join(texts) or 'nothing'}",
        nearest[-1] if nearest else None,
        few,
    )


def _rounded(value: float, towards: Callable[[float], int]) -> str:
    """Four digits, rounded to the side on which they can be attained when they are requested."""
    if value <= 0:
        return f"{value:g}"
    scale = 10.0 ** (3 - math.floor(math.log10(value)))
    slack = -1e-9 if towards is math.ceil else 1e-9  # 0.3 stays 0.3, whatever its last bit
    return f"{towards(value * scale + slack) / scale:.4g}"

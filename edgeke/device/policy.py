"""The policy in a model's metadata: the operating points that a device chooses from."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgeke.device.promises import upper_bound
from edgeke.device.scores import SCORES
from edgeke.device.shift import BINS
from edgeke.errors import InputError

SCHEMA = 5
_READABLE = (4, 5)  # 4 has no histogram

# Scores are in [0, 1]: every score exceeds -1, none exceeds 2.
ALWAYS = -1.0
NEVER = 2.0

Risk = Literal["max_degradation", "max_error", "max_miss", "min_recall", "max_sure_error"]


class SchemaError(InputError):
    """A policy of another version of EdgeKE."""


@dataclass(frozen=True)
class Evidence:
    """What calibration says about a point, for requests that allow exits up to `cap`.

    `degraded` and `wrong`: the most images that this point, or any more conservative one that is
    tested for the same risk, answered badly; None where the point is not tested for that risk.
    """

    cap: int
    degraded: int | None
    wrong: int | None


@dataclass(frozen=True)
class Inspection:
    """What calibration says about a point's risk among some of the images.

    `risk` is `max_miss` or `min_recall` (among the images of `class_name`: those that the full
    network finds and the point misses; those that the point answers otherwise), or `max_sure_error`
    (among the images that some exit was sure of: those answered wrong). `bad` of `images` were bad.
    `worst` has the pairs of `bad` and `images` of this point and of those tested before it, without
    pairs that no bound can depend on. Requests allow exits up to `cap`; None: any. `false_alarms`,
    of `min_recall`: images of other classes that are answered as the class.
    """

    risk: Risk
    class_name: str | None
    cap: int | None
    bad: int
    images: int
    worst: tuple[tuple[int, int], ...]
    false_alarms: int | None = None


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds and votes `[E]`, and counts of the `samples` images of the calibration split.

    `reached` `[E]`: images that reached each exit; `voted`: images that no exit was sure of;
    `wrong`: images answered wrong; `degraded`: images that the reference network answers right and
    this point wrong. `validation_accuracy` decides between points. `evidence` is what promises
    follow from: none where the point promises nothing about its answers.

    `bias` `[K]` is added to the logarithms of probabilities before the answer is taken; empty means
    zeros. With `unsure`, an image that no exit is sure of has no answer: here it counts as wrong.
    `inspections` are promises among some of the images.
    """

    name: str
    thresholds: tuple[float, ...]
    votes: tuple[float, ...]
    samples: int
    reached: tuple[int, ...]
    voted: int
    wrong: int
    degraded: int
    validation_accuracy: float
    evidence: tuple[Evidence, ...]
    bias: tuple[float, ...] = ()
    unsure: bool = False
    inspections: tuple[Inspection, ...] = ()

    @property
    def automation(self) -> float:
        """The share of calibration images that some exit was sure of."""
        return 1 - self.voted / self.samples

    @property
    def deepest(self) -> int:
        """The last exit that can be reached at all."""
        always = [e for e, threshold in enumerate(self.thresholds) if threshold < 0]
        return always[0] if always else len(self.thresholds) - 1

    @property
    def accuracy(self) -> float:
        """The share of calibration images answered right."""
        return 1 - self.wrong / self.samples

    @property
    def degradation(self) -> float:
        """The share of calibration images that only the reference network answers right."""
        return self.degraded / self.samples

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of calibration images that pay for each exit, `[E]` (voted ones: the last)."""
        beyond = (*self.reached[1:], 0)
        return tuple((a - b) / self.samples for a, b in zip(self.reached, beyond, strict=True))

    @property
    def uncertain(self) -> tuple[bool, ...]:
        """Whether thresholds leave open how many images reach each exit, `[E]`."""
        before = [self.thresholds[:exit] for exit in range(len(self.thresholds))]
        return tuple(any(0 <= t < 1 for t in each) and min(each) >= 0 for each in before)

    def expected_cost(self, costs: Sequence[float]) -> float:
        """The mean cost on calibration, at costs `[E]` in any unit."""
        return sum(c * share for c, share in zip(costs, self.shares, strict=True))

    def promised(self, risk: Risk, delta: float, cap: int, class_name: str | None = None) -> float:
        """The promised bound of a risk at `delta`, when exits up to `cap` are allowed.

        Of `min_recall` it is that of the share missed. Infinite where nothing is promised.
        """
        inspection = self.inspection(risk, cap, class_name)
        if inspection is not None:
            return max(upper_bound(bad, images, delta) for bad, images in inspection.worst)
        if risk not in ("max_degradation", "max_error"):
            return math.inf
        for evidence in self.evidence:
            count = evidence.degraded if risk == "max_degradation" else evidence.wrong
            if evidence.cap == cap and count is not None:
                return upper_bound(count, self.samples, delta)
        return math.inf

    def inspection(self, risk: Risk, cap: int, class_name: str | None) -> Inspection | None:
        """What is known of a risk among some of the images; None where it was not tested."""
        for each in self.inspections:
            if (each.risk, each.class_name) == (risk, class_name) and each.cap in (None, cap):
                return each
        return None


@dataclass(frozen=True)
class RequirementResult:
    """A requirement of calibration and the point that meets it (None: it cannot be met).

    `kind` is the requirement's key, such as `min_accuracy`; `nearest` is the nearest attainable
    bound where the required one is not, `reason` why it is not in words where images are too few.
    `class_name`: of which class.
    """

    name: str
    kind: str
    bound: float
    delta: float
    point: str | None
    nearest: float | None
    class_name: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Policy:
    """Score, temperatures `[E]`, MACs `[E]` and operating points, conservative to aggressive.

    `score_weights` are the learned score's bias and weights per exit, empty for the others.
    `main_macs` are the plain main network's, of which costs are shares. `delta` is the risk at
    which promises are made when a request names none. `default` is the point used when nothing is
    requested. `reference_exit`: the best on validation in fp32, against which degradation and
    misses are measured (-1: the last, in older files). `histogram` `[256]` has exit 0's scores of
    the calibration images, by the bins of `shift.bin_of`; empty in models of older versions.
    """

    score: str
    score_weights: tuple[tuple[float, ...], ...]
    temperatures: tuple[float, ...]
    macs: tuple[int, ...]
    main_macs: int
    delta: float
    points: tuple[OperatingPoint, ...]
    requirements: tuple[RequirementResult, ...]
    default: str
    reference_exit: int = -1
    histogram: tuple[int, ...] = ()

    @property
    def samples(self) -> int:
        """How many calibration images promises follow from."""
        return self.points[0].samples

    @property
    def cost_shares(self) -> tuple[float, ...]:
        """MACs of reaching each exit as shares of the plain main network's, `[E]`."""
        return tuple(macs / self.main_macs for macs in self.macs)

    @property
    def caps(self) -> tuple[int, ...]:
        """The caps that points have evidence for, ascending."""
        return tuple(sorted({item.cap for point in self.points for item in point.evidence}))

    @property
    def named(self) -> dict[str, OperatingPoint]:
        """Points by label: `full`, `proportions`, `default`, and each requirement that is met."""
        names = {point.name for point in self.points}
        labels: dict[str, str] = {name: name for name in ("full", "proportions") if name in names}
        labels["default"] = self.default
        labels |= {r.name: r.point for r in self.requirements if r.point is not None}
        return {label: self.point(name) for label, name in labels.items()}

    @property
    def unmet(self) -> tuple[RequirementResult, ...]:
        """The requirements that no point meets."""
        return tuple(result for result in self.requirements if result.point is None)

    def point(self, name: str) -> OperatingPoint:
        """The operating point of that name. Errors: InputError listing those there are."""
        for point in self.points:
            if point.name == name:
                return point
        names = ", ".join(point.name for point in self.points)
        raise InputError(f"no operating point {name!r}; use one of {names}")

    def reach_bounds(self, point: OperatingPoint, delta: float | None = None) -> tuple[float, ...]:
        """Upper bounds on the share of images that reach each exit, `[E]`.

        With probability 1 - `delta` (None: the policy's) they hold for all points at once: `delta`
        is divided by the number of shares that thresholds leave open.
        """
        delta = self.delta if delta is None else delta
        share = delta / max(1, sum(sum(other.uncertain) for other in self.points))
        return tuple(
            upper_bound(count, point.samples, share) if open_ else count / point.samples
            for count, open_ in zip(point.reached, point.uncertain, strict=True)
        )

    def promised_cost(
        self, point: OperatingPoint, costs: Sequence[float], delta: float | None = None
    ) -> float:
        """The mean cost promised at increasing costs `[E]` in any unit, for all points at once."""
        steps = [after - before for before, after in zip([0.0, *costs], costs, strict=False)]
        bounds = self.reach_bounds(point, delta)
        return sum(step * reach for step, reach in zip(steps, bounds, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the schema's version; `parse_policy` reads them back."""
        return {"schema": SCHEMA, **asdict(self)}


def force_exit(exit: int, exits: int) -> tuple[float, ...]:
    """Thresholds `[E]` under which every image leaves at `exit`; `exits` itself means the vote."""
    return tuple(ALWAYS if e == exit else NEVER for e in range(exits))


def parse_policy(text: str) -> Policy:
    """Read and check a policy.

    Errors: InputError when it is of another schema, lacks a key or contradicts itself.
    """
    try:
        content = json.loads(text)
        schema = content.pop("schema")
    except (ValueError, RecursionError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"not an EdgeKE policy ({error}); export the model again") from error
    if schema not in _READABLE:
        raise SchemaError(
            f"policy schema {schema!r:.20} is not {' or '.join(map(str, _READABLE))}, which this "
            "version of EdgeKE reads; "
            "use the edgeke.device that belongs to the model, or run the stage calibrate again "
            "(dvc repro), which composes the file anew"
        )
    try:
        points = tuple(_point(point) for point in content.pop("points"))
        results = tuple(RequirementResult(**result) for result in content.pop("requirements"))
        rest = {key: _tuples(value) for key, value in content.items()}
        policy = Policy(points=points, requirements=results, **rest)
        _check(policy)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"policy is incomplete ({error}); export the model again") from error
    return policy


def _point(content: dict[str, Any]) -> OperatingPoint:
    evidence = tuple(Evidence(**item) for item in content.pop("evidence"))
    inspections = tuple(
        Inspection(**{key: _tuples(value) for key, value in item.items()})
        for item in content.pop("inspections")
    )
    values = {key: _tuples(value) for key, value in content.items()}
    return OperatingPoint(**values, evidence=evidence, inspections=inspections)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check(policy: Policy) -> None:
    """Errors: InputError that names what contradicts; TypeError where a list is something else."""
    exits, points = len(policy.macs), policy.points
    increase = list(policy.macs) == sorted(set(policy.macs))
    _require("macs", exits > 0, increase, _whole(1, 10**15, *policy.macs, policy.main_macs))
    learned = policy.score == "learned"
    counts = [4 * exit + 4 for exit in range(exits) if learned]  # a bias, and `statistics`
    weights = [weight for each in policy.score_weights for weight in each]
    _require("score", learned or policy.score in SCORES)
    _require("score_weights", counts == [len(each) for each in policy.score_weights])
    _require("score_weights", _between(-1e9, 1e9, *weights))
    temperatures = policy.temperatures
    _require("temperatures", len(temperatures) == exits, _between(1e-3, 1e3, *temperatures))
    _require("delta", _between(1e-12, 1 - 1e-12, policy.delta))
    names = [point.name for point in points]
    _require("names of points", all(isinstance(name, str) for name in names))
    _require("names of points", len(set(names)) == len(names) > 0)
    for point in points:
        lists, samples = (point.thresholds, point.votes, point.reached), point.samples
        _require("number of exits", all(len(values) == exits for values in lists))
        _require("thresholds", _between(ALWAYS, NEVER, *point.thresholds))
        _require("votes", _between(0, 1e3, *point.votes) and sum(point.votes) > 1e-3)
        _require("samples", _whole(1, 10**9, samples), samples == policy.samples)
        falling = sorted(point.reached, reverse=True) == list(point.reached)
        _require("reached", _whole(0, samples, *point.reached), falling)
        _require("counts", _whole(0, samples, point.voted, point.wrong, point.degraded))
        _require("validation_accuracy", _between(0, 1, point.validation_accuracy))
        for item in point.evidence:
            tested = [count for count in (item.degraded, item.wrong) if count is not None]
            _require("evidence", _whole(0, samples, *tested), _whole(0, exits - 1, item.cap))
        _require("bias", _between(-100, 100, *point.bias), isinstance(point.unsure, bool))
        _require("bias", len({len(p.bias) for p in points} - {0}) <= 1)
        for each in point.inspections:
            _require("inspections", each.cap is None or _whole(0, exits - 1, each.cap))
            recall = each.risk == "min_recall"
            _require("inspections", not recall or _whole(0, samples, each.false_alarms))
            pairs = [(each.bad, each.images), *each.worst]
            _require("inspections", len(each.worst) > 0, all(len(pair) == 2 for pair in pairs))
            for bad, images in pairs:
                _require("inspections", _whole(0, samples, bad, images) and bad <= images)
    if len(policy.histogram):
        _require("histogram", len(policy.histogram) == BINS)
        _require("histogram", _whole(0, 10**9, *policy.histogram))
        _require("histogram", sum(policy.histogram) == policy.samples)
    _require("a point for every deadline", min(point.deepest for point in points) == 0)
    for result in policy.requirements:
        numbers = [result.bound, result.delta]
        numbers += [] if result.nearest is None else [result.nearest]
        _require("requirements", _between(0, 1e15, *numbers), isinstance(result.name, str))
        _require("requirements", result.point is None or result.point in names)
    _require("reference_exit", _whole(-1, exits - 1, policy.reference_exit))
    policy.point(policy.default)


def _require(what: str, *conditions: bool) -> None:
    if not all(conditions):
        raise InputError(f"policy contradicts itself ({what}); export the model again")


def _between(least: float, most: float, *values: object) -> bool:
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return len(numbers) == len(values) and all(least <= number <= most for number in numbers)


def _whole(least: int, most: int, *values: object) -> bool:
    return _between(least, most, *values) and all(isinstance(value, int) for value in values)

"""policy.json: the operating points a device chooses from. Schema, reading and writing."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeke.errors import InputError

__all__ = [
    "ALWAYS",
    "NEVER",
    "SCHEMA",
    "Answer",
    "OperatingPoint",
    "Policy",
    "Promise",
    "force_exit",
    "parse_policy",
    "read_policy",
]

SCHEMA = 2

# Scores lie in [0, 1]: every score exceeds -1, none exceeds 2.
ALWAYS = -1.0
NEVER = 2.0


@dataclass(frozen=True)
class Promise:
    """With probability at least 1 - delta over the calibration draw, a rate is at most `bound`.

    `kind` is `max_degradation` (the full network is right and this point wrong) or `max_error` (it is
    wrong). It is meant for requests that allow exits up to `cap`.
    """

    kind: str
    bound: float
    delta: float
    cap: int


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds and votes `[E]` with what they cost, what they gave and what they promise.

    `shares` `[E]`: share of samples that pay for exit e (voted ones pay for the last);
    `reach_upper` `[E]`: upper bounds on the probability of reaching exit e, which hold together for
    all points. `validation_accuracy` chooses between points. `accuracy`, `loss` and the accuracy's
    95 % interval come from the calibration split, which no threshold was fitted on.
    """

    name: str
    thresholds: tuple[float, ...]
    votes: tuple[float, ...]
    shares: tuple[float, ...]
    reach_upper: tuple[float, ...]
    voted: float
    validation_accuracy: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    degradation: float
    promises: tuple[Promise, ...]

    @property
    def deepest(self) -> int:
        """The last exit that can be reached at all."""
        always = [e for e, threshold in enumerate(self.thresholds) if threshold < 0]
        return always[0] if always else len(self.thresholds) - 1

    def expected_cost(self, costs: Sequence[float]) -> float:
        """The mean cost seen on calibration, at costs `[E]` in any unit."""
        return sum(c * share for c, share in zip(costs, self.shares, strict=True))

    def promised_cost(self, costs: Sequence[float]) -> float:
        """The mean cost that is promised, at increasing costs `[E]` in any unit."""
        steps = [after - before for before, after in zip([0.0, *costs], costs, strict=False)]
        return sum(step * reach for step, reach in zip(steps, self.reach_upper, strict=True))

    def promised(self, kind: str, delta: float, cap: int) -> float:
        """The least bound of that kind promised at `delta` or surer; infinite without one."""
        bounds = [
            promise.bound
            for promise in self.promises
            if promise.kind == kind and promise.delta <= delta and promise.cap == cap
        ]
        return min(bounds, default=math.inf)


@dataclass(frozen=True)
class Answer:
    """A requirement of calibration and the point that answers it (none: it cannot be met).

    `kind` is `max_cost`, `min_accuracy` or `max_degradation`; `nearest` is the nearest attainable bound
    where it cannot be met.
    """

    name: str
    kind: str
    bound: float
    delta: float
    point: str | None
    nearest: float | None


@dataclass(frozen=True)
class Policy:
    """Score, temperatures `[E]`, MACs `[E]` and operating points, conservative to aggressive.

    `score_weights` are the learned score's bias and weights per exit. `main_macs` are the plain
    main network's, of which costs are shares. `samples` counts the calibration split, `delta` is
    the risk at which `reach_upper` holds. `default` names the point used when nothing is asked for.
    """

    score: str
    score_weights: tuple[tuple[float, ...], ...]
    temperatures: tuple[float, ...]
    macs: tuple[int, ...]
    main_macs: int
    samples: int
    delta: float
    points: tuple[OperatingPoint, ...]
    requirements: tuple[Answer, ...]
    default: str

    @property
    def cost_shares(self) -> tuple[float, ...]:
        """MACs of reaching each exit as shares of the plain main network's, `[E]`."""
        return tuple(macs / self.main_macs for macs in self.macs)

    @property
    def named(self) -> dict[str, OperatingPoint]:
        """The points people speak of: `full`, `proportions`, `default`, each met requirement."""
        asked = {of.name: of.point for of in self.requirements if of.point is not None}
        known = {point.name for point in self.points}
        wanted: dict[str, str] = {name: name for name in ("full", "proportions") if name in known}
        wanted |= {"default": self.default, **asked}
        return {label: self.point(name) for label, name in wanted.items()}

    def point(self, name: str) -> OperatingPoint:
        """The operating point of that name. Errors: InputError listing those there are."""
        for point in self.points:
            if point.name == name:
                return point
        names = ", ".join(point.name for point in self.points)
        raise InputError(f"no operating point {name!r}; use one of {names}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the schema's version; `parse_policy` reads them back."""
        return {"schema": SCHEMA, **asdict(self)}


def force_exit(exit: int, exits: int) -> tuple[float, ...]:
    """Thresholds `[E]` under which every image leaves at `exit`; `exits` itself means the vote."""
    return tuple(ALWAYS if e == exit else NEVER for e in range(exits))


def parse_policy(text: str) -> Policy:
    """Read and check a policy.

    Errors: InputError when it is of another schema, misses a key or contradicts itself.
    """
    try:
        content = json.loads(text)
        schema = content.pop("schema")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"not an EdgeKE policy ({error}); export the model again") from error
    if schema != SCHEMA:
        raise InputError(
            f"policy schema {schema!r} is not {SCHEMA}, which this version of EdgeKE reads; "
            "use the edgeke.device that belongs to the model"
        )
    try:
        points = tuple(_point(point) for point in content.pop("points"))
        asked = tuple(Answer(**of) for of in content.pop("requirements"))
        rest = {key: _tuples(value) for key, value in content.items()}
        policy = Policy(points=points, requirements=asked, **rest)
        _check(policy)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"policy is incomplete ({error}); export the model again") from error
    return policy


def read_policy(path: Path) -> Policy:
    """Read a policy file. Errors: InputError when it is missing or not a policy."""
    try:
        return parse_policy(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} is missing; copy the whole model folder") from None
    except (OSError, UnicodeDecodeError, InputError) as error:
        raise InputError(f"{path}: {error}") from error


def _point(content: dict[str, Any]) -> OperatingPoint:
    promises = tuple(Promise(**promise) for promise in content["promises"])
    return OperatingPoint(
        **{key: _tuples(value) for key, value in content.items() if key != "promises"},
        promises=promises,
    )


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _check(policy: Policy) -> None:
    exits = len(policy.temperatures)
    numbers = [*policy.temperatures, *policy.macs, policy.main_macs, policy.samples, policy.delta]
    numbers += [weight for weights in policy.score_weights for weight in weights]
    numbers += [of.bound for of in policy.requirements]
    lengths = [len(policy.macs), len(policy.score_weights) or exits]
    for point in policy.points:
        lists = [point.thresholds, point.votes, point.shares, point.reach_upper]
        lengths += [len(values) for values in lists]
        numbers += [number for values in lists for number in values]
        numbers += [point.voted, point.accuracy, *point.accuracy_interval, point.degradation]
        numbers += [point.validation_accuracy]
        numbers += [value for p in point.promises for value in (p.bound, p.delta, p.cap)]
    named = {point.name for point in policy.points}
    sound = (
        exits > 0
        and all(length == exits for length in lengths)
        and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        and all(b > a for a, b in zip(policy.macs, policy.macs[1:], strict=False))
        and min(*policy.temperatures, *policy.macs, policy.main_macs, policy.samples) > 0
        and all(min(point.votes) >= 0 and sum(point.votes) > 0 for point in policy.points)
        and all(isinstance(point.name, str) for point in policy.points)
        and all(of.point is None or of.point in named for of in policy.requirements)
        and len(named) == len(policy.points) > 0
    )
    if not sound:
        raise InputError(
            f"policy contradicts itself: lists must have {exits} finite numbers, costs must "
            "increase, names must differ; export the model again"
        )
    policy.point(policy.default)

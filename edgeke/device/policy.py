"""policy.json: the operating points a device chooses from. Schema, reading and writing."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeke.device.errors import DeviceError

__all__ = [
    "ALWAYS",
    "NEVER",
    "SCHEMA",
    "OperatingPoint",
    "Policy",
    "force_exit",
    "parse_policy",
    "read_policy",
]

SCHEMA = 1

# Scores lie in [0, 1]: every score exceeds -1, none exceeds 2.
ALWAYS = -1.0
NEVER = 2.0


@dataclass(frozen=True)
class OperatingPoint:
    """Thresholds and votes `[E]` with what they cost and what they gave.

    `shares` `[E]`: share of samples that pay for exit e (voted ones pay for the last); with its own
    increasing costs c a device expects `sum(c[e] * shares[e])`. `accuracy` and its 95 % interval
    come from `accuracy_samples` images of the calibration split, which no threshold was fitted on.
    """

    name: str
    thresholds: tuple[float, ...]
    votes: tuple[float, ...]
    shares: tuple[float, ...]
    voted: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    accuracy_samples: int


@dataclass(frozen=True)
class Policy:
    """Score, temperatures `[E]`, MACs `[E]` and operating points, cautious to bold.

    `default` names the point used when nothing is asked for.
    """

    score: str
    temperatures: tuple[float, ...]
    macs: tuple[int, ...]
    points: tuple[OperatingPoint, ...]
    default: str

    def point(self, name: str) -> OperatingPoint:
        """The operating point of that name. Errors: DeviceError listing those there are."""
        for point in self.points:
            if point.name == name:
                return point
        names = ", ".join(point.name for point in self.points)
        raise DeviceError(f"no operating point {name!r}; use one of {names}")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values with the schema's version; `parse_policy` reads them back."""
        return {"schema": SCHEMA, **asdict(self)}


def force_exit(exit: int, exits: int) -> tuple[float, ...]:
    """Thresholds `[E]` under which every image leaves at `exit`; `exits` itself means the vote."""
    return tuple(ALWAYS if e == exit else NEVER for e in range(exits))


def parse_policy(text: str) -> Policy:
    """Read and check a policy.

    Errors: DeviceError when it is of another schema, misses a key or contradicts itself.
    """
    try:
        content = json.loads(text)
        schema = content.pop("schema")
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise DeviceError(f"not an EdgeKE policy ({error}); export the model again") from error
    if schema != SCHEMA:
        raise DeviceError(
            f"policy schema {schema!r} is not {SCHEMA}, which this version of EdgeKE reads; "
            "use the edgeke.device that belongs to the model"
        )
    try:
        points = tuple(
            OperatingPoint(**{key: _tuples(value) for key, value in point.items()})
            for point in content.pop("points")
        )
        policy = Policy(points=points, **{key: _tuples(value) for key, value in content.items()})
        _check(policy)
    except (KeyError, TypeError, AttributeError) as error:
        raise DeviceError(f"policy is incomplete ({error}); export the model again") from error
    return policy


def read_policy(path: Path) -> Policy:
    """Read a policy file. Errors: DeviceError when it is missing or not a policy."""
    try:
        return parse_policy(path.read_text())
    except FileNotFoundError:
        raise DeviceError(f"{path} is missing; copy the whole model folder") from None
    except (OSError, UnicodeDecodeError, DeviceError) as error:
        raise DeviceError(f"{path}: {error}") from error


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _check(policy: Policy) -> None:
    exits = len(policy.temperatures)
    numbers = [*policy.temperatures, *policy.macs]
    lengths = [len(policy.macs)]
    for point in policy.points:
        numbers += [*point.thresholds, *point.votes, *point.shares, point.accuracy]
        numbers += [point.voted, *point.accuracy_interval]
        lengths += [len(point.thresholds), len(point.votes), len(point.shares)]
    sound = (
        exits > 0
        and all(length == exits for length in lengths)
        and all(isinstance(n, int | float) and math.isfinite(n) for n in numbers)
        and all(b > a for a, b in zip(policy.macs, policy.macs[1:], strict=False))
        and min(policy.temperatures) > 0
        and all(min(point.votes) >= 0 and sum(point.votes) > 0 for point in policy.points)
        and all(isinstance(point.name, str) for point in policy.points)
        and len({point.name for point in policy.points}) == len(policy.points) > 0
    )
    if not sound:
        raise DeviceError(
            f"policy contradicts itself: lists must have {exits} finite numbers, costs must "
            "increase, names must differ; export the model again"
        )
    policy.point(policy.default)

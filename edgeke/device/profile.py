"""What each exit costs on this very device: measured once, kept beside the model."""

import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from edgeke.device.timing import summary, time_interleaved

__all__ = ["Conditions", "Profile", "measure_costs", "read_profile", "write_profile"]

_SCHEMA = 1
# A deeper exit counts at least this much more than the one before it.
_STEP = 1.001


@dataclass(frozen=True)
class Conditions:
    """What costs depend on: a profile measured under other conditions is stale.

    `macs` `[E]` stand for the network, `machine` for the device (its processor and cores).
    """

    model: str
    macs: tuple[int, ...]
    threads: int
    onnxruntime: str
    machine: str

    @classmethod
    def here(cls, model: Path, macs: Sequence[int], threads: int) -> "Conditions":
        """The conditions of this process."""
        return cls(model.name, tuple(macs), threads, onnxruntime.__version__, _machine())


@dataclass(frozen=True)
class Profile:
    """Milliseconds until each exit has answered, `[E]`: medians and 95th percentiles.

    Both increase strictly: where noise made a deeper exit look as cheap as a shallower one, or
    cheaper, it is given 0.1 % more than that one. `rounds` were measured.
    """

    median_ms: tuple[float, ...]
    p95_ms: tuple[float, ...]
    rounds: int


def measure_costs(run: Callable[[int], Any], exits: int, rounds: int, seconds: float) -> Profile:
    """Measure `run(exit)` for every exit: warmed up, interleaved, in up to `rounds` rounds.

    All of it ends within about `seconds`, in fewer rounds if need be; at least one is measured.
    Errors: InputError for fewer than one round.
    """
    calls = {str(exit): partial(run, exit) for exit in range(exits)}
    milliseconds = time_interleaved(calls, rounds, seconds)
    summaries = [summary(milliseconds[str(exit)]) for exit in range(exits)]
    return Profile(
        _increasing([exit["median"] for exit in summaries]),
        _increasing([exit["p95"] for exit in summaries]),
        len(milliseconds["0"]),
    )


def read_profile(path: Path, conditions: Conditions) -> Profile | None:
    """The profile measured under these very conditions, if the file holds one.

    A file that cannot be read counts as absent, with a warning; so does a senseless entry.
    """
    for entry in _entries(path):
        if _same(entry, conditions):
            return _sound(entry, len(conditions.macs))
    return None


def write_profile(path: Path, conditions: Conditions, profile: Profile) -> bool:
    """Put a profile into the file, in place of one of the same conditions; others stay.

    The file is replaced as a whole. Where the folder cannot be written to, a warning says so and
    False is returned.
    """
    others = [entry for entry in _entries(path) if not _same(entry, conditions)]
    content = {"schema": _SCHEMA, "profiles": [*others, {**asdict(conditions), **asdict(profile)}]}
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(prefix=".profile.", suffix=".tmp", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=2)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        warnings.warn(
            f"the profile is kept in memory alone, since {path} cannot be written ({error}); it "
            "will be measured again by the next process",
            stacklevel=2,
        )
        return False
    return True


def _entries(path: Path) -> list[dict[str, Any]]:
    """The file's profiles; none where it is missing, unreadable or of another schema."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} cannot be read and is not used ({error})", stacklevel=2)
        return []
    if not isinstance(content, Mapping) or content.get("schema") != _SCHEMA:
        return []
    profiles = content.get("profiles")
    return [e for e in profiles if isinstance(e, dict)] if isinstance(profiles, list) else []


def _sound(entry: Mapping[str, Any], exits: int) -> Profile | None:
    """The entry as a profile; None unless it has increasing finite numbers for every exit."""
    try:
        median, p95 = (tuple(map(float, entry[key])) for key in ("median_ms", "p95_ms"))
        rounds = int(entry["rounds"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    for values in (median, p95):
        increase = all(a < b for a, b in zip((0.0, *values), (*values, math.inf), strict=True))
        if len(values) != exits or not increase:
            return None
    return Profile(median, p95, rounds)


def _same(entry: Mapping[str, Any], conditions: Conditions) -> bool:
    here = json.loads(json.dumps(asdict(conditions)))  # tuples as JSON gives them back
    return all(entry.get(key) == value for key, value in here.items())


def _increasing(values: Sequence[float]) -> tuple[float, ...]:
    increasing: list[float] = []
    for value in values:
        least = increasing[-1] * _STEP if increasing else 1e-6
        increasing.append(max(value, least))
    return tuple(increasing)


def _machine() -> str:
    """This device in words: architecture, cores, and the processor's or the board's own name."""
    name = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                name = value.strip()
    except OSError:
        name = platform.processor()
    return f"{platform.machine()}, {os.cpu_count()} cores, {name or 'unknown processor'}"

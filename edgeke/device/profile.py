"""What each exit costs on this very device: measured once, kept beside the model."""

import json
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnxruntime

from edgeke.device.timing import summary, time_interleaved
from edgeke.errors import InputError

__all__ = ["Conditions", "Profile", "measure_costs", "read_profile", "write_profile"]

_SCHEMA = 1
_SECONDS = 5.0
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


def measure_costs(run: Callable[[int], Any], exits: int, rounds: int) -> Profile:
    """Measure `run(exit)` for every exit: warmed up, interleaved, in up to `rounds` rounds.

    After five seconds 20 rounds are enough, so a slow device is not held up.
    Errors: InputError for fewer than one round.
    """
    if rounds < 1:
        raise InputError(f"rounds = {rounds!r} must be at least 1")

    def forced(exit: int) -> Callable[[], Any]:
        return lambda: run(exit)

    contenders = {str(exit): forced(exit) for exit in range(exits)}
    taken = time_interleaved(contenders, rounds, _SECONDS)
    found = [summary(taken[str(exit)]) for exit in range(exits)]
    return Profile(
        _increasing([of["median"] for of in found]),
        _increasing([of["p95"] for of in found]),
        len(taken["0"]),
    )


def read_profile(path: Path, conditions: Conditions) -> Profile | None:
    """The profile measured under these very conditions, if the file holds one.

    A file that cannot be read counts as absent, with a warning.
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
    except (OSError, ValueError) as error:
        warnings.warn(f"{path} cannot be read and is not used ({error})", stacklevel=2)
        return []
    known = isinstance(content, Mapping) and content.get("schema") == _SCHEMA
    profiles = content.get("profiles") if known else None
    if not isinstance(profiles, list):
        return []
    return [entry for entry in profiles if isinstance(entry, dict)]


def _sound(entry: Mapping[str, Any], exits: int) -> Profile | None:
    """The entry as a profile; None unless it holds increasing numbers for every exit."""
    try:
        median, p95 = (tuple(map(float, entry[key])) for key in ("median_ms", "p95_ms"))
        rounds = int(entry["rounds"])
    except (KeyError, TypeError, ValueError):
        return None
    increase = all(
        len(values) == exits and all(a < b for a, b in zip((0.0, *values), values, strict=False))
        for values in (median, p95)
    )
    return Profile(median, p95, rounds) if increase else None


def _same(entry: Mapping[str, Any], conditions: Conditions) -> bool:
    asked = json.loads(json.dumps(asdict(conditions)))  # tuples as JSON gives them back
    return all(entry.get(key) == value for key, value in asked.items())


def _increasing(values: Sequence[float]) -> tuple[float, ...]:
    found: list[float] = []
    for value in values:
        found.append(max(value, found[-1] * _STEP) if found else max(value, 1e-6))
    return tuple(found)


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

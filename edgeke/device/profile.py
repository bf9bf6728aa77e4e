"""What each exit costs on this very device: measured once, kept beside the model."""

import json
import math
import os
import platform
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from edgeke.device.timing import summary, time_interleaved

# A deeper exit counts at least this much more than the one before it.
_STEP = 1.001


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


def conditions(model: Path, macs: Sequence[int], threads: int) -> str:
    """What costs depend on, in words: a profile measured under other conditions is stale.

    MACs `[E]` stand for the network.
    """
    network = f"{model.name} of {'/'.join(map(str, macs))} MACs"
    return f"{network}, {threads} threads, onnxruntime {onnxruntime.__version__}, {processor()}"


def processor() -> str:
    """This device in words: architecture, cores, and the processor's or the board's own name."""
    name = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                name = value.strip()
    except OSError:
        pass
    return f"{platform.machine()}, {os.cpu_count()} cores, {name or 'unknown processor'}"


def read_profile(path: Path, conditions: str, exits: int) -> Profile | None:
    """The profile of so many exits measured under these very conditions, if the file has one.

    A file that cannot be read counts as absent, with a warning; so does an entry that is no
    profile, without.
    """
    try:
        entry = _entries(path)[conditions]
        profile = Profile(
            tuple(map(float, entry["median_ms"])),
            tuple(map(float, entry["p95_ms"])),
            int(entry["rounds"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    for values in (profile.median_ms, profile.p95_ms):
        increase = all(a < b for a, b in zip((0.0, *values), (*values, math.inf), strict=True))
        if len(values) != exits or not increase:
            return None
    return profile


def write_profile(path: Path, conditions: str, profile: Profile) -> bool:
    """Put a profile into the file, in place of one of the same conditions; others stay.

    The file is replaced as a whole. Where the folder cannot be written to, a warning says so and
    False is returned.
    """
    content = _entries(path) | {conditions: asdict(profile)}
    try:
        handle, temporary = tempfile.mkstemp(prefix=".profile.", suffix=".tmp", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(content, file, indent=2)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError as error:
        warnings.warn(
            f"the profile is kept in memory alone, since {path} cannot be written ({error}); it "
            "will be measured again by the next process",
            stacklevel=2,
        )
        return False
    return True


def _entries(path: Path) -> dict[str, Any]:
    """The file's profiles by their conditions; none where it is missing or cannot be read."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} cannot be read and is not used ({error})", stacklevel=2)
        return {}
    return content if isinstance(content, dict) else {}


def _increasing(values: Sequence[float]) -> tuple[float, ...]:
    increasing: list[float] = []
    for value in values:
        least = increasing[-1] * _STEP if increasing else 1e-6
        increasing.append(max(value, least))
    return tuple(increasing)

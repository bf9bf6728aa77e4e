"""What each exit costs on this very device: measured once, kept beside the model."""

import json
import math
import os
import platform
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from edgeke.device.files import replace_file
from edgeke.device.session import cores
from edgeke.device.timing import summary, time_interleaved

# A deeper exit counts at least this much more than the one before it.
_STEP = 1.001
# What tells ARM's cores apart, in /proc/cpuinfo, and where each core's greatest frequency is.
_CORE = ("implementer", "part", "variant", "revision")
_FREQUENCY = "sys/devices/system/cpu/cpu[0-9]*/cpufreq/cpuinfo_max_freq"
_ROOT = Path("/")


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
        increasing([exit["median"] for exit in summaries]),
        increasing([exit["p95"] for exit in summaries]),
        len(milliseconds["0"]),
    )


def conditions(model: Path, macs: Sequence[int], threads: int) -> str:
    """What costs depend on, in words: a profile measured under other conditions is stale.

    MACs `[E]` stand for the network.
    """
    network = f"{model.name} of {'/'.join(map(str, macs))} MACs"
    return f"{network}, {threads} threads, onnxruntime {onnxruntime.__version__}, {processor()}"


def processor() -> str:
    """This device in words: architecture, cores, processor, board, greatest frequency, memory.

    64-bit ARM kernels name no processor, so its cores are told by implementer, part, variant and
    revision. Memory is rounded up to a power of two, since a kernel keeps a varying part of it.
    Where neither processor nor board has a name, the host's stands for them.
    """
    names, parts = [platform.processor()], set()
    core: dict[str, str] = {}
    for line in [*_read("proc/cpuinfo").splitlines(), ""]:
        key, _, value = line.partition(":")
        core[key.strip()] = value.strip()
        if key.strip() in ("model name", "Model"):
            names.append(value.strip())
        if not line.strip():
            if "CPU part" in core:
                parts.add("/".join(core.get(f"CPU {name}", "?") for name in _CORE))
            core = {}
    who = [names[-1], *sorted(parts), _read("proc/device-tree/model").strip("\0 \n")]
    words = [platform.machine(), f"{cores()} cores"]
    words += list(dict.fromkeys(filter(None, who))) or [f"unknown processor of {platform.node()}"]
    frequencies = {_read(file) for file in _ROOT.glob(_FREQUENCY)}  # in kHz
    words += [f"{int(value) // 1000} MHz" for value in sorted(frequencies) if value.strip()]
    if memory := re.search(r"MemTotal: +(\d+) kB", _read("proc/meminfo")):
        words.append(f"{2 ** math.ceil(math.log2(int(memory[1]) / 2**20)):g} GiB")
    return ", ".join(words)


def _read(path: str | Path) -> str:
    """What the kernel says there; nothing where it does not."""
    try:
        return (_ROOT / path).read_text(errors="replace")
    except OSError:
        return ""


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
        replace_file(path, json.dumps(content, indent=2).encode())
    except OSError as error:
        warnings.warn(
            f"the profile is kept in memory alone, since {path} cannot be written ({error}); it "
            "will be measured again by the next process",
            stacklevel=2,
        )
        return False
    return True


def leads_out(folder: Path, file: Path) -> bool:
    """Whether a file of a folder is a symbolic link to outside of it."""
    return not Path(os.path.realpath(file)).is_relative_to(os.path.realpath(folder))


def _entries(path: Path) -> dict[str, Any]:
    """The file's profiles by their conditions; none where it is missing or cannot be read."""
    if leads_out(path.parent, path):
        warnings.warn(f"{path} leads out of its folder and is not used", stacklevel=2)
        return {}
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} cannot be read and is not used ({error})", stacklevel=2)
        return {}
    return content if isinstance(content, dict) else {}


def increasing(values: Sequence[float]) -> tuple[float, ...]:
    """The values, each at least 0.1 % more than the one before."""
    increasing: list[float] = []
    for value in values:
        least = increasing[-1] * _STEP if increasing else 1e-6
        increasing.append(max(value, least))
    return tuple(increasing)

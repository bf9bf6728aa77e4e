"""Measures models where they run: answers, latencies, memory. numpy and onnxruntime only.

Run as a process of its own, python -m edgeke.device.measure, in a folder that holds `job.json`,
`images.npy` (uint8 `[N, H, W, C]`), `models/` (the bundle and static networks) and an empty `out/`.
It writes `out/measurements.json` and `out/answers.npz`.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeke.device.blocks import BlockRow
from edgeke.device.classifier import Classifier
from edgeke.device.profile import processor
from edgeke.device.session import open_session
from edgeke.device.timing import summary, time_interleaved
from edgeke.errors import InputError, report

_MODELS, _OUT = Path("models"), Path("out")
_BATCH = 16  # more do not fit the cache
_BATCHES = (8, 32)
_PARTS = 3  # batches of each size
_WARM_UP = 10

_Images = NDArray[np.uint8]
_Run = Callable[[_Images], Any]


@dataclass(frozen=True)
class Setting:
    """One way to answer: a network of the job, and its inputs beside the image.

    The inputs are `thresholds`, `votes` and `bias`, or none for a static network.
    `all_images`: whether the answers to all images are kept.
    """

    network: str
    inputs: dict[str, list[float]]
    all_images: bool


@dataclass(frozen=True)
class Job:
    """What to measure; names are those of metrics, such as `int8/default`.

    `networks`: files in `models/`. `settings`: what is timed, the static network `main` among them.
    `batches`: precision of the default points whose throughput is measured. The first
    `latency_images` images are timed. `deadline_ms`: None means the 95th percentile of `main`.
    `threads`: the first number is the device's own setting, others are measured as well.
    """

    networks: dict[str, str]
    settings: dict[str, Setting]
    batches: dict[str, str]
    latency_images: int
    deadline_ms: float | None
    threads: tuple[int, ...]

    @classmethod
    def from_json(cls, text: str) -> "Job":
        """Read the text of job.json: `asdict` as JSON."""
        content = json.loads(text)
        settings = {name: Setting(**values) for name, values in content.pop("settings").items()}
        return cls(settings=settings, **content)


@dataclass(frozen=True)
class Trace:
    """A setting on each timed image: the exit it left at (E = voted), and milliseconds."""

    exits: list[int]
    latency_ms: list[float]


@dataclass(frozen=True)
class Measurements:
    """What a device measured.

    `metrics` by network or setting and quantity, such as `int8/default/latency_ms_mean`; `traces`
    of the settings with thresholds; `machine`: names and versions; `blocks` by precision: none for
    a model that does not list them.
    """

    metrics: dict[str, float]
    traces: dict[str, Trace]
    machine: dict[str, str]
    blocks: dict[str, list[BlockRow]]

    @classmethod
    def from_json(cls, text: str) -> "Measurements":
        """Read the text of measurements.json: `asdict` as JSON."""
        content = json.loads(text)
        traces = {name: Trace(**trace) for name, trace in content.pop("traces").items()}
        blocks = {
            precision: [BlockRow(**row) for row in rows]
            for precision, rows in content.pop("blocks").items()
        }
        return cls(traces=traces, blocks=blocks, **content)


def measure(job: Job) -> tuple[Measurements, dict[str, NDArray[np.float32]]]:
    """Run a job in this folder; returns the measurements, and first outputs `[N, K]` by setting.

    Errors: InputError for a damaged file.
    """
    images: _Images = np.load("images.npy")
    timed = _parts(images[: job.latency_images], 1)
    first, *others = job.threads
    runs = _open(job, first)
    latencies = _time(runs, timed)
    metrics = _summaries(latencies, job.deadline_ms, "")
    for threads in others:
        more = _time(_open(job, threads), timed)
        metrics |= _summaries(more, job.deadline_ms, f"threads_{threads}/")
    metrics |= _throughput(job, runs, images)
    blocks = {}
    for precision in job.batches.values():
        classifier = Classifier(_MODELS, precision, first)
        if classifier.lists_blocks:
            blocks[precision] = classifier.profile_blocks(job.latency_images).cascade()
    for name, file in job.networks.items():
        needs = run_fresh(_MODELS / file, first)
        metrics |= {f"{name}/{key}": value for key, value in needs.items()}
    traces, answers = {}, {}
    for name, setting in job.settings.items():
        if setting.inputs:
            exits = [int(runs[name](image)[1][0]) for image in timed]
            traces[name] = Trace(exits, latencies[name])
        if setting.all_images:
            parts = _parts(images, 1 if setting.inputs else _BATCH)
            answers[name] = np.concatenate([runs[name](part)[0] for part in parts])
    machine = {
        "processor": processor(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }
    return Measurements(metrics, traces, machine, blocks), answers


def _open(job: Job, threads: int) -> dict[str, _Run]:
    """Every setting as a function of images `[N, H, W, C]`; N is 1 where there are thresholds."""
    sessions = {name: open_session(_MODELS / file, threads) for name, file in job.networks.items()}

    def run(session: Any, inputs: Mapping[str, Any], images: _Images) -> Any:
        return session.run(None, {"image": images, **inputs})

    runs: dict[str, _Run] = {}
    for name, setting in job.settings.items():
        inputs = {key: np.asarray(values, np.float32) for key, values in setting.inputs.items()}
        runs[name] = partial(run, sessions[setting.network], inputs)
    return runs


def _parts(images: _Images, size: int) -> list[_Images]:
    return [images[start : start + size] for start in range(0, len(images), size)]


def _time(runs: Mapping[str, _Run], parts: Sequence[_Images]) -> dict[str, list[float]]:
    """Milliseconds of every function on each part, interleaved."""
    current = parts[0]

    def choose(number: int) -> None:
        nonlocal current
        current = parts[number]

    calls = {name: lambda run=run: run(current) for name, run in runs.items()}
    return time_interleaved(calls, len(parts), math.inf, choose)


def _summaries(
    latencies: Mapping[str, Sequence[float]], deadline_ms: float | None, where: str
) -> dict[str, float]:
    deadline = deadline_ms or float(np.percentile(latencies["main"], 95))
    metrics: dict[str, float] = {}
    for name, values in latencies.items():
        numbers = summary(values)
        numbers |= {"mean": float(np.mean(values)), "p99": float(np.percentile(values, 99))}
        metrics |= {f"{name}/{where}latency_ms_{key}": ms for key, ms in numbers.items()}
        misses = (np.asarray(values) > deadline).mean()
        metrics[f"{name}/{where}deadline_misses"] = float(misses)
    return metrics


def _throughput(job: Job, runs: Mapping[str, _Run], images: _Images) -> dict[str, float]:
    """Images per second in batches, of static networks and of default points."""
    batched = {name: run for name, run in runs.items() if not job.settings[name].inputs}
    for name, precision in job.batches.items():
        batched[name] = Classifier(_MODELS, precision, job.threads[0]).predict_batch
    metrics = {}
    for size in _BATCHES:
        parts = [part for part in _parts(images, size) if len(part) == size][:_PARTS] or [images]
        for name, values in _time(batched, parts).items():
            rate = len(parts[0]) * 1e3 / float(np.mean(values))
            metrics[f"{name}/images_per_second_batch_{size}"] = rate
    return metrics


def run_fresh(file: Path, threads: int) -> dict[str, float]:
    """A file's size, and what a fresh process needs to load and to run it."""
    command = [sys.executable, "-m", "edgeke.device.measure", "--alone", str(file), str(threads)]
    paths = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # as this process imports
    done = subprocess.run(command, env=paths, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{file} cannot be run alone: {done.stderr.strip()}")
    needs: dict[str, float] = json.loads(done.stdout)
    return {"file_mib": file.stat().st_size / 2**20, **needs}


def _run_alone(path: Path, threads: int) -> dict[str, float]:
    started = time.perf_counter()
    session = open_session(path, threads)
    load_ms = (time.perf_counter() - started) * 1e3
    feeds = {}
    for tensor in session.get_inputs():
        shape = [side if isinstance(side, int) else 1 for side in tensor.shape]
        kind = np.uint8 if tensor.type == "tensor(uint8)" else np.float32
        feeds[tensor.name] = np.full(shape, 2, kind)  # thresholds of 2 take the longest path
    for _ in range(_WARM_UP):
        session.run(None, feeds)
    return {"load_ms": load_ms, "peak_memory_mib": peak_memory()}


def peak_memory() -> float:
    """The most memory this process has used so far, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent used before it started this program
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    import resource  # POSIX only

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / (2**20 if sys.platform == "darwin" else 1024)


def main(arguments: Sequence[str]) -> int:
    """The process: the job, or `--alone FILE THREADS`. Returns 0, or 1 after an error."""
    try:
        if arguments:
            print(json.dumps(_run_alone(Path(arguments[1]), int(arguments[2]))))
            return 0
        measurements, answers = measure(Job.from_json(Path("job.json").read_text()))
    except InputError as error:
        return report(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    np.savez(_OUT / "answers.npz", **answers)  # type: ignore[arg-type]
    (_OUT / "measurements.json").write_text(json.dumps(asdict(measurements)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

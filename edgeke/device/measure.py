"""Measures models where they run: answers, latencies, memory. numpy and onnxruntime only.

Run as a process of its own: python -m edgeke.device.measure JOB.json. The job names the one-file
models, static rivals, test images (.npy) and an output folder; see `measure`.
"""

import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeke.device.classifier import Classifier
from edgeke.device.policy import Policy, force_exit, parse_policy
from edgeke.device.session import open_session
from edgeke.errors import InputError

__all__ = ["main", "measure", "peak_memory", "tier"]

_WARM_UP = 10
_BATCH = 250
_BATCHES = (1, 8, 64)

_Call = Callable[[NDArray[np.uint8]], Any]


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job and return its measurements.

    The job: `folder` (of the models), `models` (precision to one-file model in it), `static` (name
    to file in it), `images` (uint8 `[N, H, W, C]`, .npy), `latency_images`, `deadline_ms` (or null:
    the 95th percentile of the static network `main`), `tiers` (name, threads, quota), `out`
    (folder). Writes to `out`: `probabilities.<precision>.npy` `[E, N, K]` with every exit forced in
    turn, `<name>.npy` with each static network's logits `[N, K]`. The first tier also gives
    throughput, memory and energy.
    """
    images, out, folder = np.load(job["images"]), Path(job["out"]), Path(job["folder"])
    threads = job["tiers"][0]["threads"]
    carried, load_ms = {}, {}
    for precision, file in job["models"].items():
        started = time.perf_counter()
        session = open_session(folder / file, threads)
        load_ms[precision] = (time.perf_counter() - started) * 1e3
        carried[precision] = session.get_modelmeta().custom_metadata_map.get("policy", "{}")
        policy = parse_policy(carried[precision])
        forced = np.stack([_force(session, policy, e, images) for e in range(len(policy.macs))])
        np.save(out / f"probabilities.{precision}.npy", forced)
    for name, file in job["static"].items():
        static = open_session(folder / file, threads)
        parts = [static.run(None, {"image": part})[0] for part in _batches(images, _BATCH)]
        np.save(out / f"{name}.npy", np.concatenate(parts))

    files = {f"edgeke.{precision}": file for precision, file in job["models"].items()}
    files |= job["static"]
    return {
        "policies": carried,
        "tiers": {
            tier["name"]: _tier_alone(job, number) for number, tier in enumerate(job["tiers"])
        },
        "throughput": _throughput(job, images),
        "load_ms": load_ms,
        "file_mib": {name: (folder / file).stat().st_size / 2**20 for name, file in files.items()},
        "peak_memory_mib": {
            name: _memory_of(str(folder / file), threads) for name, file in files.items()
        },
        "machine": {
            "processor": _processor(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "onnxruntime": onnxruntime.__version__,
            "numpy": np.__version__,
        },
        "modules": sorted({name.split(".")[0] for name in sys.modules}),
    }


def tier(job: dict[str, Any], number: int) -> dict[str, Any]:
    """Latencies and exits under one tier's threads and quota; energy in the first tier.

    Taken image by image over the first `latency_images` images, all contenders in a new order each
    time, so that drift and cold caches hit them alike. Errors: InputError where the quota is not
    permitted.
    """
    images, folder = np.load(job["images"])[: job["latency_images"]], Path(job["folder"])
    setting = job["tiers"][number]
    threads, exits_of = setting["threads"], set()
    contenders: dict[str, _Call] = {}
    for precision, file in job["models"].items():
        session = open_session(folder / file, threads)
        policy = parse_policy(session.get_modelmeta().custom_metadata_map.get("policy", "{}"))
        for label, point in policy.named.items():
            exits_of.add(f"{precision}/{label}")
            run = _cascade(session, point.thresholds, point.votes)
            contenders[f"{precision}/{label}"] = run
        for exit in range(len(policy.macs)):
            thresholds = force_exit(exit, len(policy.macs))
            run = _cascade(session, thresholds, policy.points[0].votes)
            contenders[f"{precision}/exit_{exit}"] = run
    for name, file in job["static"].items():
        contenders[name] = _static(open_session(folder / file, threads))
    latencies, exits = _time(contenders, images, exits_of)
    deadline = job["deadline_ms"] or float(np.percentile(latencies["main"], 95))
    found: dict[str, Any] = {
        "latency_ms": {name: _summary(values, deadline) for name, values in latencies.items()},
        "exits": exits,
        "deadline_ms": deadline,
    }
    return found


def _tier_alone(job: dict[str, Any], number: int) -> dict[str, Any]:
    """`tier` in a fresh process, so that a quota ends with it; what it says when it fails."""
    command = [sys.executable, "-m", "edgeke.device.measure", "--tier", str(number)]
    done = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if done.returncode == 3:
        return {"unavailable": done.stderr.strip()}
    if done.returncode:
        raise InputError(f"tier {job['tiers'][number]['name']} failed: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _throughput(job: dict[str, Any], images: NDArray[np.uint8]) -> dict[str, dict[str, float]]:
    """Images per second in batches, at the default point and of the static networks."""
    threads, folder = job["tiers"][0]["threads"], Path(job["folder"])
    runs: dict[str, _Call] = {}
    for precision in job["models"]:
        classifier = Classifier(folder, precision, threads)
        runs[f"{precision}/default"] = classifier.predict_batch
    for name, file in job["static"].items():
        runs[name] = _static(open_session(folder / file, threads))
    found: dict[str, dict[str, float]] = {name: {} for name in runs}
    for size in _BATCHES:
        parts = [part for part in _batches(images, size) if len(part) == size] or [images]
        parts = parts[: max(1, -(-job["latency_images"] // size))]
        for name, run in runs.items():
            run(parts[0])
            started = time.perf_counter()
            for part in parts:
                run(part)
            seconds = time.perf_counter() - started
            found[name][str(size)] = sum(map(len, parts)) / seconds
    return found


def _batches(images: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    for start in range(0, len(images), size):
        yield images[start : start + size]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory() -> float:
    """The most memory this process has held so far, in MiB.

    Linux's VmHWM belongs to this program alone; getrusage would also count the parent's memory
    from before the program was started.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024
    except (OSError, StopIteration):
        import resource  # POSIX only

        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return used / (2**20 if sys.platform == "darwin" else 1024)


def _cascade(session: Any, thresholds: tuple[float, ...], votes: tuple[float, ...]) -> Any:
    feeds = {
        "thresholds": np.asarray(thresholds, np.float32),
        "votes": np.asarray(votes, np.float32),
    }
    return lambda image: session.run(None, {"image": image, **feeds})


def _static(session: Any) -> Any:
    return lambda image: session.run(None, {"image": image})


def _force(
    session: Any, policy: Policy, exit: int, images: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Probabilities `[N, K]` of exit `exit`, for every image."""
    run = _cascade(session, force_exit(exit, len(policy.macs)), policy.points[0].votes)
    answers = [run(image[None]) for image in images]
    if any(left[0] != exit for _, left in answers):
        raise InputError(f"the model did not obey thresholds that force exit {exit}; export again")
    return np.concatenate([probabilities for probabilities, _ in answers])


def _time(
    contenders: dict[str, _Call],
    images: NDArray[np.uint8],
    points: set[str],
) -> tuple[dict[str, list[float]], dict[str, list[int]]]:
    """Milliseconds per image and contender; and the exits that each operating point took."""
    for run in contenders.values():
        for image in images[:_WARM_UP]:
            run(image[None])
    latencies: dict[str, list[float]] = {name: [] for name in contenders}
    exits: dict[str, list[int]] = {name: [] for name in contenders if name in points}
    order, shuffle = list(contenders.items()), random.Random(0).shuffle
    for image in images:
        shuffle(order)  # whoever runs behind a large network finds the caches cold
        for name, run in order:
            started = time.perf_counter()
            answer = run(image[None])
            latencies[name].append((time.perf_counter() - started) * 1e3)
            if name in exits:
                exits[name].append(int(answer[1][0]))
    return latencies, exits


def _summary(values: list[float], deadline: float) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "min": float(np.min(values)),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
        "p99": float(np.percentile(values, 99)),
        "deadline_misses": float((np.asarray(values) > deadline).mean()),
    }


def _memory_of(model: str, threads: int) -> float:
    """Peak memory of a fresh process that loads one model and answers a few images."""
    command = [sys.executable, "-m", "edgeke.device.measure", "--memory", model, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"{model} cannot be run alone: {done.stderr.strip()}")
    return float(done.stdout)


def _run_alone(model: Path, threads: int) -> float:
    session = open_session(model, threads)
    feeds = {}
    for tensor in session.get_inputs():
        shape = [side if isinstance(side, int) else 1 for side in tensor.shape]
        kind = np.uint8 if tensor.type == "tensor(uint8)" else np.float32
        feeds[tensor.name] = np.full(shape, 2, kind)  # thresholds of 2 take the longest path
    for _ in range(_WARM_UP):
        session.run(None, feeds)
    return peak_memory()


def main(arguments: list[str]) -> int:
    """The process: a job file, `--memory MODEL THREADS`, or `--tier NUMBER` with a job as input."""
    try:
        if arguments[0] == "--memory":
            print(_run_alone(Path(arguments[1]), int(arguments[2])))
            return 0
        if arguments[0] == "--tier":
            return _print_tier(json.load(sys.stdin), int(arguments[1]))
        job = json.loads(Path(arguments[0]).read_text())
        result = measure(job)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (Path(job["out"]) / "measurements.json").write_text(json.dumps(result))
    return 0


def _print_tier(job: dict[str, Any], number: int) -> int:
    """Print a tier's measurements; exit status 3 says that the machine does not permit it."""
    try:
        print(json.dumps(tier(job, number)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 3 if job["tiers"][number]["quota"] is not None else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

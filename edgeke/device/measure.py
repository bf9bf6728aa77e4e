"""Measures a model where it runs: answers, latencies, memory. numpy and onnxruntime only.

Run as a process of its own: python -m edgeke.device.measure JOB.json. The job names the one-file
model, static rivals, test images (.npy) and an output folder; see `measure`.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.errors import DeviceError
from edgeke.device.policy import Policy, force_exit, parse_policy
from edgeke.device.session import open_session

__all__ = ["main", "measure", "peak_memory"]

_WARM_UP = 10
_BATCH = 250


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job and return its measurements.

    The job: `model` (the one file), `static` (name to file), `images` (uint8 `[N, H, W, C]`,
    .npy), `threads`, `latency_images`, `out` (folder). Writes to `out`: `probabilities.npy`
    `[E, N, K]` with every exit forced in turn, `<name>.npy` with each static network's logits
    `[N, K]`. Latencies are taken image by image over the first `latency_images` images, all
    contenders in a new order each time, so that drift and cold caches hit them alike.
    """
    images, out, threads = np.load(job["images"]), Path(job["out"]), job["threads"]
    started = time.perf_counter()
    session = open_session(Path(job["model"]), threads)
    load_ms = (time.perf_counter() - started) * 1e3
    carried = session.get_modelmeta().custom_metadata_map.get("policy", "{}")
    policy = parse_policy(carried)
    statics = {name: open_session(Path(file), threads) for name, file in job["static"].items()}

    forced = np.stack([_force(session, policy, e, images) for e in range(len(policy.macs))])
    np.save(out / "probabilities.npy", forced)
    for name, static in statics.items():
        parts = [
            static.run(None, {"image": images[start : start + _BATCH]})[0]
            for start in range(0, len(images), _BATCH)
        ]
        np.save(out / f"{name}.npy", np.concatenate(parts))

    contenders: dict[str, Callable[[NDArray[np.uint8]], Any]] = {}
    for label, point in policy.named.items():
        contenders[label] = _cascade(session, point.thresholds, point.votes)
    for exit in range(len(policy.macs)):
        thresholds = force_exit(exit, len(policy.macs))
        contenders[f"exit_{exit}"] = _cascade(session, thresholds, policy.points[0].votes)
    for name, static in statics.items():
        contenders[name] = _static(static)
    latencies, exits = _time(contenders, images[: job["latency_images"]], set(policy.named))
    files = {"edgeke": job["model"], **job["static"]}
    return {
        "policy": carried,
        "latency_ms": {name: _summary(values) for name, values in latencies.items()},
        "exits": exits,
        "load_ms": load_ms,
        "file_mib": {name: Path(file).stat().st_size / 2**20 for name, file in files.items()},
        "peak_memory_mib": {name: _memory_of(file, threads) for name, file in files.items()},
        "modules": sorted({name.split(".")[0] for name in sys.modules}),
    }


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
        raise DeviceError(f"the model did not obey thresholds that force exit {exit}; export again")
    return np.concatenate([probabilities for probabilities, _ in answers])


def _time(
    contenders: dict[str, Callable[[NDArray[np.uint8]], Any]],
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


def _summary(values: list[float]) -> dict[str, float]:
    return {
        "mean": float(np.mean(values)),
        "min": float(np.min(values)),
        "median": float(np.median(values)),
        "p95": float(np.percentile(values, 95)),
    }


def _memory_of(model: str, threads: int) -> float:
    """Peak memory of a fresh process that loads one model and answers a few images."""
    command = [sys.executable, "-m", "edgeke.device.measure", "--memory", model, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DeviceError(f"{model} cannot be run alone: {done.stderr.strip()}")
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
    """The process: a job file, or `--memory MODEL THREADS`."""
    try:
        if arguments[0] == "--memory":
            print(_run_alone(Path(arguments[1]), int(arguments[2])))
            return 0
        job = json.loads(Path(arguments[0]).read_text())
        result = measure(job)
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (Path(job["out"]) / "measurements.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

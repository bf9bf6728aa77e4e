"""Ray: the nodes of a cluster, and one actor on each device.

A device is a node with a custom resource `edgeke:<name>`; nothing else runs there.
"""

import hashlib
import importlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeke.cluster import worker as worker_module
from edgeke.cluster.worker import Content, Program, Programs, Worker, run_together
from edgeke.errors import InputError

PREFIX = "edgeke:"
_STARTS_WITHIN = 60.0  # seconds for a device's process to start
_STORE_BYTES = 2**30


def load_ray() -> ModuleType:
    """The package ray. Errors: InputError when it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_raylet_start_wait_time_s", "60")
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")  # the engine handles them
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError("ray is missing: pip install -r requirements-ray.txt") from None


def connect(address: str | None, local: int | None) -> list[str]:
    """Join a cluster, or make one of `local` devices here. Returns the names of its devices.

    Errors: InputError when there is none.
    """
    ray = load_ray()
    if local is not None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            ray.init(
                num_cpus=max(1, local),
                resources={f"{PREFIX}local{number}": 1 for number in range(local)},
                object_store_memory=_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except Exception as error:  # Ray raises no class of its own here
            raise InputError(
                f"Ray did not start here ({' '.join(str(error).split())[:150]}); it gives up when"
                " its processes take over 15 s to start: try again when less else runs"
            ) from error
    else:
        try:
            ray.init(address=address or "auto", log_to_driver=False, logging_level="ERROR")
        except ConnectionError as error:
            raise InputError(
                f"there is no cluster at {address or 'this machine'} ({error}); start one with `ray"
                " start --head`, or try --local 3"
            ) from None
    return device_names()


def device_names() -> list[str]:
    """The devices that are in the cluster now, sorted."""
    ray = load_ray()
    return sorted(
        name.removeprefix(PREFIX) for name in ray.cluster_resources() if name.startswith(PREFIX)
    )


def versions() -> dict[str, str]:
    """What must be the same on all devices, so that they compute the same."""
    source = Path(worker_module.__file__).read_bytes()
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__.split(".")[0],
        "edgeke": hashlib.sha256(source).hexdigest()[:12],
    }


class DeviceActor:
    """The process on one device."""

    def __init__(self, threads: int) -> None:
        self.worker = Worker(threads)
        self.factor, self.rate, self.latency = 0.0, 0.0, 0.0

    def describe(self) -> dict[str, Any]:
        """Versions, bytes of free memory, process id, the host."""
        return {
            "versions": versions(),
            "memory": free_memory(),
            "pid": os.getpid(),
            "host": platform.node(),
        }

    def load(self, plan: int, program: Program, graphs: dict[str, bytes]) -> None:
        """See `Worker.load`."""
        self.worker.load(plan, program, graphs)

    def unload(self, plan: int) -> None:
        """See `Worker.unload`."""
        self.worker.unload(plan)

    def graphs(self) -> set[str]:
        """Keys of the graphs that are open."""
        return self.worker.graphs

    def forget(self, image: int) -> None:
        """See `Worker.forget`."""
        self.worker.forget(image)

    def phase(self, plan: int, image: int, number: int, *contents: Content) -> Any:
        """See `Worker.phase`: its messages, and last the seconds, as results of their own."""
        self._arrive(contents)
        started = time.perf_counter()
        messages, seconds = self.worker.phase(plan, image, number, contents)
        seconds = self._finish(seconds, started)
        return (*messages, seconds) if messages else seconds

    def final(self, plan: int, image: int, exit: int, *contents: Content) -> Any:
        """See `Worker.final`."""
        self._arrive(contents)
        started = time.perf_counter()
        logits, seconds = self.worker.final(plan, image, exit, contents)
        return logits, self._finish(seconds, started)

    def emulate(self, factor: float, rate: float = 0.0, latency: float = 0.0) -> None:
        """Be a slower device from now on, to try one: phases last `factor` times the processor's
        time, messages arrive after `latency` seconds at `rate` bytes a second (0: at once).
        """
        self.factor, self.rate, self.latency = factor, rate, latency
        self.worker.clock = time.thread_time if factor else time.perf_counter

    def measure(
        self, programs: Sequence[Programs], image: NDArray[Any], rounds: int
    ) -> list[list[tuple[NDArray[np.float64], list[float]]]]:
        """For each plan, seconds of every phase and final, run by all devices' programs here."""
        runs: list[list[tuple[NDArray[np.float64], list[float]]]] = []
        for number, each in enumerate(programs):
            workers = [Worker(self.worker.threads, self.worker.clock) for _ in each.programs]
            for device, program in enumerate(each.programs):
                keys = each.keys(device)
                workers[device].load(number, program, {key: each.graphs[key] for key in keys})
            runs.append([])
            for turn in range(rounds + 1):
                _, phases, finals = run_together(workers, number, each, image)
                if turn:  # the first one warms up
                    factor = self.factor or 1.0
                    runs[-1].append((phases * factor, [factor * one for one in finals]))
        return runs

    def pass_on(self, size: int, content: NDArray[np.uint8] | None) -> NDArray[np.uint8]:
        """Take an array, and return one of so many bytes."""
        if content is not None:
            self._arrive([{"content": content}])
        return np.zeros(size, np.uint8)

    def _arrive(self, contents: Sequence[Content]) -> None:
        """Wait as long as the messages would be on their way."""
        if self.rate and contents:
            size = sum(array.nbytes for content in contents for array in content.values())
            time.sleep(self.latency + size / self.rate)

    def _finish(self, seconds: float, started: float) -> float:
        """Wait until the work would be done; returns how long it takes."""
        if not self.factor:
            return seconds
        seconds *= self.factor
        time.sleep(max(0.0, started + seconds - time.perf_counter()))
        return seconds


def free_memory() -> int:
    """Bytes that this process may still use, by the kernel and by its cgroup."""
    free = [2**40]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(row.split()[1]) * 1024 for row in lines if row.startswith("MemAvailable")]
        for limit in ("memory/memory.limit_in_bytes", "memory.max"):
            file = Path("/sys/fs/cgroup") / limit
            if file.exists() and file.read_text().strip().isdigit():
                free.append(int(file.read_text()))
    except OSError:
        pass
    return min(free)


def start_actor(name: str, threads: int) -> Any:
    """Start the process of a device; it is there when it answers."""
    ray = load_ray()
    options = {"num_cpus": 0, "resources": {f"{PREFIX}{name}": 1}, "max_restarts": 0}
    return ray.remote(**options)(DeviceActor).remote(threads)


def start_actors(names: Sequence[str], threads: int) -> dict[str, Any]:
    """Processes on all these devices, after they have answered with the versions that run here.

    Errors: InputError that names those that did not start, or run something else.
    """
    ray = load_ray()
    actors = {name: start_actor(name, threads) for name in names}
    described = {name: actor.describe.remote() for name, actor in actors.items()}
    ready, waiting = ray.wait(
        list(described.values()), num_returns=max(1, len(described)), timeout=_STARTS_WITHIN
    )
    late = [name for name, ref in described.items() if ref in waiting]
    if late:
        raise InputError(
            f"{', '.join(late)} did not start within {_STARTS_WITHIN:.0f} s; another leader may use"
            " it: end that one, or leave the device out"
        )
    for name, ref in described.items():
        try:
            check_versions(name, ray.get(ref)["versions"])
        except ray.exceptions.RayError as error:
            raise InputError(
                f"{name} left while its process was starting "
                f"({' '.join(str(error).split())[:200]}); see that edgeke is installed there, "
                "and join it again: ray start"
            ) from None
    return actors


def check_versions(name: str, theirs: dict[str, str]) -> None:
    """Errors: InputError when a device runs other versions, so that its rows might differ."""
    ours = versions()
    different = [
        f"{key} {theirs.get(key)} instead of {ours[key]}"
        for key in ours
        if theirs.get(key) != ours[key]
    ]
    if different:
        raise InputError(
            f"device {name} has {', '.join(different)}: its rows would not fit the others'; "
            "install the same on all devices"
        )

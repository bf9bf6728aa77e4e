"""Ray: the nodes of a cluster, and one actor on each device.

A device is a node with a custom resource `edgeke:<name>`; nothing else runs there. A call does all
phases until an exit; meanwhile devices send each other rows over connections of their own: a call
of Ray takes milliseconds of a processor, which a board does not have.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib
import json
import math
import os
import platform
import secrets
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from edgeke.cluster import worker as worker_module
from edgeke.cluster.worker import (
    ORIGIN,
    Array,
    Content,
    Phase,
    Program,
    Programs,
    Worker,
    run_together,
)
from edgeke.errors import InputError

PREFIX = "edgeke:"
_STARTS_WITHIN = 60.0  # seconds for a device's process to start
_STORE_BYTES = 2**30
MAIL = "mail"  # the concurrency group of what is done beside a device's work
_MAIL_SECONDS = 60.0
_MOST_CLOSED = 10_000
_VOLLEY, _PAUSE = -1, 0.01  # in place of an image's number; seconds

Key = tuple[int, int, int]  # phase, source, target
Address = tuple[str, int]


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
    source = Path(worker_module.__file__).read_bytes() + Path(__file__).read_bytes()
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__.split(".")[0],
        "edgeke": hashlib.sha256(source).hexdigest()[:12],
    }


def pack(image: int, key: Key, content: Content) -> bytes:
    """A message as bytes: the length of its description, this as JSON, and the arrays."""
    described = [(name, array.dtype.str, array.shape) for name, array in content.items()]
    head = json.dumps([image, key, described]).encode()
    return b"".join([struct.pack("<I", len(head)), head, *(a.tobytes() for a in content.values())])


def unpack(message: bytes) -> tuple[int, Key, Content]:
    """What `pack` packed."""
    (size,) = struct.unpack_from("<I", message)
    image, key, described = json.loads(message[4 : 4 + size])
    content, place = {}, 4 + size
    for name, dtype, shape in described:
        count = math.prod(shape)
        content[name] = np.frombuffer(message, dtype, count, place).reshape(shape)
        place += content[name].nbytes
    return image, tuple(key), content


class _Lines:
    """Connections between the devices' processes, which share a key; one thread reads each."""

    def __init__(self, key: bytes, deliver: Callable[[int, Key, Content], None]) -> None:
        host = load_ray().util.get_node_ip_address()
        self._key, self._deliver = key, deliver
        self._listener = Listener((host, 0), authkey=key)
        self.address: Address = self._listener.address
        self._open: dict[Address, Any] = {}
        threading.Thread(target=self._accept, daemon=True).start()

    def send(self, to: Address, image: int, key: Key, content: Content) -> None:
        """Errors: OSError when nobody is there any more."""
        try:
            if to not in self._open:
                self._open[to] = _at_once(Client(to, authkey=self._key))
            self._open[to].send_bytes(pack(image, key, content))
        except (OSError, EOFError) as error:
            self._open.pop(to, None)
            raise ConnectionError(f"{to[0]}:{to[1]} does not take messages ({error})") from error

    def _accept(self) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError, AuthenticationError):
                line = _at_once(self._listener.accept())
                threading.Thread(target=self._read, args=(line,), daemon=True).start()

    def _read(self, line: Any) -> None:
        with contextlib.suppress(OSError, EOFError):
            while True:
                self._deliver(*unpack(line.recv_bytes()))


def _at_once(line: Any) -> Any:
    """A connection that does not wait for more to send."""
    with socket.socket(fileno=os.dup(line.fileno())) as same:
        same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return line


class _Mail:
    """What other devices have sent of images, until it is taken. Safe to share between threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._there: dict[tuple[int, Key], tuple[float, Content]] = {}
        self._closed: dict[int, None] = {}  # images, oldest first

    def put(self, image: int, key: Key, content: Content, at: float = 0.0) -> None:
        """Keep what may be taken from the time `at` on."""
        with self._changed:
            if image not in self._closed:
                self._there[image, key] = (at, content)
                self._changed.notify_all()

    def take(self, image: int, key: Key) -> Content:
        """Wait for it. Errors: TimeoutError when the image is given up, or after a minute."""
        with self._changed:
            self._changed.wait_for(
                lambda: (image, key) in self._there or image in self._closed, _MAIL_SECONDS
            )
            if (image, key) not in self._there:
                raise TimeoutError(f"image {image} was given up")
            at, content = self._there.pop((image, key))
        time.sleep(max(0.0, at - time.perf_counter()))
        return content

    def close(self, image: int) -> None:
        """Nobody takes or sends anything of an image any more."""
        with self._changed:
            self._closed[image] = None
            if len(self._closed) > _MOST_CLOSED:
                del self._closed[next(iter(self._closed))]
            for each in [each for each in self._there if each[0] == image]:
                del self._there[each]
            self._changed.notify_all()


class DeviceActor:
    """The process on one device. Messages arrive while it works; `key` is all devices'."""

    def __init__(self, threads: int, key: bytes) -> None:
        self.worker = Worker(threads)
        self.factor, self.rate, self.latency = 0.0, 0.0, 0.0
        self._peers: dict[int, Sequence[Address]] = {}
        self._mail, self._link_is_free = _Mail(), 0.0
        self._lines = _Lines(key, self._deliver)
        self._turn: Any = None

    def describe(self) -> dict[str, Any]:
        """Versions, bytes of free memory, process id, the host."""
        return {
            "versions": versions(),
            "memory": free_memory(),
            "pid": os.getpid(),
            "host": platform.node(),
        }

    def load(
        self, plan: int, program: Program, graphs: dict[str, bytes], peers: Sequence[Address]
    ) -> None:
        """See `Worker.load`. `peers` `[D + 1]`: where messages for each target go."""
        self.worker.load(plan, program, graphs)
        self._peers[plan] = peers

    def unload(self, plan: int) -> None:
        """See `Worker.unload`."""
        self.worker.unload(plan)
        self._peers.pop(plan, None)

    def graphs(self) -> set[str]:
        """Keys of the graphs that are open."""
        return self.worker.graphs

    def address(self) -> Address:
        """Where it takes messages."""
        return self._lines.address

    def alive(self) -> bool:
        """Whether the process answers."""
        return True

    def forget(self, image: int) -> None:
        """The image is answered, or given up: whoever waits for a message of it stops."""
        self._mail.close(image)
        self.worker.forget(image)

    def run(
        self,
        plan: int,
        image: int,
        exit: int,
        phases: tuple[int, int],
        rows: Array | None,
        whole: Array | None,
    ) -> tuple[float, Array | None]:
        """Do all until an exit: its phases (from, to), and on the leading device its final.

        `rows`: of the image, `whole`: the image for a final, where they are needed. Returns the
        seconds of the work, and the logits or None.
        """
        program, seconds, logits = self.worker.programs[plan], 0.0, None
        pixels = [each for each in (rows, whole) if each is not None]
        at = self._arrival({str(n): each for n, each in enumerate(pixels)}) if pixels else 0.0
        time.sleep(max(0.0, at - time.perf_counter()))
        for number in range(*phases):
            phase = program.phases[number]
            contents = self._contents(image, phase, program.device, rows)
            with self._working() as work:
                messages, work.seconds = self.worker.phase(plan, image, number, contents)
            seconds += work.seconds
            targets = [m.target for m in phase.messages if m.target != program.device]
            for target, content in zip(targets, messages, strict=True):
                key, peer = (number, program.device, target), self._peers[plan][target]
                if peer == self._lines.address:
                    self._mail.put(image, key, content)
                else:
                    self._lines.send(peer, image, key, content)
        if program.finals:
            final, count = program.finals[exit], len(self._peers[plan]) - 1
            contents = self._contents(image, final, count, whole)
            with self._working() as work:
                logits, work.seconds = self.worker.final(plan, image, exit, contents)
            seconds += work.seconds
        return seconds, logits

    def emulate(self, factor: float, rate: float = 0.0, latency: float = 0.0) -> None:
        """Be a slower device from now on, to try one: phases last `factor` times the processor's
        time, messages arrive after `latency` seconds at `rate` bytes a second (0: at once).

        Devices that one machine plays compute in turn, so that none slows another one down.
        """
        self.factor, self.rate, self.latency = factor, rate, latency
        self.worker.clock = time.thread_time if factor else time.perf_counter
        if self._turn is None:
            self._turn = (Path(tempfile.gettempdir()) / "edgeke-emulated").open("w")

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

    def pass_on(self, size: int, content: Array | None) -> Array:
        """Take an array, and return one of so many bytes."""
        if content is not None:
            time.sleep(max(0.0, self._arrival({"": content}) - time.perf_counter()))
        return np.zeros(size, np.uint8)

    def volley(self, peer: Address, size: int, times: int, first: bool) -> float:
        """Send an array to and fro with a peer that does the same; seconds of one way.

        Each waits a little before it sends, as if it had worked: a process that slept is slower.
        """
        content, started = {"": np.zeros(size, np.uint8)}, time.perf_counter()
        for number in range(times):
            if not first:
                self._mail.take(_VOLLEY, (number, 0, 0))
            time.sleep(_PAUSE)
            self._lines.send(peer, _VOLLEY, (number, int(not first), 0), content)
            if first:
                self._mail.take(_VOLLEY, (number, 1, 0))
        return (time.perf_counter() - started) / (2 * times) - _PAUSE

    def _deliver(self, image: int, key: Key, content: Content) -> None:
        """A message from another device."""
        self._mail.put(image, key, content, self._arrival(content))

    def _contents(self, image: int, phase: Phase, target: int, pixels: Array | None) -> Any:
        """The messages that a phase receives."""
        return [
            {"image": pixels} if source == ORIGIN else self._mail.take(image, (n, source, target))
            for n, source in phase.receives
        ]

    def _arrival(self, content: Content) -> float:
        """When something that was sent now is here, over an emulated link or at once."""
        now = time.perf_counter()
        if not self.rate:
            return now
        size = sum(array.nbytes for array in content.values())
        self._link_is_free = max(self._link_is_free, now) + size / self.rate
        return self._link_is_free + self.latency

    @contextlib.contextmanager
    def _working(self) -> Iterator[SimpleNamespace]:
        """Work whose `seconds` are set inside; an emulated device takes longer by its factor."""
        work, started = SimpleNamespace(seconds=0.0), time.perf_counter()
        if not self.factor:
            yield work
            return
        fcntl.flock(self._turn, fcntl.LOCK_EX)
        try:
            yield work
        finally:
            fcntl.flock(self._turn, fcntl.LOCK_UN)
        work.seconds *= self.factor
        time.sleep(max(0.0, started + work.seconds - time.perf_counter()))


def by_mail(method: Any) -> Any:
    """A method of an actor, done beside what the actor is doing."""
    return method.options(concurrency_group=MAIL)


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


@functools.cache
def _key() -> bytes:
    """What the devices of this leader show each other."""
    return secrets.token_bytes(32)


def start_actor(name: str, threads: int) -> Any:
    """Start the process of a device; it is there when it answers."""
    ray = load_ray()
    options = {"num_cpus": 0, "resources": {f"{PREFIX}{name}": 1}, "max_restarts": 0}
    options["concurrency_groups"] = {MAIL: 1}
    return ray.remote(**options)(DeviceActor).remote(threads, _key())


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

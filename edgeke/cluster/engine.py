"""Answers images on a cluster: who computes what now, and what happens when a device is lost.

An image that a device was lost with is computed again by the fastest device alone, which has the
whole network ready where its memory allows; meanwhile the others are planned anew.
"""

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.cluster.actors import (
    by_mail,
    check_versions,
    device_names,
    load_ray,
    start_actor,
    start_actors,
)
from edgeke.cluster.network import Network
from edgeke.cluster.plan import Plan, Profile, expected_work, make_plan, single_plan
from edgeke.cluster.strips import build
from edgeke.cluster.worker import ORIGIN, Phase, Programs
from edgeke.device.policy import Policy
from edgeke.device.scores import Score
from edgeke.device.segments import Segments
from edgeke.errors import InputError

_LOG = logging.getLogger("edgeke.cluster")

# An answer that takes so many times what was expected, and so long, is a reason to look who lives.
_LATE, _LATE_SECONDS = 10.0, 2.0
_ALIVE_SECONDS = 5.0
_GIVE_UP_SECONDS = 120.0
# How long an image waits for a device when none is left.
_NOBODY_SECONDS = 30.0
_LOOK_SECONDS = 0.5
# A device whose work takes so many times what it is known for, in the median of so many images.
_SLOWER, _IMAGES = 1.7, 5
# Images whose features stay on the devices, for the next exit.
_KEPT = 256


@dataclass(eq=False)
class _Active:
    """A plan that devices have loaded. `work` `[D]`: seconds that each is expected to compute."""

    number: int
    plan: Plan
    programs: Programs
    actors: list[Any]
    work: NDArray[np.float64]
    images: list[NDArray[np.float64]] = field(default_factory=list)


@dataclass(eq=False)
class _Image:
    """An image in work: the phases that were asked for, and the logits of the exits it passed."""

    pixels: NDArray[np.uint8]
    number: int
    active: _Active
    seconds: list[tuple[int, Any]] = field(default_factory=list)
    phases: int = 0
    logits: list[NDArray[np.float32]] = field(default_factory=list)


class Engine:
    """A network on the devices of a cluster. Threads may share it; in `with`, it ends them."""

    def __init__(
        self,
        network: Network,
        profile: Profile,
        *,
        plan: Plan | None = None,
        threads: int = 1,
        replans: bool = True,
    ) -> None:
        """Start a process on every device of the profile that is in the cluster, and plan.

        Without `replans` a device that is slower or faster than its profile changes nothing: a
        plan can be measured. Errors: InputError when none is there, or versions differ.
        """
        self.network, self.profile, self.threads = network, profile, threads
        self._replans = replans
        present = set(device_names())
        names = [device.name for device in profile.devices if device.name in present]
        missing = [device.name for device in profile.devices if device.name not in present]
        for name in missing:
            _LOG.warning("%s is not in the cluster; it is used when it joins", name)
        if not names:
            raise InputError(
                f"none of {', '.join(missing)} is in the cluster; join them: ray start "
                "--address=HOST:6379 --resources='{\"edgeke:NAME\": 1}'"
            )
        self._actors: dict[str, Any] = start_actors(names, threads)
        self._joining: dict[str, tuple[Any, Any]] = {}
        self._factors = dict.fromkeys(names, 1.0)
        self._plans, self._images = itertools.count(), itertools.count()
        self._lock = threading.RLock()  # who is there, and which plan is active
        self._order = threading.Lock()
        self._wake, self._closed = threading.Event(), False
        self._stale = False
        usable = plan is not None and not missing and set(plan.devices) <= set(names)
        self._standby: dict[str, _Active] = {}
        self._active = self._load(plan if usable and plan else self._planned())
        self._prepare_standby()
        self._kept: OrderedDict[int, _Image] = OrderedDict()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the devices' processes."""
        if self._closed:
            return
        self._closed = True
        self._wake.set()
        self._watcher.join(30)
        ray = load_ray()
        for actor in [*self._actors.values(), *(actor for actor, _ in self._joining.values())]:
            ray.kill(actor)

    @property
    def plan(self) -> Plan:
        """The plan that new images follow."""
        return self._active.plan

    @property
    def actors(self) -> dict[str, Any]:
        """The devices' processes, by name."""
        return dict(self._actors)

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that are there."""
        return tuple(self._actors)

    def logits(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Every exit's logits `[E, K]` for an image uint8 `[H, W, C]`."""
        (token,) = self.begin(pixels[None])
        every = [self.exit_logits(int(token), e) for e in range(len(self.network.exits))]
        self.forget(int(token))
        return np.stack(every)

    def begin(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Numbers of images uint8 `[N, H, W, C]`, to ask for exits with."""
        tokens = []
        for pixels in images:
            with self._lock:
                image = _Image(pixels[None], next(self._images), self._active)
                self._kept[image.number] = image
                while len(self._kept) > _KEPT:
                    self.forget(next(iter(self._kept)))
            tokens.append(image.number)
        return np.array(tokens, np.int64)

    def exit_logits(self, token: int, exit: int) -> NDArray[np.float32]:
        """An exit's logits `[K]`. Errors: InputError when no device is left."""
        image = self._kept[token]
        if exit < len(image.logits):
            return image.logits[exit]
        ray = load_ray()
        lost = (ray.exceptions.RayError, TimeoutError)
        last = 2 * len(self.profile.devices) + 2
        for attempt in range(last + 1):
            try:
                if attempt:
                    self._after_loss(image)
                while len(image.logits) <= exit:
                    image.logits.append(self._next_exit(image))
                if len(image.logits) == len(self.network.exits):
                    self._learn(image)
                return image.logits[exit]
            except lost as error:
                _LOG.warning("image %d: %s", token, " ".join(str(error).split())[:200])
                if attempt == last:
                    raise
        raise AssertionError("unreachable")

    def forget(self, token: int) -> None:
        """No further exit of an image is asked for."""
        image = self._kept.pop(token, None)
        if image is not None:
            _give_up(image)

    def _next_exit(self, image: _Image) -> NDArray[np.float32]:
        """One call per device does all until the next exit; devices send each other the rest."""
        ray, active, exit = load_ray(), image.active, len(image.logits)
        programs, leader = active.programs.programs, active.programs.leader
        phases = (image.phases, max(image.phases, active.programs.ends[exit]))
        calls = []
        # All devices get images in the same order: else each could wait for what the other one
        # does only after it.
        with self._order:
            for device, (actor, program) in enumerate(zip(active.actors, programs, strict=True)):
                reads = _reads_image(program.phases[slice(*phases)])
                low, high = active.programs.image_rows[device]
                rows = image.pixels[:, low:high] if reads else None
                whole = image.pixels if _reads_image(program.finals[exit : exit + 1]) else None
                call = actor.run.options(num_returns=2)
                calls.append(call.remote(active.number, image.number, exit, phases, rows, whole))
        image.phases = phases[1]
        image.seconds += [(device, seconds) for device, (seconds, _) in enumerate(calls)]
        waiting = [seconds for seconds, _ in calls]
        limit = max(_LATE_SECONDS, _LATE * active.plan.seconds[exit])
        while calls[leader][0] in waiting:
            ready, waiting = ray.wait(waiting, timeout=limit)
            if not ready:
                if self._dead(list(active.plan.devices)) or limit > _GIVE_UP_SECONDS:
                    raise TimeoutError(f"no answer within {limit:.0f} s")
                limit *= 10
            ray.get(ready)  # raises what happened to a device
        logits: NDArray[np.float32] = ray.get(calls[leader][1])
        return logits

    def _learn(self, image: _Image) -> None:
        """See how long each device worked, and plan anew when one is not what it was."""
        ray, active = load_ray(), image.active
        took = np.zeros(len(active.actors))
        for device, seconds in image.seconds:
            took[device] += ray.get(seconds)
        image.seconds = []
        with self._lock:
            if active is not self._active or not self._replans:
                return
            active.images.append(took)
            if len(active.images) < _IMAGES:
                return
            ratios = np.median(active.images, axis=0) / active.work
            active.images = []
            changed = False
            for name, ratio in zip(active.plan.devices, ratios, strict=True):
                if not 1 / _SLOWER < ratio < _SLOWER:
                    self._factors[name] *= float(ratio)
                    changed = True
                    _LOG.warning("%s takes %.1f times what was expected", name, ratio)
            if changed:
                self._stale = True
                self._wake.set()

    def _dead(self, names: Sequence[str]) -> list[str]:
        """Which of these devices do not answer."""
        ray = load_ray()
        asked = {n: by_mail(self._actors[n].alive).remote() for n in names if n in self._actors}
        if not asked:
            return list(names)
        ready, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ALIVE_SECONDS)
        dead = [name for name in names if name not in asked]
        for name, ref in asked.items():
            try:
                if ref not in ready:
                    raise TimeoutError
                ray.get(ref)
            except (ray.exceptions.RayError, TimeoutError):
                dead.append(name)
        return dead

    def _after_loss(self, image: _Image) -> None:
        """Remove the devices that are gone, and begin the image anew with those that are left."""
        _give_up(image)
        dead = self._dead(list(image.active.plan.devices))
        with self._lock:
            for name in dead:
                self._remove(name)
        deadline = time.monotonic() + _NOBODY_SECONDS
        while not self._actors:
            if time.monotonic() > deadline:
                raise InputError("no device of the cluster is left; join one again: ray start")
            time.sleep(0.05)
        with self._lock:
            if not self._is_whole(self._active):
                self._stale = True
                self._active = self._fallback()
                self._wake.set()
            image.active, image.phases = self._active, 0
            image.number = next(self._images)
            image.seconds, image.logits = [], []

    def _remove(self, name: str) -> None:
        """A device is gone, or does not answer: its process ends, so that it can join again."""
        actor = self._actors.pop(name, None)
        self._standby.pop(name, None)
        if actor is not None:
            _LOG.warning("%s is gone", name)
            self._stale = True
            load_ray().kill(actor)

    def _is_whole(self, active: _Active) -> bool:
        """Whether all of a plan's processes are there: one that joined again is another."""
        pairs = zip(active.plan.devices, active.actors, strict=True)
        return all(self._actors.get(name) is actor for name, actor in pairs)

    def _fallback(self) -> _Active:
        """One device alone: one that is ready for it, or the fastest."""
        ready = [active for active in self._standby.values() if self._is_whole(active)]
        if ready:
            return min(ready, key=lambda active: active.plan.seconds[-1])
        singles = self._singles()
        return self._load(min(singles, key=lambda plan: plan.seconds[-1]))

    def _singles(self) -> list[Plan]:
        profile = self._current()
        return [single_plan(self.network, profile, d) for d in range(len(profile.devices))]

    def _current(self) -> Profile:
        """The profile of the devices that are there, as fast as they are now."""
        gone = [d.name for d in self.profile.devices if d.name not in self._actors]
        profile = self.profile.without(gone)
        devices = tuple(d.slower(self._factors[d.name]) for d in profile.devices)
        return Profile(profile.model, profile.precision, devices, profile.links)

    def _planned(self) -> Plan:
        return make_plan(self.network, self._current())

    def _load(self, plan: Plan) -> _Active:
        """Make devices ready for a plan; those that have its graphs already get none."""
        ray, programs = load_ray(), build(self.network, plan.layout)
        actors = [self._actors[name] for name in plan.devices if name in self._actors]
        if len(actors) < len(plan.devices):
            raise TimeoutError("a device left while it was planned")
        number = next(self._plans)
        peers = ray.get([actor.address.remote() for actor in actors])
        peers.append(peers[programs.leader])
        known = ray.get([actor.graphs.remote() for actor in actors])
        done = []
        for device, actor in enumerate(actors):
            keys = programs.keys(device) - known[device]
            graphs = {key: programs.graphs[key] for key in keys}
            done.append(actor.load.remote(number, programs.programs[device], graphs, peers))
        ray.get(done)
        work = expected_work(self.network, self._current(), plan)
        programs.graphs = {}  # devices have them
        return _Active(number, plan, programs, actors, work)

    def _prepare_standby(self) -> None:
        """Have the whole network ready on the two fastest devices whose memory allows it."""
        plan = self._active.plan
        used = dict(zip(plan.devices, plan.memory, strict=True))
        room = {device.name: device.memory for device in self.profile.devices}
        for single in sorted(self._singles(), key=lambda each: each.seconds[-1]):
            (name,) = single.devices
            fits = used.get(name, 0) + single.memory[0] <= room[name]
            if len(self._standby) < 2 and name not in self._standby and fits:
                active = self._load(single)
                with self._lock:
                    self._standby[name] = active

    def _watch(self) -> None:
        """Plan anew when something changed, and take in devices that join."""
        ray = load_ray()
        while not self._closed:
            self._wake.wait(_LOOK_SECONDS)
            self._wake.clear()
            if self._closed:
                return
            try:
                self._welcome()
                if self._stale and self._actors:
                    self._plan_anew()
            except (ray.exceptions.RayError, TimeoutError, InputError) as error:
                _LOG.warning("planning: %s", " ".join(str(error).split())[:200])
                self._stale = True
                dead = self._dead(list(self._actors))
                with self._lock:
                    for name in dead:
                        self._remove(name)
                time.sleep(_LOOK_SECONDS)

    def _welcome(self) -> None:
        """Start processes on devices that joined; take in those that have answered."""
        ray = load_ray()
        present = set(device_names())
        for device in self.profile.devices:
            name = device.name
            if name in present and name not in self._actors and name not in self._joining:
                actor = start_actor(name, self.threads)
                self._joining[name] = (actor, actor.describe.remote())
        for name, (actor, ref) in list(self._joining.items()):
            ready, _ = ray.wait([ref], timeout=0)
            if not ready:
                continue
            del self._joining[name]
            try:
                check_versions(name, ray.get(ref)["versions"])
            except (ray.exceptions.RayError, InputError) as error:
                _LOG.warning("%s cannot join: %s", name, " ".join(str(error).split())[:200])
                continue
            with self._lock:
                self._actors[name], self._factors[name] = actor, 1.0
                self._stale = True
            _LOG.warning("%s is back", name)

    def _plan_anew(self) -> None:
        self._stale = False
        active = self._load(self._planned())
        with self._lock:
            old, standby = self._active, list(self._standby.values())
            if not self._is_whole(active):
                self._stale = True
                return
            self._active = active
        self._prepare_standby()
        if old not in standby:
            self._retire(old)
        _LOG.warning("planned anew: %s", describe(active.plan))

    def _retire(self, old: _Active) -> None:
        """Free what an old plan takes, when no image follows it any more."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with self._lock:
                if all(image.active is not old for image in self._kept.values()):
                    break
            time.sleep(0.05)
        for actor in old.actors:
            actor.unload.remote(old.number)


def _reads_image(phases: Sequence[Phase]) -> bool:
    """Whether pixels must be sent for these."""
    return any(source == ORIGIN for phase in phases for _, source in phase.receives)


def _give_up(image: _Image) -> None:
    """Devices forget an image, also those that wait for a message of it."""
    for actor in image.active.actors:
        by_mail(actor.forget).remote(image.number)


def describe(plan: Plan) -> str:
    """A plan in one line."""
    if len(plan.devices) == 1:
        return f"{plan.devices[0]} alone, {plan.seconds[-1] * 1e3:.1f} ms"
    rows = ", ".join(
        f"{name} {height}" for name, height in zip(plan.devices, plan.layout.heights, strict=True)
    )
    return (
        f"rows {rows}; {len(plan.layout.exchanged) + 1} groups; "
        f"{plan.devices[plan.layout.leader]} leads; {plan.seconds[-1] * 1e3:.1f} ms"
    )


class ClusterSegments(Segments):
    """The cascade over a cluster: features stay on the devices, images are known by numbers."""

    def __init__(self, engine: Engine, policy: Policy) -> None:
        self._engine = engine
        self._temperatures = np.asarray(policy.temperatures, np.float32)[:, None]
        self.score = Score(policy.score, policy.score_weights)

    def logits(self, exit: int, features: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """As of `Segments`; features are the images' numbers, which the last exit forgets."""
        tokens = self._engine.begin(features) if exit == 0 else features
        logits = [self._engine.exit_logits(int(token), exit) for token in tokens]
        if exit == len(self._temperatures) - 1:
            for token in tokens:
                self._engine.forget(int(token))
            tokens = tokens[:0]
        return np.stack(logits), tokens

    def features_shape(self, exit: int) -> tuple[int, int, int]:
        """Features do not leave the devices. Errors: InputError, always."""
        raise InputError(
            f"a cluster takes no features after exit {exit}; ask a server of the whole bundle"
        )

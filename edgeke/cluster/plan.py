"""The plan: group boundaries and heights that minimise the time to the answer, and what to expect.

One group's time is that of its slowest device: rows from its neighbours, then its own work, rows
that are computed twice included. Heights are tried in all ways at the map that is gathered; for
each of them dynamic programming finds the best boundaries.
"""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.cluster.network import Network, Step, sources
from edgeke.cluster.strips import Layout, alone
from edgeke.errors import InputError
from edgeke.files import write_text

FILE = "cluster.json"
SCHEMA = 1
# A map of fewer rows is not shared.
LEAST_ROWS = 4
# Most ways of sharing the rows that are tried; where there are more, rows go in steps.
_MOST_WAYS = 4000
# What ONNX Runtime and NumPy take, and how often weights are held: in the file, and packed.
_RUNTIME_BYTES, _WEIGHT_COPIES = 60e6, 2.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Device:
    """A device: its name in the cluster, bytes of memory it may use, and what groups cost there.

    Seconds of group g with r rows after it: `fixed[g] + r * per_row[g]`. `whole`: of the whole
    network alone, `tail` of what comes after the last group; `heads` `[E]` of an exit's head.
    `rounds`: how often it was measured.
    """

    name: str
    memory: int
    fixed: tuple[float, ...]
    per_row: tuple[float, ...]
    whole: float
    tail: float
    heads: tuple[float, ...]
    rounds: int

    def slower(self, factor: float) -> "Device":
        """The same device when everything takes `factor` times as long."""
        return replace(
            self,
            fixed=tuple(factor * each for each in self.fixed),
            per_row=tuple(factor * each for each in self.per_row),
            whole=factor * self.whole,
            tail=factor * self.tail,
            heads=tuple(factor * each for each in self.heads),
        )


@dataclass(frozen=True)
class Link:
    """Seconds until bytes are at another device and it begins: `latency + bytes / rate`."""

    latency: float
    rate: float

    def seconds(self, size: float) -> float:
        """Of so many bytes."""
        return self.latency + size / self.rate


@dataclass(frozen=True)
class Profile:
    """Devices and links as measured. `links` `[D + 1, D + 1]`: the last is where images are from.

    `model`: the hash of the segments; `precision`: which of them.
    """

    model: str
    precision: str
    devices: tuple[Device, ...]
    links: tuple[tuple[Link, ...], ...]

    def without(self, names: Sequence[str]) -> "Profile":
        """The profile of the other devices."""
        kept = [d for d, device in enumerate(self.devices) if device.name not in names]
        places = [*kept, len(self.devices)]
        links = tuple(tuple(self.links[a][b] for b in places) for a in places)
        return replace(self, devices=tuple(self.devices[d] for d in kept), links=links)


@dataclass(frozen=True)
class Plan:
    """Who does what. `devices` `[D]`: names, top to bottom; one alone has no groups.

    `seconds` `[E]`: expected until each exit has answered. `memory` `[D]`: bytes expected.
    `alone`: for each device of the profile, seconds if it worked alone.
    """

    devices: tuple[str, ...]
    layout: Layout
    seconds: tuple[float, ...]
    memory: tuple[int, ...]
    alone: dict[str, float]


def group_steps(network: Network) -> list[list[Step]]:
    """The trunk's steps between consecutive cuts, and last those after the last cut."""
    groups: list[list[Step]] = [[] for _ in network.cuts]
    place, after = 0, set(network.cuts[1:])
    for step, mark in zip(network.steps, network.trunk(), strict=True):
        if mark and step.kind != "constant":
            groups[place].append(step)
        if not after.isdisjoint(step.node.output):
            place += 1
    return groups


def shareable(network: Network) -> int:
    """The index of the deepest cut that may be gathered. Errors: InputError when there is none."""
    deep = [g for g, cut in enumerate(network.cuts) if g and network.height(cut) >= LEAST_ROWS]
    if not deep:
        height = network.height("image")
        raise InputError(
            f"images of {height} rows are too small to share: no map has {LEAST_ROWS} rows; serve "
            "this network on one device"
        )
    return deep[-1]


@dataclass
class _Geometry:
    """What the network says about groups: rows computed twice, bytes, syncs.

    `extra[j][i]` (up, down): rows beyond its own that a device needs of cut i where the next
    exchange is at cut j. `syncs` `[G]`: exchanges of pooled values inside each group.
    """

    network: Network
    extra: list[list[tuple[int, int]]]
    syncs: list[int]
    attach: list[int]
    weights: list[int]
    activations: list[float]  # bytes per row of the image

    @classmethod
    def of(cls, network: Network) -> "_Geometry":
        groups = group_steps(network)
        cuts = network.cuts
        extra = [_extra(network, groups, j) for j in range(len(cuts))]
        syncs = [_syncs(network, steps) for steps in groups]
        segments = [max((s.segment for s in steps), default=0) for steps in groups[:-1]]
        exits = range(len(network.exits))
        attach = [sum(segment <= exit for segment in segments) for exit in exits]
        weights = [_weights(network, steps) for steps in groups]
        sizes = [max((_bytes(network, s) for s in steps), default=0) for steps in groups]
        height = network.height("image")
        return cls(network, extra, syncs, attach, weights, [size / height for size in sizes])


def _extra(network: Network, groups: Sequence[Sequence[Step]], j: int) -> list[tuple[int, int]]:
    cuts, far = network.cuts, 10**6
    step_rows = max(network.stride[cut] for cut in cuts)

    def own(name: str) -> tuple[int, int]:
        ratio = step_rows // network.stride[name]
        return far * ratio, 2 * far * ratio

    want = {cuts[j]: own(cuts[j])}
    for step in reversed([step for steps in groups[:j] for step in steps]):
        if step.pooled:
            rows = [own(step.source)]
        else:
            rows = [want[name] for name in step.node.output if name in want]
        if step.kind == "rows" or step.pooled:
            for name in sources(step) if rows else ():
                if network.kinds[name] != "rows":
                    continue
                low, high = rows[0]
                if step.window is not None:
                    low, high = step.window.rows(low, high)
                before = want.get(name, (low, high))
                want[name] = (min(before[0], low), max(before[1], high))
    found = []
    for cut in cuts[: j + 1]:
        low, high = want.get(cut, own(cut))
        found.append((max(0, own(cut)[0] - low), max(0, high - own(cut)[1])))
    return found


def _syncs(network: Network, steps: Sequence[Step]) -> int:
    """How often devices of a group wait for pooled values of all, or for an exit's decision."""
    pools = sum(bool(step.pooled) for step in steps)
    return pools + len({step.segment for step in steps}) - 1 if steps else 0


def _weights(network: Network, steps: Sequence[Step]) -> int:
    names = {name for step in steps for name in step.node.input if name in network.constants}
    todo = [n for s in steps for n in s.node.input if network.kinds.get(n) == "constant"]
    for name in todo:
        step = network.producer(name)
        names |= set() if step is None else {n for n in step.node.input if n in network.constants}
    return sum(network.constants[name].ByteSize() for name in names)


def _bytes(network: Network, step: Step) -> int:
    """Bytes of what a step reads and writes."""
    names = [n for n in (*sources(step), *step.node.output) if network.kinds.get(n) == "rows"]
    return sum(network.row_bytes(name) * network.height(name) for name in names)


def make_plan(network: Network, profile: Profile) -> Plan:
    """The fastest plan that fits into every device's memory, one device alone among them.

    Errors: InputError when nothing fits.
    """
    if not profile.devices:
        raise InputError(
            "there is no device in the cluster; join one: ray start --address=HOST:6379 "
            "--resources='{\"edgeke:NAME\": 1}'"
        )
    shape = _Geometry.of(network)
    singles = [_single(shape, profile, d) for d in range(len(profile.devices))]
    times = {profile.devices[d].name: plan.seconds[-1] for d, plan in enumerate(singles)}
    fitting = [
        plan
        for plan, device in zip(singles, profile.devices, strict=True)
        if plan.memory[0] <= device.memory
    ]
    for size in range(2, len(profile.devices) + 1):
        for devices in itertools.combinations(range(len(profile.devices)), size):
            plan = _best(shape, profile, devices)
            if plan is not None:
                fitting.append(plan)
    if not fitting:
        least = min(singles, key=lambda plan: plan.memory)
        raise InputError(
            f"no device has room: the network alone takes {least.memory[0] / 1e6:.0f} MB, and "
            + ", ".join(f"{d.name} has {d.memory / 1e6:.0f}" for d in profile.devices)
            + "; raise `memory` in cluster.json, use int8, or a smaller network"
        )
    best = min(fitting, key=lambda plan: plan.seconds[-1])
    return replace(best, alone=times)


def single_plan(network: Network, profile: Profile, d: int) -> Plan:
    """Device number `d` of the profile alone."""
    return _single(_Geometry.of(network), profile, d)


def expected_work(network: Network, profile: Profile, plan: Plan) -> Floats:
    """Seconds that each device of a plan computes for one image, `[D]`: transfers left out."""
    shape, last = _Geometry.of(network), len(network.exits) - 1
    devices = [next(d for d in profile.devices if d.name == name) for name in plan.devices]
    end = network.cuts.index(plan.layout.gathered)
    work = np.zeros(len(devices))
    ways = np.array([plan.layout.heights])
    stride = plan.layout.step or network.stride[plan.layout.gathered]
    ends = [network.cuts.index(cut) for cut in (*plan.layout.exchanged, plan.layout.gathered)]
    start = 0
    for stop in ends if end else ():
        for g in range(start, stop):
            rows = _computed_rows(shape, _own(network, ways, stride, network.cuts[g + 1]), stop, g)
            for place, device in enumerate(devices):
                work[place] += device.fixed[g] + device.per_row[g] * rows[0, place]
        start = stop
    work[plan.layout.leader] += _rest(shape, devices[plan.layout.leader], end, last)
    return work


def _computed_rows(shape: _Geometry, own: NDArray[Any], j: int, i: int) -> NDArray[Any]:
    """Rows after group i that each device computes where the next exchange is at cut j."""
    (up, down), count = shape.extra[j][i + 1], own.shape[1]
    twice = np.array([up * (d > 0) + down * (d < count - 1) for d in range(count)])
    rows: NDArray[Any] = np.minimum(own + twice, shape.network.height(shape.network.cuts[i + 1]))
    return rows


def _rest(shape: _Geometry, device: Device, start: int, exit: int) -> float:
    """Seconds of the work from a cut until an exit's logits, for one device."""
    network = shape.network
    groups = np.array(
        [
            f + p * network.height(cut)
            for f, p, cut in zip(device.fixed, device.per_row, network.cuts[1:], strict=False)
        ]
    )
    every = float(groups.sum()) + device.tail
    until = shape.attach[exit]
    part = float(groups[start : min(until, len(groups))].sum())
    if exit == len(network.exits) - 1:
        part += device.tail
    return part * device.whole / every + (device.heads[exit] if start >= until else 0.0)


def _single(shape: _Geometry, profile: Profile, d: int) -> Plan:
    device, network = profile.devices[d], shape.network
    to = profile.links[-1][d].seconds(network.row_bytes("image") * network.height("image"))
    back = profile.links[d][-1].latency
    again = profile.links[-1][d].latency
    seconds, total = [], to
    done = 0.0
    for exit in range(len(network.exits)):
        until = _rest(shape, device, 0, exit)
        total += max(until - done, 0.0) + back + (again if exit else 0.0)
        done = until
        seconds.append(total)
    memory = _memory(shape, 0, 1.0, rest=True, shares=False)
    return Plan((device.name,), alone(network), tuple(seconds), (memory,), {})


def _memory(shape: _Geometry, gathered: int, share: float, rest: bool, shares: bool) -> int:
    """Bytes that a device takes with `share` of the rows; `rest`: it also leads."""
    size = _RUNTIME_BYTES
    height = shape.network.height("image")
    peak = 0.0
    if shares:
        size += _WEIGHT_COPIES * sum(shape.weights[:gathered])
        peak = max(shape.activations[:gathered], default=0.0) * height * share
    if rest:
        size += _WEIGHT_COPIES * sum(shape.weights[gathered:])
        peak = max(peak, max(shape.activations[gathered:]) * height)
    return int(size + 2 * peak)


def _best(shape: _Geometry, profile: Profile, devices: Sequence[int]) -> Plan | None:
    """The fastest plan for exactly these devices; None where they are more than there are rows."""
    network, best = shape.network, None
    deepest = shareable(network)
    for end in range(1, deepest + 1):
        coarse = network.stride[network.cuts[end]]
        if end < deepest and network.stride[network.cuts[end + 1]] == coarse:
            continue  # the last one of its size: those before it come with it
        ends = [g for g in range(1, end + 1) if network.stride[network.cuts[g]] == coarse]
        if network.height(network.cuts[end]) < len(devices):
            continue
        step = _step(network, coarse, len(devices))
        ways = np.array(list(_compositions(-(-network.height("image") // step), len(devices))))
        ways = ways[(_own(network, ways, step, network.cuts[end]) > 0).all(axis=1)]
        times, before = _groups(shape, profile, devices, ways, step, end)
        for gathered in ends:
            plan = _gathered(shape, profile, devices, ways, times, before, gathered, step)
            if plan is not None and (best is None or plan.seconds[-1] < best.seconds[-1]):
                best = plan
    return best


def _step(network: Network, coarse: int, count: int) -> int:
    """Image rows of one unit of height: a row of the gathered map, or finer where that is coarse.

    Strips need not end where the coarsest map's rows do; there they end at the next row.
    """
    step, height = coarse, network.height("image")
    while step % 2 == 0 and math.comb(2 * height // step, count - 1) <= _MOST_WAYS:
        step //= 2
    return step


def _compositions(height: int, count: int) -> Iterator[tuple[int, ...]]:
    """All ways to share rows, one at least for each; in steps where there are too many."""
    step = 1
    while math.comb(height // step, count - 1) > _MOST_WAYS and height // (step + 1) >= count:
        step += 1
    places = range(step, height, step)
    for ends in itertools.combinations(places, count - 1):
        bounds = (0, *ends, height)
        yield tuple(b - a for a, b in itertools.pairwise(bounds))


def _own(network: Network, ways: NDArray[Any], stride: int, cut: str) -> NDArray[Any]:
    """The rows of a cut that each device owns, `[ways, D]`."""
    ends = np.cumsum(ways, axis=1) * stride
    bounds = np.minimum(-(-ends // network.stride[cut]), network.height(cut))
    bounds[:, -1] = network.height(cut)
    return np.diff(bounds, axis=1, prepend=0)


def _groups(
    shape: _Geometry,
    profile: Profile,
    devices: Sequence[int],
    ways: NDArray[Any],
    stride: int,
    deepest: int,
) -> tuple[list[Floats], list[NDArray[Any]]]:
    """For each cut the least seconds until all devices have it, `[ways]`, and the exchange before.

    Cuts come after the image, which each device gets from where images are from.
    """
    network, count = shape.network, len(devices)
    own = [_own(network, ways, stride, cut) for cut in network.cuts[: deepest + 1]]
    fixed = np.array([profile.devices[d].fixed for d in devices])
    per_row = np.array([profile.devices[d].per_row for d in devices])
    waits = max(profile.links[a][b].latency for a in devices for b in devices if a != b)
    best: list[Floats] = [np.zeros(len(ways))]
    before: list[NDArray[Any]] = [np.zeros(len(ways), np.int64)]
    for j in range(1, deepest + 1):
        work = np.zeros((len(ways), count))
        options = []
        for i in range(j - 1, -1, -1):
            rows = _computed_rows(shape, own[i + 1], j, i)
            work = work + fixed[:, i] + per_row[:, i] * rows
            arrives = _arrivals(shape, profile, devices, own[i], i, j)
            syncs = sum(shape.syncs[i:j]) * waits
            options.append(best[i] + (work + arrives).max(axis=1) + syncs)
        every = np.stack(options)
        choice = every.argmin(axis=0)
        best.append(every[choice, np.arange(len(ways))])
        before.append(j - 1 - choice)
    return best, before


def _arrivals(
    shape: _Geometry, profile: Profile, devices: Sequence[int], own: NDArray[Any], i: int, j: int
) -> Floats:
    """Seconds until each device has the rows of others that a group needs, `[ways, D]`."""
    network, (up, down) = shape.network, shape.extra[j][i]
    size, links = network.row_bytes(network.cuts[i]), profile.links
    arrives = np.zeros(own.shape)
    for place, d in enumerate(devices):
        if i == 0:
            link = links[-1][d]
            rows = own[:, place] + up + down
            arrives[:, place] = link.latency + rows * size / link.rate
            continue
        arrives[:, place] = links[d][d].latency
        for other, halo in ((place - 1, up), (place + 1, down)):
            if 0 <= other < len(devices) and halo:
                link = links[devices[other]][d]
                arrives[:, place] = np.maximum(arrives[:, place], link.seconds(halo * size))
    return arrives


def _gathered(
    shape: _Geometry,
    profile: Profile,
    devices: Sequence[int],
    ways: NDArray[Any],
    times: Sequence[Floats],
    before: Sequence[NDArray[Any]],
    end: int,
    step: int,
) -> Plan | None:
    """The best plan that gathers at cut `end`; None where none fits into memory."""
    network, cut = shape.network, shape.network.cuts[end]
    size, total = network.row_bytes(cut), ways.sum(axis=1, keepdims=True)
    own = _own(network, ways, step, cut)
    limits = [profile.devices[d].memory for d in devices]
    best: tuple[float, int, int] | None = None
    for leader, d in enumerate(devices):
        fits = np.ones(len(ways), bool)
        for place in range(len(devices)):
            for number in np.unique(ways[:, place]):
                share = float(number / total[0, 0])
                memory = _memory(shape, end, share, rest=place == leader, shares=True)
                if memory > limits[place]:
                    fits &= ways[:, place] != number
        if not fits.any():
            continue
        arrives = [
            profile.links[other][d].latency + own[:, place] * size / profile.links[other][d].rate
            for place, other in enumerate(devices)
            if other != d
        ]
        seconds = times[end] + np.max(arrives, axis=0) + _rest_seconds(shape, profile, d, end)
        seconds[~fits] = np.inf
        way = int(seconds.argmin())
        if best is None or seconds[way] < best[0]:
            best = (float(seconds[way]), leader, way)
    if best is None:
        return None
    whole, leader, way = best
    exchanged: list[str] = []
    place = end
    while place > 0:
        place = int(before[place][way])
        if place:
            exchanged.insert(0, network.cuts[place])
    heights = tuple(int(each) for each in ways[way])
    layout = Layout(tuple(exchanged), cut, heights, leader, step)
    seconds = _exit_seconds(shape, profile, devices, times, way, end, leader, whole)
    used = tuple(
        _memory(shape, end, h / sum(heights), rest=k == leader, shares=True)
        for k, h in enumerate(heights)
    )
    names = tuple(profile.devices[d].name for d in devices)
    return Plan(names, layout, seconds, used, {})


def _waiting(profile: Profile, d: int) -> float:
    """Seconds of one decision: pooled values to the leading device, logits, the next calls."""
    return profile.links[d][d].latency + profile.links[d][-1].latency + profile.links[-1][d].latency


def _rest_seconds(shape: _Geometry, profile: Profile, d: int, end: int) -> float:
    """From the gathered map to the last logits, and the decisions on the way there."""
    last = len(shape.network.exits) - 1
    back = profile.links[d][-1].latency
    return _rest(shape, profile.devices[d], end, last) + last * _waiting(profile, d) + back


def _exit_seconds(
    shape: _Geometry,
    profile: Profile,
    devices: Sequence[int],
    times: Sequence[Floats],
    way: int,
    end: int,
    leader: int,
    whole: float,
) -> tuple[float, ...]:
    """Until each exit has answered, `[E]`."""
    d, last = devices[leader], len(shape.network.exits) - 1
    seconds = []
    rest = _rest(shape, profile.devices[d], end, last)
    for exit in range(last):
        until = shape.attach[exit]
        if until <= end:
            head = profile.devices[d].heads[exit]
            value = float(times[until][way]) + head
            value += profile.links[d][d].latency + profile.links[d][-1].latency
        else:
            value = whole - rest + _rest(shape, profile.devices[d], end, exit)
            value -= (last - exit) * _waiting(profile, d)
        seconds.append(value + exit * _waiting(profile, d) if until <= end else value)
    rising = np.maximum.accumulate([*seconds, whole])
    return tuple(float(each) for each in rising + 1e-9 * np.arange(last + 1))


def write_cluster(path: Path, profile: Profile, plan: Plan | None) -> None:
    """Write cluster.json."""
    content = {"schema": SCHEMA, "profile": asdict(profile), "plan": plan and asdict(plan)}
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_cluster(path: Path) -> tuple[Profile, Plan | None]:
    """Read cluster.json. Errors: InputError when it is missing, damaged or of another version."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputError(
            f"{path} is missing; run `python -m edgeke.cluster profile` where the cluster is"
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); profile the cluster again") from error
    try:
        if content["schema"] != SCHEMA:
            raise ValueError(f"schema {content['schema']!r:.20} is not {SCHEMA}")
        rows = content["profile"]
        devices = tuple(Device(**_tuples(row)) for row in rows["devices"])
        links = tuple(tuple(Link(**link) for link in row) for row in rows["links"])
        profile = Profile(rows["model"], rows["precision"], devices, links)
        made = content["plan"]
        if made is None:
            return profile, None
        shared = made.pop("layout")
        layout = Layout(
            tuple(shared["exchanged"]),
            shared["gathered"],
            tuple(shared["heights"]),
            shared["leader"],
            shared["step"],
        )
        return profile, Plan(layout=layout, **_tuples(made))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path} is damaged, or of another version ({error}); profile the cluster again"
        ) from error


def _tuples(row: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}

"""Measures a cluster: every group on every device, every link."""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.cluster.actors import load_ray
from edgeke.cluster.network import Network
from edgeke.cluster.plan import Device, Link, Profile, shareable
from edgeke.cluster.strips import Layout, alone, build, own_rows
from edgeke.cluster.worker import Programs
from edgeke.errors import InputError

# Bytes of the arrays that are sent, and how many in a row.
_SIZES, _HOPS = (1_000, 200_000, 2_000_000), 4
_SHARES = (0.12, 0.25, 0.5)  # of the rows, for the upper of two strips


def measure_cluster(
    network: Network,
    actors: Mapping[str, Any],
    model: str,
    precision: str,
    rounds: int = 5,
    memory: Mapping[str, int] | None = None,
) -> Profile:
    """The profile of these devices. Errors: InputError for a device that leaves meanwhile."""
    ray = load_ray()
    layouts = _layouts(network)
    programs = [build(network, layout) for layout in layouts]
    image = np.random.default_rng(0).integers(0, 256, network.shapes["image"], np.uint8)
    devices = []
    for name, actor in actors.items():
        try:
            room = (memory or {}).get(name) or ray.get(actor.describe.remote())["memory"]
            runs = ray.get(actor.measure.remote(programs, image, rounds))
        except ray.exceptions.RayActorError:
            raise InputError(
                f"{name} left while it was measured; it may lack memory: join it again, or leave it"
                " out"
            ) from None
        devices.append(fit_device(network, name, room, layouts, programs, runs))
    return Profile(model, precision, tuple(devices), _measure_links(list(actors.values())))


def _layouts(network: Network) -> list[Layout]:
    """One device alone, and two with every cut exchanged."""
    deepest = shareable(network)
    cut = network.cuts[deepest]
    height = network.height(cut)
    uppers = sorted({max(1, round(share * height)) for share in _SHARES})
    exchanged = tuple(network.cuts[1:deepest])
    return [alone(network), *(Layout(exchanged, cut, (n, height - n)) for n in uppers)]


def fit_device(
    network: Network,
    name: str,
    memory: int,
    layouts: Sequence[Layout],
    programs: Sequence[Programs],
    runs: Sequence[Sequence[tuple[NDArray[np.float64], list[float]]]],
) -> Device:
    """A device from its runs: for each group a fixed time, and one per row, by least squares."""
    deepest, rows, seconds = shareable(network), [], []
    whole = float(np.median([sum(finals) for _, finals in runs[0]]))
    tails, heads = [], []
    for layout, each, measured in zip(layouts[1:], programs[1:], runs[1:], strict=True):
        phases = np.median([phases for phases, _ in measured], axis=0)
        finals = np.median([finals for _, finals in measured], axis=0)
        groups = _phase_groups(network, each, deepest)
        for device in range(2):
            rows.append(
                [
                    high - low
                    for low, high in (
                        own_rows(network, cut, layout, device)
                        for cut in network.cuts[1 : deepest + 1]
                    )
                ]
            )
            seconds.append(np.bincount(groups, phases[:, device], deepest))
        tails.append(float(finals[-1]))
        heads.append(finals)
    counts, times = np.array(rows, float), np.array(seconds)
    fixed, per_row = [], []
    for group in range(deepest):
        x, y = counts[:, group], times[:, group]
        slope = float(np.polyfit(x, y, 1)[0]) if np.ptp(x) else float(y.mean() / x.mean())
        slope = min(max(slope, 0.0), float(y.mean() / x.mean()))
        per_row.append(slope)
        fixed.append(float(np.mean(y - slope * x)))
    # Groups after the deepest map that is shared are one device's: their rows cost what is left.
    tail = float(np.mean(tails))
    early = tuple(float(each) for each in np.mean(heads, axis=0))
    rounds = len(runs[0])
    return Device(name, int(memory), tuple(fixed), tuple(per_row), whole, tail, early, rounds)


def _phase_groups(network: Network, programs: Programs, deepest: int) -> NDArray[np.int64]:
    """Which group each phase of a plan with all cuts exchanged is part of."""
    cuts = {cut: number for number, cut in enumerate(network.cuts[1 : deepest + 1])}
    group, groups = 0, []
    for phase in programs.programs[0].phases:
        groups.append(min(group, deepest - 1))
        made = [cuts[name] for name in phase.outputs if name in cuts]
        group = max([group, *(number + 1 for number in made)])
    return np.array(groups)


def _measure_links(actors: Sequence[Any]) -> tuple[tuple[Link, ...], ...]:
    """Every link, both ways; the last row and column are this process."""
    count = len(actors)
    links = [[Link(0.0, 1e12)] * (count + 1) for _ in range(count + 1)]
    for a, b in itertools.combinations(range(count), 2):
        links[a][b] = links[b][a] = _link(actors[a], actors[b])
    for d, actor in enumerate(actors):
        links[-1][d], links[d][-1] = _own_links(actor)
    return tuple(tuple(row) for row in links)


def _link(one: Any, other: Any) -> Link:
    """Arrays that go to and fro; the time of one way."""
    ray = load_ray()
    addresses = ray.get([one.address.remote(), other.address.remote()])

    def hop(size: int) -> float:
        ends = [one.volley.remote(addresses[1], size, _HOPS, True)]
        ends.append(other.volley.remote(addresses[0], size, _HOPS, False))
        return float(ray.get(ends)[0])

    return _fit(hop)


def _own_links(actor: Any) -> tuple[Link, Link]:
    """From this process to a device, and back."""
    ray = load_ray()

    def there(size: int) -> float:
        content = np.zeros(size, np.uint8)
        started = time.perf_counter()
        ray.get(actor.pass_on.remote(0, content))
        return time.perf_counter() - started

    def back(size: int) -> float:
        started = time.perf_counter()
        ray.get(actor.pass_on.remote(size, None))
        return time.perf_counter() - started

    to, fro = _fit(there), _fit(back)
    both = min(to.latency, fro.latency)
    return Link(both / 2, to.rate), Link(both / 2, fro.rate)


def _fit(seconds: Any) -> Link:
    """Latency and rate from the median of a few tries each."""
    for size in _SIZES:
        seconds(size)
    times = [float(np.median([seconds(size) for _ in range(5)])) for size in _SIZES]
    small, *_, large = times
    slope = max((large - small) / (_SIZES[-1] - _SIZES[0]), 1e-12)
    return Link(max(small - slope * _SIZES[0], 1e-6), 1 / slope)

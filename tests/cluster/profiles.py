"""Profiles for tests: measured in this process, and then made slower."""

import numpy as np

from edgeke.cluster.network import Network
from edgeke.cluster.plan import Device, Link, Profile
from edgeke.cluster.profile import _layouts, fit_device
from edgeke.cluster.strips import build
from edgeke.cluster.worker import Worker, run_together


def device(network: Network, name: str, factor: float = 1.0, memory: int = 10**10) -> Device:
    """A device as fast as this process, or `factor` times slower."""
    layouts = _layouts(network)
    programs = [build(network, layout) for layout in layouts]
    image = np.zeros(network.shapes["image"], np.uint8)
    runs = []
    for number, each in enumerate(programs):
        workers = [Worker() for _ in each.programs]
        for place, worker in enumerate(workers):
            keys = each.keys(place)
            worker.load(number, each.programs[place], {key: each.graphs[key] for key in keys})
        measured = [run_together(workers, number, each, image)[1:] for _ in range(6)]
        runs.append(measured[1:])
    return fit_device(network, name, memory, layouts, programs, runs).slower(factor)


def even(network: Network, name: str, seconds: float, memory: int = 10**10) -> Device:
    """A device that takes so long for the whole network, by its multiply-accumulates alone."""
    from edgeke.cluster.plan import group_steps, shareable

    macs = [sum(step.macs for step in steps) for steps in group_steps(network)]
    deepest, total = shareable(network), sum(macs)
    per_row = tuple(
        seconds * count / total / network.height(cut)
        for count, cut in zip(macs[:deepest], network.cuts[1:], strict=False)
    )
    tail = seconds * sum(macs[deepest:]) / total
    heads = (1e-6,) * len(network.exits)
    return Device(name, memory, (0.0,) * deepest, per_row, seconds, tail, heads, 1)


def profile(devices: list[Device], latency: float, rate: float) -> Profile:
    """These devices, all links alike."""
    count = len(devices) + 1
    links = tuple(tuple(Link(latency, rate) for _ in range(count)) for _ in range(count))
    return Profile("a model", "fp32", tuple(devices), links)

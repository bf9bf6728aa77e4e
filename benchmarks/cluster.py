"""One image on several devices.  python -m benchmarks.cluster [--networks timm/resnet18 ...]

Four Ray actors on this machine play boards: two take 10, two 15 times the processor's time of each
phase (1 : 1.5, as a Pi 4B and a Pi 3B+), and messages arrive after 0.5 ms at the link's rate. Both
are emulated by sleeping, so the actors do not compete for cores. Every device, also the fastest one
alone, gets the image over its link. Measured: the plan, the same groups with equal strips, the
fastest device alone. By arithmetic: everything back to the leader at every pooling (MoDNN, EdgeLD),
and the bound: work divided by the sum of speeds. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from edgeke.cluster.actors import connect, load_ray, start_actors
from edgeke.cluster.engine import Engine
from edgeke.cluster.network import Network, join
from edgeke.cluster.plan import Plan, Profile, expected_work, make_plan, single_plan
from edgeke.cluster.profile import measure_cluster
from edgeke.device.manifest import Manifest
from edgeke.graph.quantise import quantise
from edgeke.graph.runner import segment_logits
from edgeke.graph.segments import export_static
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit

FACTORS = (10.0, 10.0, 15.0, 15.0)
LATENCY = 0.0005


def build(name: str, size: int, int8: bool) -> tuple[Network, bytes]:
    """The network with random weights, and its one graph."""
    torch.manual_seed(0)
    branchy = BranchyNet(single_exit(Backbone(name, 3, 10, size))).eval()
    for module in branchy.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model = export_static(branchy, [0.5] * 3, [0.25] * 3, size)
    if int8:
        model = quantise(model, noise(size, 4))
    manifest = Manifest(("0.onnx",), (1,), 1, tuple("abcdefghij"), (size, size, 3))
    return join([model], manifest), model.SerializeToString()


def noise(size: int, count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def back_at_every_pooling(network: Network, profile: Profile) -> float:
    """Seconds when the leader gathers the map at every halving and hands out strips again."""
    speeds = np.array([1 / device.whole for device in profile.devices])
    shares = speeds / speeds.sum()
    total, strides = 0.0, [network.stride[cut] for cut in network.cuts]
    groups = min(len(network.cuts) - 1, len(profile.devices[0].fixed))
    for g in range(groups):
        cut = network.cuts[g + 1]
        rows = network.height(cut)
        work = [
            device.fixed[g] + device.per_row[g] * (rows * share + 2)
            for device, share in zip(profile.devices, shares, strict=True)
        ]
        total += max(work)
        if strides[g + 1] != strides[g] or g == groups - 1:
            size = network.row_bytes(cut) * rows
            link = profile.links[0][1]
            total += 2 * (link.latency + size * (1 - shares[0]) / link.rate)
    link = profile.links[-1][0]
    image = network.row_bytes("image") * network.height("image")
    return total + profile.devices[0].tail + link.seconds(image)


def equal(plan: Plan) -> Plan:
    """The same groups with strips of equal heights."""
    rows, count = sum(plan.layout.heights), len(plan.devices)
    heights = tuple(rows * (d + 1) // count - rows * d // count for d in range(count))
    return replace(plan, layout=replace(plan.layout, heights=heights))


def measure(
    network: Network, profile: Profile, plan: Plan, whole: Any, rate: float, images: np.ndarray
) -> tuple[float, float]:
    """Median seconds of an image, and the worst difference of a logit."""
    only = profile.without([d.name for d in profile.devices if d.name not in plan.devices])
    times, worst = [], 0.0
    with Engine(network, only, plan=plan, replans=False) as engine:
        for number, name in enumerate(FACTORS):
            actor = engine.actors.get(f"local{number}")
            if actor is not None:
                load_ray().get(actor.emulate.remote(name, rate, LATENCY))
        for image in [images[0], *images]:  # the first one warms up
            started = time.perf_counter()
            logits = engine.logits(image)
            times.append(time.perf_counter() - started)
            worst = float(np.maximum(worst, np.abs(logits - whole(image)).max()))  # NaN stays
    return statistics.median(times[1:]), worst


def compare(name: str, int8: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All links and numbers of workers for one network."""
    network, content = build(name, options.size, int8)
    images, ray, rows = noise(options.size, options.images), load_ray(), []

    def whole(image: np.ndarray) -> np.ndarray:
        return segment_logits([content], image[None], 1)[:, 0]

    for mbit in options.links:
        rate = mbit * 1e6 / 8
        actors = start_actors([f"local{n}" for n in range(4)], 1)
        for number, factor in enumerate(FACTORS):
            ray.get(actors[f"local{number}"].emulate.remote(factor, rate, LATENCY))
        every = measure_cluster(network, actors, "", "int8" if int8 else "fp32", options.rounds)
        for actor in actors.values():
            ray.kill(actor)
        time.sleep(1)
        single, _ = measure(network, every, single_plan(network, every, 0), whole, rate, images)
        for workers in options.workers:
            profile = every.without([f"local{n}" for n in range(workers, 4)])
            plan = make_plan(network, profile)
            seconds, worst = measure(network, profile, plan, whole, rate, images)
            row: dict[str, Any] = {
                "network": name,
                "precision": "int8" if int8 else "fp32",
                "mbit": mbit,
                "workers": workers,
                "used": len(plan.devices),
                "groups": len(plan.layout.exchanged) + 1,
                "heights": plan.layout.heights,
                "seconds": seconds,
                "predicted": plan.seconds[-1],
                "alone": single,
                "bound": 1 / sum(1 / device.whole for device in profile.devices),
                "back_at_every_pooling": back_at_every_pooling(network, profile),
                "memory_mb": [round(each / 1e6) for each in plan.memory],
                "worst": worst,
            }
            if len(plan.devices) > 1:
                row["equal_strips"], _ = measure(
                    network, profile, equal(plan), whole, rate, images[:1]
                )
                whole_seconds = [
                    next(d.whole for d in profile.devices if d.name == name)
                    for name in plan.devices
                ]
                work = expected_work(network, profile, plan)
                row["work_over_one_device"] = float((work / whole_seconds).sum())
                row["expected_work"] = work.tolist()
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that the issue asks for; of several networks, the worst."""
    fastest = max(row["mbit"] for row in rows)
    best = [row for row in rows if row["mbit"] == fastest]

    def speedup(workers: int) -> float | None:
        ratios = [row["alone"] / row["seconds"] for row in best if row["workers"] == workers]
        return min(ratios) if ratios else None

    most = max(row["workers"] for row in best)
    return {
        "worst_logit_difference": max(row["worst"] for row in rows if row["precision"] == "fp32"),
        "speedup_4_devices": speedup(4),
        "speedup_2_devices": speedup(2),
        "share_of_bound": min(r["bound"] / r["seconds"] for r in best if r["workers"] == most),
        "prediction_error": max(abs(r["predicted"] / r["seconds"] - 1) for r in rows),
        "slowest_against_alone": max(r["seconds"] / r["alone"] for r in rows),
        "links": "emulated",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=["timm/resnet18", "timm/vgg16_bn"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--links", type=int, nargs="*", default=[1000, 300, 100, 50])
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--images", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--int8", action="store_true")
    options = parser.parse_args()
    connect(None, 4)
    rows = [row for name in options.networks for row in compare(name, options.int8, options)]
    print(json.dumps(summary(rows)))


if __name__ == "__main__":
    main()

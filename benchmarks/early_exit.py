"""Is an early exit of the one file really faster?  python -m benchmarks.early_exit

Times every exit of the composed file, forced in turn, against a static graph of the plain main
network, image by image, all contenders interleaved in one process. Without --model the paper's
networks are built with random weights (ResNet18, width 64, 32x32, 100 classes): what a path costs
does not depend on what was learnt.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgeke.device.policy import force_exit
from edgeke.device.scores import Score
from edgeke.device.session import open_session
from edgeke.device.timing import time_interleaved


def build(width: int) -> tuple[bytes, bytes]:
    """The composed file and the static main network of the paper's layout."""
    import torch

    from edgeke.graph.compose import compose_cascade
    from edgeke.graph.segments import export_segments, export_static
    from edgeke.networks.architecture import Architecture
    from edgeke.networks.branchynet import BranchyNet

    torch.manual_seed(0)
    network = BranchyNet(Architecture.with_layout("edgeke", "resnet18", width, 3, 100)).eval()
    normalisation = ([0.5] * 3, [0.25] * 3, 32)
    cascade = compose_cascade(
        export_segments(network, *normalisation),
        score=Score("max_probability"),
        temperatures=[1.0] * len(network.exits),
        image_shape=(32, 32, 3),
        classes=100,
        metadata={},
    )
    static = export_static(network, *normalisation)
    return cascade.SerializeToString(), static.SerializeToString()


def contenders(
    cascade: Path | bytes, static: Path | bytes, threads: int
) -> dict[str, Callable[[], Any]]:
    """One call per contender, on one random image."""
    session, rival = open_session(cascade, threads), open_session(static, threads)
    shape = session.get_inputs()[0].shape
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    exits = session.get_inputs()[1].shape[0]
    votes = np.ones(exits, np.float32)

    def forced(exit: int) -> Callable[[], Any]:
        feeds = {"image": image, "thresholds": np.float32(force_exit(exit, exits)), "votes": votes}
        return lambda: session.run(None, feeds)

    named = {f"exit {e}": forced(e) for e in range(exits)}
    named["vote"] = forced(exits)
    named["static main"] = lambda: rival.run(None, {"image": image})
    return named


def main() -> None:
    """Print the table, then one JSON line with the ratios of the minima."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a composed file, such as models/edgeke.onnx")
    parser.add_argument("--static", type=Path, default=Path("models/static/main.onnx"))
    parser.add_argument("--width", type=int, default=64, help="width of the network built here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    files = (options.model, options.static) if options.model else build(options.width)
    times = time_interleaved(contenders(*files, options.threads), options.rounds, math.inf)
    best = {name: min(values) for name, values in times.items()}
    print(f"{'contender':<12} {'min ms':>8} {'median':>8} {'p95':>8} {'static / it':>12}")
    for name, values in times.items():
        p95 = np.percentile(values, 95)
        ratio = best["static main"] / best[name]
        print(f"{name:<12} {best[name]:8.3f} {np.median(values):8.3f} {p95:8.3f} {ratio:12.2f}")
    full = [name for name in best if name.startswith("exit")][-1]
    speedups = {n: round(best["static main"] / t, 3) for n, t in best.items() if n != "static main"}
    first = round(best[full] / best["exit 0"], 3)
    print(json.dumps({"speedup_over_static": speedups, "exit0_speedup_over_full_path": first}))


if __name__ == "__main__":
    main()

"""Stage `evaluate`: the shipped file on the test split, run as the device runs it."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.data.dataset import Split
from edgeke.device.policy import Policy, parse_policy
from edgeke.errors import InputError
from edgeke.graph.parity import check_exits
from edgeke.graph.runner import channels_last
from edgeke.params import Evaluate
from edgeke.policy.cascade import run_cascade
from edgeke.policy.intervals import share_interval
from edgeke.policy.scores import SCORES

__all__ = ["Evaluation", "evaluate"]

_TIE = 1e-6


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and the rows of the pictures: accuracy against cost, and exit shares."""

    policy: Policy
    metrics: dict[str, float]
    frontier: list[dict[str, object]]
    shares: list[dict[str, object]]

    def headline(self, calibrated: Mapping[str, float]) -> dict[str, float]:
        """What runs are compared by: every exit, and the default point, on each split."""
        policy = self.policy
        names = [f"exit_{e}/accuracy" for e in range(len(policy.macs))]
        headline = {f"validation/{name}": calibrated[f"validation/{name}"] for name in names}
        headline |= {f"test/{name}": self.metrics[f"test/{name}"] for name in names}
        default = policy.default
        for split in ("validation", "calibration"):
            for what in ("accuracy", "cost_share"):
                headline[f"{split}/default/{what}"] = calibrated[f"{split}/{default}/{what}"]
        for what in ("accuracy", "cost_share", "latency_ms_mean", "latency_ms_median"):
            headline[f"test/default/{what}"] = self.metrics[f"test/{default}/{what}"]
        for name in ("main", "teacher"):
            headline[f"test/{name}/accuracy"] = self.metrics[f"test/{name}/accuracy"]
        return headline


def evaluate(
    model: Path,
    static: Mapping[str, Path],
    static_macs: Mapping[str, int],
    test: Split,
    settings: Evaluate,
) -> Evaluation:
    """Measure the one-file model and its static rivals on the test split.

    All inference and timing happen in a fresh process that holds only numpy and ONNX Runtime;
    accuracy follows from the answers it brings back, and the operating points are those that the
    file carries. `static` must hold `main` and `teacher`.
    Errors: InputError with that process's own words when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        measured = _measure(model, static, test, settings, Path(folder))
        probabilities = np.load(Path(folder) / "probabilities.npy")
        logits = {name: np.load(Path(folder) / f"{name}.npy") for name in static}
    policy = parse_policy(measured["policy"])
    scores = SCORES[policy.score](probabilities)
    labels, exits = test.labels, len(probabilities)
    metrics: dict[str, float] = {}
    frontier: list[dict[str, object]] = []
    shares: list[dict[str, object]] = []

    # The default's neighbours on the frontier would cover its label.
    labels_of = {p.name: "" for p in policy.points if p.name not in ("full", "proportions")}

    def add(name: str, kind: str, right: NDArray[np.bool_], macs: float, timed: str) -> None:
        low, high = share_interval(int(right.sum()), len(right))
        latency = measured["latency_ms"][timed]
        metrics[f"test/{name}/accuracy"] = float(right.mean())
        metrics[f"test/{name}/accuracy_low"], metrics[f"test/{name}/accuracy_high"] = low, high
        metrics[f"test/{name}/cost_share"] = macs / static_macs["main"]
        metrics.update({f"test/{name}/latency_ms_{key}": ms for key, ms in latency.items()})
        frontier.append(
            {
                "name": name,
                "label": "default" if name == policy.default else labels_of.get(name, name),
                "kind": kind,
                "cost_percent": 100 * macs / static_macs["main"],
                "accuracy_percent": 100 * float(right.mean()),
                "accuracy_low": 100 * low,
                "accuracy_high": 100 * high,
                "latency_ms": latency["mean"],
            }
        )

    for point in policy.points:
        outcome = run_cascade(probabilities, scores, point.thresholds, point.votes)
        timed = np.asarray(measured["exits"][f"point/{point.name}"])
        limits = np.asarray(point.thresholds, np.float32)
        seen = scores[:, : len(timed)]
        check_exits(timed, outcome.exit[: len(timed)], seen, limits, _TIE)
        paid = outcome.shares(exits)
        add(
            point.name,
            "operating point",
            outcome.probabilities.argmax(-1) == labels,
            float(np.dot(paid, policy.macs)),
            f"point/{point.name}",
        )
        for exit, share in enumerate(paid):
            metrics[f"test/{point.name}/share_{exit}"] = share
            shares.append({"point": point.name, "exit": f"exit {exit}", "share": share})
        metrics[f"test/{point.name}/voted"] = float((outcome.exit == exits).mean())
    for exit in range(exits):
        right = probabilities[exit].argmax(-1) == labels
        add(f"exit_{exit}", "exit", right, policy.macs[exit], f"exit_{exit}")
    for name, answers in logits.items():
        add(name, "static network", answers.argmax(-1) == labels, static_macs[name], name)
    for name, size in measured["file_mib"].items():
        metrics[f"test/{name}/file_mib"] = size
        metrics[f"test/{name}/peak_memory_mib"] = measured["peak_memory_mib"][name]
    metrics["test/edgeke/load_ms"] = measured["load_ms"]
    return Evaluation(policy, metrics, frontier, shares)


def _measure(
    model: Path, static: Mapping[str, Path], test: Split, settings: Evaluate, folder: Path
) -> dict[str, Any]:
    np.save(folder / "images.npy", channels_last(test.images))
    job = {
        "model": str(model),
        "static": {name: str(file) for name, file in static.items()},
        "images": str(folder / "images.npy"),
        "threads": settings.threads,
        "latency_images": settings.latency_images,
        "out": str(folder),
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "edgeke.device.measure", str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InputError(f"the device process failed: {done.stderr.strip()}")
    measured: dict[str, Any] = json.loads((folder / "measurements.json").read_text())
    foreign = {"torch", "scipy", "mlflow", "onnx"} & set(measured["modules"])
    if foreign:
        raise RuntimeError(f"the device process imported {sorted(foreign)}")
    return measured

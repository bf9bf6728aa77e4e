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
from edgeke.device.scores import Score
from edgeke.errors import InputError
from edgeke.graph.parity import check_exits
from edgeke.graph.runner import channels_last
from edgeke.params import Evaluate
from edgeke.policy.intervals import share_interval
from edgeke.policy.samples import Samples

__all__ = ["Evaluation", "evaluate", "kept"]

_TIE = 1e-6
_HEADLINE = ("accuracy", "cost_share", "latency_ms_mean", "latency_ms_median", "met", "kept")


@dataclass(frozen=True)
class Evaluation:
    """Metrics, and the rows of the pictures: accuracy against cost, and exit shares."""

    policy: Policy
    metrics: dict[str, float]
    frontier: list[dict[str, object]]
    shares: list[dict[str, object]]

    def headline(self, calibrated: Mapping[str, float]) -> dict[str, float]:
        """What runs are compared by: every exit, and the default point, on each split."""
        names = [f"exit_{e}/accuracy" for e in range(len(self.policy.macs))]
        headline = {f"validation/{name}": calibrated[f"validation/{name}"] for name in names}
        headline |= {f"test/{name}": self.metrics[f"test/{name}"] for name in names}
        asked = [f"{of.name}/" for of in self.policy.requirements]
        for start in ("default/", *asked):
            for split, metrics in (
                ("validation", calibrated),
                ("calibration", calibrated),
                ("test", self.metrics),
            ):
                for what in _HEADLINE:
                    if f"{split}/{start}{what}" in metrics:
                        headline[f"{split}/{start}{what}"] = metrics[f"{split}/{start}{what}"]
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
    score = Score(policy.score, policy.score_weights)
    samples = Samples.of(
        probabilities, score.of(probabilities), test.labels, policy.points[0].votes
    )
    labels, exits = test.labels, len(probabilities)
    metrics: dict[str, float] = {}
    frontier: list[dict[str, object]] = []
    shares: list[dict[str, object]] = []

    def add(name: str, label: str, kind: str, right: NDArray[np.bool_], macs: float) -> None:
        """A contender's accuracy, cost and, where it was timed, latency."""
        low, high = share_interval(int(right.sum()), len(right))
        share, latency = macs / static_macs["main"], measured["latency_ms"].get(name)
        row = {"name": name, "label": label, "kind": kind, "cost_percent": 100 * share}
        row |= {"accuracy_percent": 100 * float(right.mean())}
        row |= {"accuracy_low": 100 * low, "accuracy_high": 100 * high}
        frontier.append({**row, "latency_ms": latency["mean"] if latency else None})
        if not latency:
            return
        metrics[f"test/{name}/accuracy"] = float(right.mean())
        metrics[f"test/{name}/accuracy_low"], metrics[f"test/{name}/accuracy_high"] = low, high
        metrics[f"test/{name}/cost_share"] = share
        metrics.update({f"test/{name}/latency_ms_{key}": ms for key, ms in latency.items()})

    for label, point in policy.named.items():
        taken = samples.exits(point.thresholds)
        timed = np.asarray(measured["exits"][label])
        limits = np.asarray(point.thresholds, np.float32)
        seen = samples.scores[:, : len(timed)]
        check_exits(timed, taken[: len(timed)], seen, limits, _TIE)
        paid = np.bincount(np.minimum(taken, exits - 1), minlength=exits) / len(taken)
        macs = float(np.dot(paid, policy.macs))
        # A requirement that the default answers would cover its label in the picture.
        hidden = label != "default" and point.name == policy.default
        add(
            label,
            "" if hidden else label,
            "operating point",
            ~samples.wrong(point.thresholds),
            macs,
        )
        for exit, share in enumerate(paid.tolist()):
            metrics[f"test/{label}/share_{exit}"] = share
            shares.append({"point": label, "exit": f"exit {exit}", "share": share})
        metrics[f"test/{label}/voted"] = float((taken == exits).mean())
        metrics[f"test/{label}/loss"] = float(samples.losses(point.thresholds).mean())
    metrics |= kept(policy, metrics)
    for point in policy.points:
        if point.deepest == exits - 1 and point.name.startswith("accuracy"):
            cost = samples.result(point.thresholds, policy.macs).cost
            add(point.name, "", "frontier", ~samples.wrong(point.thresholds), cost)
    for exit in range(exits):
        right = samples.correct[exit]
        add(f"exit_{exit}", f"exit_{exit}", "exit", right, policy.macs[exit])
    for name, answers in logits.items():
        right = answers.argmax(-1) == labels
        add(name, name, "static network", right, static_macs[name])
    for name, size in measured["file_mib"].items():
        metrics[f"test/{name}/file_mib"] = size
        metrics[f"test/{name}/peak_memory_mib"] = measured["peak_memory_mib"][name]
    metrics["test/edgeke/load_ms"] = measured["load_ms"]
    return Evaluation(policy, metrics, frontier, shares)


def kept(policy: Policy, metrics: Mapping[str, float]) -> dict[str, float]:
    """Which requirements the test split saw kept: `test/<requirement>/kept`, 1 or 0.

    One split is one draw: a promise with delta 0.1 may be seen broken in one of ten.
    """
    found = {}
    for asked in policy.requirements:
        if asked.point is None:
            continue
        what = {"max_cost": "cost_share", "min_accuracy": "accuracy", "max_loss": "loss"}
        value = metrics[f"test/{asked.name}/{what[asked.kind]}"]
        held = value >= asked.bound if asked.kind == "min_accuracy" else value <= asked.bound
        found[f"test/{asked.name}/kept"] = float(held)
    return found


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

"""Stage `evaluate`: the shipped files on the test split, run as the device runs them."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.bundle import copy_device_package
from edgeke.data.dataset import Split
from edgeke.device.policy import Policy, parse_policy
from edgeke.device.scores import Score
from edgeke.errors import InputError
from edgeke.graph.parity import check_exits
from edgeke.params import Evaluate
from edgeke.policy.intervals import share_interval
from edgeke.policy.samples import Samples
from edgeke.remote import run_folder

__all__ = ["Evaluation", "evaluate", "kept"]

_TIE = 1e-6
_HEADLINE = ("accuracy", "cost_share", "latency_ms_mean", "latency_ms_median", "met", "kept")
_PRECISIONS = {"fp32": "", "int8": "int8/"}
_STATIC = ("main", "teacher", "main.int8", "teacher.int8")


@dataclass(frozen=True)
class Evaluation:
    """Metrics, the rows of the pictures, and the device in words.

    `policies` by precision; `frontier` holds accuracy against cost, `shares` where images leave.
    """

    policies: dict[str, Policy]
    metrics: dict[str, float]
    frontier: list[dict[str, object]]
    shares: list[dict[str, object]]
    device: dict[str, object]

    def headline(self, calibrated: Mapping[str, float]) -> dict[str, float]:
        """What runs are compared by: exits, the default point and requirements, on each split."""
        headline: dict[str, float] = {}
        sources = {"validation": calibrated, "calibration": calibrated, "test": self.metrics}
        for precision, policy in self.policies.items():
            prefix = _PRECISIONS[precision]
            exits = [f"exit_{e}" for e in range(len(policy.macs))]
            asked = [of.name for of in policy.requirements]
            wanted = [f"{prefix}{e}/accuracy" for e in exits]
            wanted += [f"{prefix}{name}/{w}" for name in ("default", *asked) for w in _HEADLINE]
            wanted += [f"{prefix}{name}/accuracy" for name in ("main", "teacher")]
            headline |= {
                f"{split}/{name}": metrics[f"{split}/{name}"]
                for split, metrics in sources.items()
                for name in wanted
                if f"{split}/{name}" in metrics
            }
        return headline


def evaluate(
    models: Path, static_macs: Mapping[str, int], test: Split, settings: Evaluate
) -> Evaluation:
    """Measure the one-file models and their static rivals on the test split.

    All inference and timing happen in a fresh process, here or on the device, in a copy of the
    bundle where only numpy, ONNX Runtime and `edgeke.device` are at hand; accuracy follows from the
    answers it brings back, and the operating points are those that the files carry. `models` is
    the bundle with `static/`, `static_macs` must hold `main` and `teacher`.
    Errors: InputError with that process's own words when it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = _measure(models, test, settings, folder)
        out = folder / "out"
        forced = {p: np.load(out / f"probabilities.{p}.npy") for p in _PRECISIONS}
        logits = {name: np.load(out / f"{name}.npy") for name in _STATIC}
    tables = _Tables(test.labels, measured, static_macs)
    policies = {p: parse_policy(text) for p, text in measured["policies"].items()}
    for precision, probabilities in forced.items():
        tables.add_cascade(precision, policies[precision], probabilities)
    for name, answers in logits.items():
        tables.add_static(name, answers)
    tables.add_machine()
    device = {
        "device": settings.device,
        "machine": measured["machine"],
        "tiers": {
            tier.name: measured["tiers"][tier.name].get("unavailable", "measured")
            + (", emulated" if tier.quota else "")
            for tier in settings.tiers
        },
    }
    return Evaluation(policies, tables.metrics, tables.frontier, tables.shares, device)


class _Tables:
    """Metrics and rows as they are gathered from what the device measured."""

    def __init__(
        self, labels: NDArray[np.int64], measured: dict[str, Any], static_macs: Mapping[str, int]
    ) -> None:
        self.labels, self.measured, self.static_macs = labels, measured, static_macs
        self.first = next(iter(measured["tiers"].values()))
        self.metrics: dict[str, float] = {}
        self.frontier: list[dict[str, object]] = []
        self.shares: list[dict[str, object]] = []

    def add_cascade(
        self, precision: str, policy: Policy, probabilities: NDArray[np.float32]
    ) -> None:
        """The named points, the frontier and every exit of one precision."""
        score = Score(policy.score, policy.score_weights).of(probabilities)
        samples = Samples.of(probabilities, score, self.labels, policy.points[0].votes)
        prefix, exits = _PRECISIONS[precision], len(probabilities)
        for label, point in policy.named.items():
            taken, name = samples.exits(point.thresholds), f"{prefix}{label}"
            timed = np.asarray(self.first["exits"][f"{precision}/{label}"])
            limits = np.asarray(point.thresholds, np.float32)
            seen = samples.scores[:, : len(timed)]
            check_exits(timed, taken[: len(timed)], seen, limits, _TIE)
            paid = np.bincount(np.minimum(taken, exits - 1), minlength=exits) / len(taken)
            # A requirement that the default answers would cover its label in the picture.
            hidden = label != "default" and point.name == policy.default
            row = (name, "" if hidden else name, "operating point")
            right = ~samples.wrong(point.thresholds)
            self._add(*row, f"{precision}/{label}", right, float(np.dot(paid, policy.macs)))
            for exit, share in enumerate(paid.tolist()):
                self.metrics[f"test/{name}/share_{exit}"] = share
                if precision == "fp32":
                    row_of = {"point": label, "exit": f"exit {exit}", "share": share}
                    self.shares.append(row_of)
            self.metrics[f"test/{name}/voted"] = float((taken == exits).mean())
            self.metrics[f"test/{name}/degradation"] = float(
                samples.degradations(point.thresholds).mean()
            )
        found = kept(policy, self.metrics, prefix)
        self.metrics |= found
        for point in policy.points:
            if point.deepest == exits - 1 and point.name.startswith("accuracy"):
                cost = samples.result(point.thresholds, policy.macs).cost
                right = ~samples.wrong(point.thresholds)
                self._add(f"{prefix}{point.name}", "", "frontier", "", right, cost)
        for exit in range(exits):
            name = f"{prefix}exit_{exit}"
            right, macs = samples.correct[exit], policy.macs[exit]
            self._add(name, name, "exit", f"{precision}/exit_{exit}", right, macs)

    def add_static(self, name: str, answers: NDArray[np.float32]) -> None:
        """One static network, by its file's name."""
        base, _, precision = name.partition(".")
        label = f"{precision}/{base}" if precision else base
        right = answers.argmax(-1) == self.labels
        self._add(label, label, "static network", name, right, self.static_macs[base])

    def add_machine(self) -> None:
        """Sizes, memory, load times, throughput and energy."""
        for what in ("file_mib", "peak_memory_mib"):
            for file, value in self.measured[what].items():
                self.metrics[f"test/{_named(file)}/{what}"] = value
        for precision, ms in self.measured["load_ms"].items():
            self.metrics[f"test/{_PRECISIONS[precision]}edgeke/load_ms"] = ms
        for contender, by_size in self.measured["throughput"].items():
            for size, rate in by_size.items():
                self.metrics[f"test/{_named(contender)}/images_per_second_batch_{size}"] = rate

    def _add(
        self, name: str, label: str, kind: str, timed: str, right: NDArray[np.bool_], macs: float
    ) -> None:
        """A contender's accuracy, cost and, where it was timed, latency in every tier."""
        low, high = share_interval(int(right.sum()), len(right))
        accuracy, share = float(right.mean()), macs / self.static_macs["main"]
        latency = self.first["latency_ms"].get(timed)
        precision = "int8" if name.startswith("int8/") else "fp32"
        row: dict[str, object] = {"precision": precision, "name": name, "label": label}
        row |= {"kind": kind}
        row |= {"cost_percent": 100 * share, "accuracy_percent": 100 * accuracy}
        row |= {"accuracy_low": 100 * low, "accuracy_high": 100 * high}
        self.frontier.append({**row, "latency_ms": latency["mean"] if latency else None})
        if not latency:
            return
        self.metrics[f"test/{name}/accuracy"] = accuracy
        self.metrics[f"test/{name}/accuracy_low"] = low
        self.metrics[f"test/{name}/accuracy_high"] = high
        self.metrics[f"test/{name}/cost_share"] = share
        for number, (tier, found) in enumerate(self.measured["tiers"].items()):
            if "unavailable" in found:
                continue
            where = "" if number == 0 else f"{tier}/"
            for key, value in found["latency_ms"][timed].items():
                key = key if key == "deadline_misses" else f"latency_ms_{key}"
                self.metrics[f"test/{name}/{where}{key}"] = value


def _named(contender: str) -> str:
    """How metrics call a file or contender: `edgeke.int8` is `int8/edgeke`."""
    if contender.startswith("fp32/"):
        return contender.removeprefix("fp32/")
    base, _, precision = contender.partition(".")
    return f"int8/{base}" if precision == "int8" else base


def kept(policy: Policy, metrics: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Which requirements the test split saw kept: `test/<requirement>/kept`, 1 or 0.

    One split is one draw: a promise with delta 0.1 may be seen broken in one of ten.
    """
    found = {}
    for asked in policy.requirements:
        if asked.point is None:
            continue
        what = {
            "max_cost": "cost_share",
            "min_accuracy": "accuracy",
            "max_degradation": "degradation",
        }
        value = metrics[f"test/{prefix}{asked.name}/{what[asked.kind]}"]
        held = value >= asked.bound if asked.kind == "min_accuracy" else value <= asked.bound
        found[f"test/{prefix}{asked.name}/kept"] = float(held)
    return found


def _measure(models: Path, test: Split, settings: Evaluate, folder: Path) -> dict[str, Any]:
    """Stage the bundle in `folder`, run it, and read what it measured."""
    files = {"fp32": "edgeke.onnx", "int8": "edgeke.int8.onnx"}
    static = {name: f"static/{name}.onnx" for name in _STATIC}
    for file in (*files.values(), *static.values()):
        (folder / "models" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(models / file, folder / "models" / file)
    shutil.copytree(models / "segments", folder / "models" / "segments")
    copy_device_package(folder)
    job = {
        "folder": "models",
        "models": files,
        "static": static,
        "images": "images.npy",
        "latency_images": settings.latency_images,
        "deadline_ms": settings.deadline_ms,
        "tiers": [
            {"name": tier.name, "threads": tier.threads, "quota": tier.quota}
            for tier in settings.tiers
        ],
        "out": "out",
    }
    (folder / "job.json").write_text(json.dumps(job))
    module = "edgeke.device.measure"
    run_folder(folder, module, ["job.json"], settings.device, settings.python)
    measured: dict[str, Any] = json.loads((folder / "out" / "measurements.json").read_text())
    foreign = {"torch", "scipy", "mlflow", "onnx"} & set(measured["modules"])
    if foreign:
        raise InputError(f"the device process imported {sorted(foreign)}, which no device has")
    return measured

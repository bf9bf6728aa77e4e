"""Stage `evaluate`: the shipped files on the test split, run as the device runs them."""

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgeke.bundle import copy_device_package
from edgeke.data.answers import useless
from edgeke.data.dataset import Split, channels_last
from edgeke.device.bundle import PRECISIONS, read_metadata
from edgeke.device.codec import RAW, decode, encode, parse_codec
from edgeke.device.manifest import read_manifest
from edgeke.device.measure import Job, Measurements, Setting, Trace
from edgeke.device.partitions import Partition, as_logits
from edgeke.device.policy import Policy, force_exit
from edgeke.device.scores import Score, biased, calibrated_probabilities
from edgeke.device.session import open_session
from edgeke.graph.parity import check_exits
from edgeke.graph.runner import logits_through
from edgeke.params import Evaluate
from edgeke.policy.cascade import run_cascade
from edgeke.policy.classes import class_metrics, class_rows
from edgeke.policy.intervals import share_interval
from edgeke.remote import run_folder

# What names begin with in a precision; fp32 first, whose policy names the reference exit.
_PREFIXES = {"fp32": "", "int8": "int8/"}
_TIE = 1e-6
# The emulated link: Mbit/s, and milliseconds in one direction.
_RATES, _DELAY_MS = (1.0, 10.0, 100.0), 10.0
_BY_CLASS = ("default", "full")
_INSPECTED = {"max_miss": "miss", "min_recall": "recall", "max_sure_error": "sure_error"}
_LABELLED = ("main", "plain", "teacher")

# Sources whose licence lets us pass pictures on: digits. CIFAR states none, ELPV's is for
# non-commercial use, and a user's own pictures are not ours to give away.
_SHARED = ("digits",)
_SAMPLES = 12

Row = dict[str, object]


@dataclass(frozen=True)
class Evaluation:
    """Metrics, policies by precision, rows of the pictures, and the device in words.

    `by_certainty` `[N]`: the images' numbers, from the one that exit 0 is surest of.
    `frontier`: accuracy against cost. `leavers`: for each named point and exit the share of images
    that left there, their accuracy, and the mean latency of those that were timed. `classes`:
    recall and precision of the default point and the full network; `confusion`: what they answer
    to each image; `warnings`: what is wrong with them. `profile`: each block and exit of both
    precisions.
    """

    metrics: dict[str, float]
    policies: dict[str, Policy]
    frontier: list[Row]
    leavers: list[Row]
    classes: list[Row]
    confusion: list[Row]
    warnings: list[str]
    profile: list[Row]
    device: dict[str, object]
    by_certainty: NDArray[np.int64]


@dataclass(frozen=True)
class _Result:
    """A network, an exit or an operating point: which answers are right `[N]`, and mean MACs.

    `name` is that of its metrics, `label` stands in the picture (empty: none).
    """

    name: str
    label: str
    kind: str
    correct: NDArray[np.bool_]
    macs: float

    def measures(self, main_macs: int, reference: NDArray[np.bool_]) -> dict[str, float]:
        """Accuracy with its interval, cost, and how often only the reference `[N]` is right."""
        low, high = share_interval(int(self.correct.sum()), len(self.correct))
        return {
            "accuracy": float(self.correct.mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "cost_share": self.macs / main_macs,
            "degradation": float((reference & ~self.correct).mean()),
        }


def evaluate(
    models: Path, static_macs: Mapping[str, int], test: Split, settings: Evaluate
) -> Evaluation:
    """Measure the one-file models and the static networks on the test split.

    All inference and timing happen in a fresh process, here or on the device, in a copy of the
    bundle where only numpy, ONNX Runtime and `edgeke.device` are needed. Accuracy follows from the
    answers that it returns; the operating points are those that the files carry. `models` is the
    bundle with `static/`; `static_macs` has the MACs of every static network, `main` among them.
    Errors: InputError for a damaged file, and in the device's words when its process fails.
    """
    policies: dict[str, Policy] = {}
    partitions: dict[str, tuple[Partition, ...]] = {}
    classes: tuple[str, ...] = ()
    for precision in _PREFIXES:
        file = models / PRECISIONS[precision]
        metadata = read_metadata(open_session(file), str(file))
        policies[precision], classes = metadata.policy, metadata.classes
        partitions[precision] = metadata.partitions
    measured, answers = _measure(models, policies, static_macs, len(classes), test, settings)
    metrics = {f"test/{name}": value for name, value in measured.metrics.items()}
    frontier: list[Row] = []
    leavers: list[Row] = []
    named: dict[str, NDArray[np.int64]] = {}  # what some points answer
    fp32 = policies["fp32"]
    exit = fp32.reference_exit % len(fp32.macs)
    reference = answers[f"exit_{exit}"].argmax(-1) == test.labels
    for precision, policy in policies.items():
        prefix = _PREFIXES[precision]
        results, left, answered = _cascade(prefix, policy, answers, measured.traces, test.labels)
        named |= answered
        for name, macs in static_macs.items():
            correct = answers[prefix + name].argmax(-1) == test.labels
            label = prefix + name if name in _LABELLED else ""
            results.append(_Result(prefix + name, label, "static network", correct, macs))
        measures = [result.measures(static_macs["main"], reference) for result in results]
        for result, values in zip(results, measures, strict=True):
            if result.kind != "frontier":
                metrics |= {f"test/{result.name}/{key}": value for key, value in values.items()}
        frontier += _frontier(precision, results, measures, measured.metrics)
        metrics |= inspected(policy, prefix, answered, test.labels, reference, classes)
        metrics |= kept(policy, metrics, prefix)
        folder = models / "segments" / precision
        segments = [folder / name for name in read_manifest(folder).segments]
        own = [answers[f"{prefix}exit_{exit}"] for exit in range(len(policy.macs))]
        for partition in partitions[precision]:
            remote = through_partition(partition, segments, test.images)
            values = divided(
                partition, policy, own, remote, test.labels, reference, metrics, prefix
            )
            metrics |= {
                f"test/{prefix}partition/{partition.name}/{k}": v for k, v in values.items()
            }
        leavers += left
    for row in leavers:
        values = {key: value for key, value in row.items() if isinstance(value, float)}
        metrics |= {f"test/{row['point']}/{row['exit']}/{key}": v for key, v in values.items()}
    named = {name: a for name, a in named.items() if name.split("/")[-1] in _BY_CLASS}
    tables = {name: class_rows(answer, test.labels, classes) for name, answer in named.items()}
    for name, rows in tables.items():
        metrics |= {f"test/{name}/{key}": value for key, value in class_metrics(rows).items()}
    words = {name: useless(answer, test.labels, classes) for name, answer in named.items()}
    device: dict[str, object] = {
        "device": settings.device,
        "threads": list(settings.threads),
        "machine": measured.machine,
    }
    profile: list[Row] = [
        {"precision": precision, **asdict(row)}
        for precision, rows in measured.blocks.items()
        for row in rows
    ]
    return Evaluation(
        metrics,
        policies,
        frontier,
        leavers,
        classes=[{"point": name, **row} for name, rows in tables.items() for row in rows],
        confusion=_confusion(named, test.labels, classes),
        warnings=[f"the point {name} {reason}" for name, reason in words.items() if reason],
        profile=profile,
        device=device,
        by_certainty=np.argsort(-answers["exit_0"].max(-1), kind="stable"),
    )


def write_samples(
    folder: Path, source: str, images: NDArray[np.uint8], by_certainty: NDArray[np.int64]
) -> None:
    """Up to twelve of the images `[N, H, W, C]` as PNGs, from the easiest to the hardest.

    They ride in the bundle, for the page that serves it; the folder stays empty where the
    source's licence does not let pictures be passed on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    if source in _SHARED:
        count = min(_SAMPLES, len(images))
        for number, place in enumerate(np.linspace(0, len(images) - 1, count).round().astype(int)):
            pixels = images[by_certainty[place]]
            grey = pixels.shape[-1] == 1
            Image.fromarray(pixels[..., 0] if grey else pixels).save(folder / f"{number:02}.png")


def through_partition(
    partition: Partition, segments: Sequence[Path], images: NDArray[np.uint8]
) -> NDArray[np.float32] | None:
    """The last exit's logits `[N, K]` through a codec; None for `raw`, which changes nothing."""
    if partition.codec == RAW:
        return None
    codec = parse_codec(partition.codec)

    def change(features: NDArray[np.float32]) -> NDArray[np.float32]:
        return decode(encode(features, codec), features.shape[1:], len(features))

    pixels = channels_last(images)
    return logits_through(segments, pixels, partition.after, {"": change}, 0)[""]


def divided(
    partition: Partition,
    base: Policy,
    own: Sequence[NDArray[np.float32]],
    remote: NDArray[np.float32] | None,
    labels: NDArray[np.int64],
    reference: NDArray[np.bool_],
    measured: Mapping[str, float],
    prefix: str,
) -> dict[str, float]:
    """A partition's default point, over a link that is emulated.

    `own` are the exits' probabilities on the device, `remote` the server's logits. Milliseconds
    are those of the device, as measured, and those of the link at some rates with 10 ms each way;
    a server's are left out.
    """
    after, policy = partition.after, partition.policy
    last = own[-1]
    if remote is not None:
        last = calibrated_probabilities(remote[None], base.temperatures[-1:])[0]
    raw = [as_logits(own[k]) * np.float32(base.temperatures[k]) for k in range(after + 1)]
    probabilities = calibrated_probabilities(np.stack([*raw, as_logits(last)]), policy.temperatures)
    scores = Score(policy.score, policy.score_weights).of(probabilities)
    point = policy.point(policy.default)
    outcome = run_cascade(probabilities, scores, point.thresholds, point.votes)
    answers = biased(outcome.probabilities, point.bias) if point.bias else outcome.probabilities
    correct = answers.argmax(-1) == labels
    size = min(partition.sent_bytes, partition.packed_bytes)
    sent = float((outcome.exit > after).mean())
    device = 0.0
    for exit in range(after + 1):
        here = float((np.minimum(outcome.exit, after) == exit).mean())
        device += here * measured[f"test/{prefix}exit_{exit}/latency_ms_mean"]
    values = {
        "accuracy": float(correct.mean()),
        "degradation": float((reference & ~correct).mean()),
        "sent_share": sent,
        "bytes_per_image": sent * size,
        "server_accuracy": float((last.argmax(-1) == labels).mean()),
    }
    for rate in _RATES:
        link = 2 * _DELAY_MS + 8 * size / rate / 1e3
        values[f"latency_ms_at_{rate:g}_mbit"] = device + sent * link
    return values


def inspected(
    policy: Policy,
    prefix: str,
    named: Mapping[str, NDArray[np.int64]],
    labels: NDArray[np.int64],
    reference: NDArray[np.bool_],
    classes: Sequence[str],
) -> dict[str, float]:
    """What requirements about some of the images come to on the test split.

    `reference` `[N]`: where the reference exit is right. Shares of no images are left out.
    """
    metrics = {}
    for requirement in policy.requirements:
        name = prefix + requirement.name
        if requirement.point is None or name not in named:
            continue
        answers = named[name]
        about = answers >= 0
        if requirement.class_name is not None:
            about = labels == classes.index(requirement.class_name)
        bad = (answers != labels)[about]
        if requirement.kind == "max_miss":
            bad = bad & reference[about]
        if requirement.kind == "max_sure_error":
            metrics[f"test/{name}/automation"] = float(about.mean())
        if len(bad):
            value = float(bad.mean())
            what = _INSPECTED[requirement.kind]
            metrics[f"test/{name}/{what}"] = 1 - value if what == "recall" else value
        if requirement.kind == "min_recall" and requirement.class_name is not None:
            alarms = answers[~about] == classes.index(requirement.class_name)
            metrics[f"test/{name}/false_alarms"] = float(alarms.sum() / len(labels))
    return metrics


def _confusion(
    named: Mapping[str, NDArray[np.int64]], labels: NDArray[np.int64], classes: Sequence[str]
) -> list[Row]:
    """One row per image: its class, and what each point answers to it."""
    columns, names = {"actual": labels, **named}, (*classes, "unsure")  # -1 is unsure
    return [
        {name: names[column[image]] for name, column in columns.items()}
        for image in range(len(labels))
    ]


def _measure(
    models: Path,
    policies: Mapping[str, Policy],
    static: Iterable[str],
    classes: int,
    test: Split,
    settings: Evaluate,
) -> tuple[Measurements, dict[str, NDArray[np.float32]]]:
    """Run the device process in a copy of the bundle; returns what it measured and answered."""
    networks: dict[str, str] = {}
    timed: dict[str, Setting] = {}
    batches: dict[str, str] = {}
    for precision, policy in policies.items():
        prefix, suffix = _PREFIXES[precision], "" if precision == "fp32" else f".{precision}"
        networks[f"{prefix}edgeke"] = PRECISIONS[precision]
        batches[f"{prefix}default"] = precision
        exits, votes = len(policy.macs), list(policy.points[0].votes)
        zeros = [0.0] * classes
        for label, point in policy.named.items():
            inputs = {"thresholds": list(point.thresholds), "votes": list(point.votes)}
            inputs["bias"] = list(point.bias) or zeros
            timed[prefix + label] = Setting(f"{prefix}edgeke", inputs, all_images=False)
        for exit in range(exits):
            inputs = {"thresholds": list(force_exit(exit, exits)), "votes": votes, "bias": zeros}
            timed[f"{prefix}exit_{exit}"] = Setting(f"{prefix}edgeke", inputs, all_images=True)
        for name in static:
            networks[prefix + name] = f"static/{name}{suffix}.onnx"
            timed[prefix + name] = Setting(prefix + name, {}, all_images=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in networks.values():
            (folder / "models" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(models / file, folder / "models" / file)
        shutil.copytree(models / "segments", folder / "models" / "segments")
        copy_device_package(folder)
        np.save(folder / "images.npy", channels_last(test.images))
        images, deadline = settings.latency_images, settings.deadline_ms
        job = Job(networks, timed, batches, images, deadline, settings.threads)
        (folder / "job.json").write_text(json.dumps(asdict(job)))
        run_folder(folder, "edgeke.device.measure", settings.device, settings.python)
        measured = Measurements.from_json((folder / "out" / "measurements.json").read_text())
        with np.load(folder / "out" / "answers.npz") as archive:
            return measured, {name: archive[name] for name in archive}


def _cascade(
    prefix: str,
    policy: Policy,
    answers: Mapping[str, NDArray[np.float32]],
    traces: Mapping[str, Trace],
    labels: NDArray[np.int64],
) -> tuple[list[_Result], list[Row], dict[str, NDArray[np.int64]]]:
    """Named points, exits and all other points (the frontier); and who leaves where.

    Last, what the points `default` and `full`, and those that promise something of some images,
    answer, `[N]`; -1 is unsure.

    Errors: InputError when the file left at other exits than its policy says.
    """
    exits = len(policy.macs)
    probabilities = np.stack([answers[f"{prefix}exit_{exit}"] for exit in range(exits)])
    scores = Score(policy.score, policy.score_weights).of(probabilities)
    macs = np.asarray([*policy.macs, policy.macs[-1]], np.float64)  # voted images pay for the last
    points = [(name, "operating point", point) for name, point in policy.named.items()]
    plain = replace(policy.points[0], bias=(), unsure=False)
    points += [
        (f"exit_{e}", "exit", replace(plain, thresholds=force_exit(e, exits))) for e in range(exits)
    ]
    named = {point.name for point in policy.named.values()}
    # What is biased or unsure trades more than accuracy against cost.
    others = [p for p in policy.points if p.name not in named and not p.unsure and not p.bias]
    points += [(point.name, "frontier", point) for point in others]
    results, leavers = [], []
    answered: dict[str, NDArray[np.int64]] = {}
    for label, kind, point in points:
        outcome = run_cascade(probabilities, scores, point.thresholds, point.votes)
        answered_with = outcome.probabilities
        if point.bias:
            answered_with = biased(answered_with, point.bias)
        answer: NDArray[np.int64] = answered_with.argmax(-1)
        if point.unsure:
            answer = np.where(outcome.exit == exits, -1, answer)
        name = prefix + label
        correct = answer == labels
        if label in _BY_CLASS or kind == "operating point" and point.inspections:
            answered[name] = answer
        cost = float(macs[outcome.exit].mean())
        results.append(_Result(name, name if kind != "frontier" else "", kind, correct, cost))
        if name in traces:
            trace, limits = traces[name], np.asarray(point.thresholds, np.float32)
            expected = outcome.exit[: len(trace.exits)]
            timed = scores[:, : len(expected)]
            check_exits(np.asarray(trace.exits), expected, timed, limits, _TIE)
        if kind == "operating point":
            leavers += _leavers(name, outcome.exit, correct, traces[name], exits)
    return results, leavers, answered


def _frontier(
    precision: str,
    results: Sequence[_Result],
    measures: Sequence[Mapping[str, float]],
    measured: Mapping[str, float],
) -> list[Row]:
    """One dot of the picture for each result; of several at one place, one has a label."""
    rows: list[Row] = []
    labelled = set()
    for result, values in zip(results, measures, strict=True):
        place = (result.kind, result.macs, values["accuracy"])
        label = "" if place in labelled else result.label
        if label:
            labelled.add(place)
        row: Row = {"precision": precision, "name": result.name, "label": label}
        latency = measured.get(f"{result.name}/latency_ms_mean")
        rows.append({**row, "kind": result.kind, **values, "latency_ms": latency})
    return rows


def _leavers(
    point: str, exit: NDArray[np.int64], correct: NDArray[np.bool_], trace: Trace, exits: int
) -> list[Row]:
    """One row per exit and one for the vote; None where nobody (or nobody timed) left."""
    rows: list[Row] = []
    for number in range(exits + 1):
        left, timed = exit == number, np.asarray(trace.exits) == number
        latencies = np.asarray(trace.latency_ms)[timed]
        rows.append(
            {
                "point": point,
                "exit": "voted" if number == exits else f"exit_{number}",
                "share": float(left.mean()),
                "accuracy": float(correct[left].mean()) if left.any() else None,
                "latency_ms_mean": float(latencies.mean()) if timed.any() else None,
            }
        )
    return rows


def kept(policy: Policy, metrics: Mapping[str, float], prefix: str = "") -> dict[str, float]:
    """Which requirements the test split saw kept: `test/<requirement>/kept`, 1 or 0.

    The test split is a sample, too. A promise that holds can be seen broken here, so with delta 0.1
    more than one of ten promises may be.
    """
    quantities = {
        "max_cost": "cost_share",
        "min_accuracy": "accuracy",
        "max_degradation": "degradation",
        **_INSPECTED,
    }
    result = {}
    for requirement in policy.requirements:
        if requirement.point is not None:
            name = f"test/{prefix}{requirement.name}"
            value = metrics.get(f"{name}/{quantities[requirement.kind]}")
            if value is None:  # no test image to tell
                continue
            least, bound = requirement.kind.startswith("min_"), requirement.bound
            result[f"{name}/kept"] = float(value >= bound if least else value <= bound)
    return result


def headline(evaluation: Evaluation, calibrated: Mapping[str, float]) -> dict[str, float]:
    """What runs are compared by: the default point on each split, and the requirements.

    `calibrated` are the metrics of stage `calibrate`.
    """
    metrics = {**calibrated, **evaluation.metrics}
    names = []
    for precision, policy in evaluation.policies.items():
        prefix = _PREFIXES[precision]
        for split in ("validation", "calibration", "test"):
            names += [f"{split}/{prefix}default/{key}" for key in ("accuracy", "cost_share")]
        names += [f"test/{prefix}default/latency_ms_mean", f"test/{prefix}plain/accuracy"]
        names += [f"validation/{prefix}composed/parity_difference"]
        for requirement in policy.requirements:
            names += [f"calibration/{prefix}{requirement.name}/met"]
            names += [f"test/{prefix}{requirement.name}/kept"]
    return {name: metrics[name] for name in names if name in metrics}

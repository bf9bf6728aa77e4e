"""What the monitor of shift notices, how soon, and what that shift costs.

    python -m benchmarks.shift [--models models] [--dataset data/dataset.safetensors]

False alarms are counted in 1,000 orders of the test images, with the histogram that the model has,
and in 1,000 long streams drawn from calibration and test images together, with histograms drawn
from the same. Then test images are changed in eight ways at three strengths each: how many it takes
until the alarm, after 500 unchanged ones, and on a device that meets no others from the start; the
accuracy of the full network and of the default point; and how many promises about degradation and
error are broken. Writes results/shift/summary.json; the last line is JSON.
"""

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from edgeke.data.dataset import channels_last, load_dataset
from edgeke.device.classifier import Classifier
from edgeke.device.promises import upper_bound
from edgeke.device.scores import biased
from edgeke.device.segments import Segments
from edgeke.device.shift import Monitor, bin_of, histogram
from edgeke.errors import InputError
from edgeke.files import write_json
from edgeke.policy.cascade import run_cascade

Images = NDArray[np.uint8]
Floats = NDArray[np.float32]

_STREAMS, _LONG = 1000, 2000  # of false alarms: how many, and images of a long one
_TRIALS, _HEALTHY, _MOST = 100, 500, 2000  # of each shift; unchanged images; most changed ones
_CHUNK = 64


def _scaled(images: Images, factor: float, middle: float) -> Images:
    return np.clip(middle + factor * (images - np.float32(middle)), 0, 255).astype(np.uint8)


def _noise(images: Images, sigma: float) -> Images:
    noise = np.random.default_rng(0).normal(0, sigma, images.shape)
    return np.clip(images + noise, 0, 255).round().astype(np.uint8)


def _blur(images: Images, share: float) -> Images:
    sigma = share * images.shape[1]
    return ndimage.gaussian_filter(images, (0, sigma, sigma, 0), mode="nearest")


def _moved(images: Images, share: float) -> Images:
    by = share * images.shape[1]
    return ndimage.shift(images, (0, by, by, 0), order=1, mode="nearest")


def _jpeg(images: Images, quality: int) -> Images:
    changed = []
    for image in images:
        file = io.BytesIO()
        grey = image.shape[-1] == 1
        Image.fromarray(image[..., 0] if grey else image).save(file, "jpeg", quality=quality)
        changed.append(np.asarray(Image.open(file)).reshape(image.shape))
    return np.stack(changed)


CHANGES: dict[str, tuple[Callable[..., Images], tuple[float, ...], str]] = {
    "noise": (_noise, (10, 25, 50), "standard deviation {} of 255"),
    "blur": (_blur, (0.015, 0.03, 0.06), "Gaussian of {} of the side"),
    "darker": (lambda x, f: _scaled(x, f, 0), (0.9, 0.7, 0.4), "{} times the light"),
    "brighter": (lambda x, f: _scaled(x, f, 0), (1.1, 1.4, 2.0), "{} times the light"),
    "contrast": (lambda x, f: _scaled(x, f, 128), (0.8, 0.5, 0.25), "{} times the contrast"),
    "jpeg": (_jpeg, (50, 20, 5), "quality {}"),
    "camera": (_moved, (0.03, 0.08, 0.15), "moved by {} of the side, both ways"),
}
# How often a class of an even number comes, in proportion to one of an odd number.
_SHARES = (2.0, 5.0, math.inf)


class Model:
    """A model's segments, its promises, and whose answers degradation is measured against."""

    def __init__(self, models: Path, precision: str | None) -> None:
        self.classifier = Classifier(models, precision)
        if self.classifier.shift is None:
            raise InputError(f"{models} has no histogram; run the stage calibrate again")
        self.policy = self.classifier.policy
        self.segments = _open(self.classifier)
        fp32 = (models / "edgeke.onnx").is_file()
        self.reference = _open(Classifier(models, "fp32")) if fp32 else self.segments

    def probabilities(self, images: Images, reference: bool = False) -> Floats:
        """Of every exit, `[E, N, K]`."""
        segments, parts = self.reference if reference else self.segments, []
        for start in range(0, len(images), _CHUNK):
            part, features = [], images[start : start + _CHUNK]
            for exit in range(len(self.policy.macs)):
                answer, features = segments.probabilities(exit, features)
                part.append(answer)
            parts.append(np.stack(part))
        return np.concatenate(parts, axis=1)

    def costs(self, images: Images, labels: NDArray[np.int64], weights: Floats) -> dict[str, float]:
        """Accuracies and broken promises, where images count with weights `[N]`."""
        right = self.probabilities(images, True)[-1].argmax(-1) == labels
        probabilities = self.probabilities(images)
        scores = self.segments.score.of(probabilities)
        delta, cap = self.policy.delta, len(self.policy.macs) - 1
        result = {"full": float(np.average(right, weights=weights)), "broken": 0, "promises": 0}
        for point in self.policy.points:
            cascade = run_cascade(probabilities, scores, point.thresholds, point.votes)
            answers = cascade.probabilities
            answers = biased(answers, point.bias) if point.bias else answers
            correct = answers.argmax(-1) == labels
            rates = {"max_degradation": right & ~correct, "max_error": ~correct}
            for evidence in point.evidence:
                if evidence.cap == cap:
                    counts = {"max_degradation": evidence.degraded, "max_error": evidence.wrong}
                    for risk, count in counts.items():
                        if count is not None:
                            rate = float(np.average(rates[risk], weights=weights))
                            result["promises"] += 1
                            result["broken"] += rate > upper_bound(count, point.samples, delta)
            if point.name == self.policy.default:
                result["default"] = float(np.average(correct, weights=weights))
        return result

    def first_scores(self, images: Images) -> list[float]:
        """Exit 0's score of every image."""
        first = [
            self.segments.score.at(self.segments.probabilities(0, part)[0][None], 0)
            for part in np.array_split(images, math.ceil(len(images) / _CHUNK))
        ]
        return np.concatenate(first).tolist()


def _open(classifier: Classifier) -> Segments:
    segments = classifier.open_segments()
    if segments is None:
        raise InputError(f"{classifier.bundle.model} has no segments beside it")
    return segments


def images_until_alarm(monitor: Monitor, stream: Sequence[float]) -> int | None:
    """How many scores it took; None without an alarm."""
    for number, score in enumerate(stream, 1):
        monitor.see(score)
        if monitor.alarm:
            return number
    return None


def false_alarms(counts: Sequence[int], calibration: list[float], test: list[float]) -> dict:
    """Of so many streams: orders of the test images, and long ones from all images."""
    everything, orders, drawn = np.array(calibration + test), 0, 0
    for seed in range(_STREAMS):
        random = np.random.default_rng(seed)
        order = random.permutation(test).tolist()
        orders += images_until_alarm(Monitor(counts, seed=seed), order) is not None
        there = histogram(random.choice(everything, len(calibration)))
        stream = random.choice(everything, _LONG).tolist()
        drawn += images_until_alarm(Monitor(there, seed=seed), stream) is not None
    return {
        "streams": _STREAMS, "orders": orders, "order_images": len(test),
        "drawn": drawn, "drawn_images": _LONG,
    }  # fmt: skip


def delays(
    counts: Sequence[int], healthy: list[float], changed: list[float], weights: Floats
) -> dict[str, float | None]:
    """Images until the alarm: after unchanged images, and (`start_`) without any before."""
    after = _delays(counts, healthy, _HEALTHY, changed, weights)
    start = _delays(counts, healthy, 0, changed, weights)
    return after | {f"start_{name}": value for name, value in start.items()}


def _delays(
    counts: Sequence[int], healthy: list[float], before: int, changed: list[float], weights: Floats
) -> dict[str, float | None]:
    """The share of streams with an alarm, median and 95th percentile; None: over the most."""
    until = []
    for seed in range(_TRIALS):
        random = np.random.default_rng(seed)
        after = random.choice(changed, _MOST, p=weights / weights.sum())
        stream = [*random.choice(healthy, before).tolist(), *after.tolist()]
        number = images_until_alarm(Monitor(counts, seed=seed), stream)
        until.append(math.inf if number is None else number - before)
    median, late = np.quantile(until, (0.5, 0.95), method="higher").tolist()
    return {
        "noticed": float(np.isfinite(until).mean()),
        "before": sum(number <= 0 for number in until),
        "median": None if math.isinf(median) else median,
        "p95": None if math.isinf(late) else late,
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--dataset", type=Path, default=Path("data/dataset.safetensors"))
    parser.add_argument("--precision", choices=("int8", "fp32"), help="default: int8 if present")
    parser.add_argument("--images", type=int, default=2000, help="test images at most")
    parser.add_argument("--out", type=Path, default=Path("results/shift/summary.json"))
    options = parser.parse_args(arguments)
    model = Model(options.models, options.precision)
    dataset = load_dataset(options.dataset, ("calibration", "test"))
    chosen = np.random.default_rng(0).permutation(len(dataset["test"].labels))[: options.images]
    images = channels_last(np.asarray(dataset["test"].images)[np.sort(chosen)])
    labels = dataset["test"].labels[np.sort(chosen)]
    counts = model.policy.histogram
    calibration = model.first_scores(channels_last(np.asarray(dataset["calibration"].images)))
    healthy, equal = model.first_scores(images), np.ones(len(images))

    monitor = Monitor(counts)
    started = time.thread_time()
    for score in healthy:
        monitor.see(score)
    microseconds = 1e6 * (time.thread_time() - started) / len(healthy)

    rows = [{"change": "none", "strength": "", **model.costs(images, labels, equal)}]
    rows[0] |= delays(counts, healthy, healthy, equal)
    for name, (change, strengths, words) in CHANGES.items():
        for strength in strengths:
            changed = change(images, strength)
            row = {"change": name, "strength": words.format(strength)}
            row |= model.costs(changed, labels, equal)
            rows.append(row | delays(counts, healthy, model.first_scores(changed), equal))
    for ratio in _SHARES:
        odd = 0.0 if math.isinf(ratio) else 1 / ratio
        weights = np.where(labels % 2 == 0, 1.0, odd)
        words = "only even classes" if odd == 0 else f"even classes {ratio:g} times as often"
        row = {"change": "classes", "strength": words, **model.costs(images, labels, weights)}
        rows.append(row | delays(counts, healthy, healthy, weights))
    print(table(rows))
    summary = {
        "model": dataset.name,
        "precision": model.classifier.bundle.precision,
        "test_images": len(images),
        "calibration_images": model.policy.samples,
        "default": model.policy.default,
        "false_alarms": false_alarms(counts, calibration, healthy),
        "microseconds_per_image": round(microseconds, 2),
        "bins_used": len({bin_of(score) for score in healthy}),
        "rows": rows,
    }
    write_json(options.out, summary)
    print(json.dumps({key: value for key, value in summary.items() if key != "rows"}))


def table(rows: Sequence[dict]) -> str:
    """The rows in Markdown."""
    lines = [
        "| change | strength | full | default | broken | noticed | images | from the start |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def images(row: dict, prefix: str) -> str:
        if row[f"{prefix}median"] is None:
            return f"over {_MOST}"
        late = row[f"{prefix}p95"]
        return f"{row[f'{prefix}median']:.0f}, " + (
            f"over {_MOST}" if late is None else f"{late:.0f}"
        )

    for row in rows:
        lines.append(
            f"| {row['change']} | {row['strength']} | {100 * row['full']:.1f} % | "
            f"{100 * row['default']:.1f} % | {row['broken']} of {row['promises']} | "
            f"{100 * row['noticed']:.0f} % | {images(row, '')} | "
            f"{100 * row['start_noticed']:.0f} %: {images(row, 'start_')} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])

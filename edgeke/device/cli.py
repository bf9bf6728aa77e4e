"""The command line: what a model is, what it costs here, what it answers.

python -m edgeke.device {info,profile,predict,benchmark} PATH
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path

from edgeke.device.benchmark import benchmark
from edgeke.device.bundle import PRECISIONS
from edgeke.device.classifier import Classifier
from edgeke.device.decode import read_image
from edgeke.device.profile import Profile
from edgeke.errors import InputError, report

__all__ = ["main"]


def main(arguments: Sequence[str]) -> int:
    """Run a command. Returns 0, or 1 with the error in one line on standard error."""
    asked = _parser().parse_args(arguments)
    try:
        classifier = Classifier(asked.path, asked.precision, asked.threads)
        if asked.command == "info":
            _info(classifier)
        elif asked.command == "profile":
            _print_profile(classifier, classifier.profile(asked.rounds))
        elif asked.command == "predict":
            _predict(classifier, asked)
        else:
            _benchmark(classifier, asked.rounds)
    except InputError as error:
        return report(error)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m edgeke.device", description="EdgeKE's classifier on this device."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("path", type=Path, help="a bundle folder, or the one .onnx file")
    shared.add_argument("--precision", choices=tuple(PRECISIONS), help="default: int8 if present")
    shared.add_argument("--threads", type=int, default=1, help="0: all cores (default: 1)")
    commands.add_parser("info", parents=[shared], help="classes, exits and operating points")
    profile = commands.add_parser(
        "profile", parents=[shared], help="measure this device and keep the costs beside the model"
    )
    profile.add_argument("--rounds", type=int, default=200)
    predict = commands.add_parser("predict", parents=[shared], help="answer images")
    predict.add_argument(
        "images", type=Path, nargs="+", help="pictures (with Pillow) or .npy files"
    )
    for name, words in {
        "--mean-latency-ms": "the mean over many images",
        "--deadline-ms": "for every image: leaves exits out that are too late",
        "--min-accuracy": "promised, such as 0.97",
        "--max-degradation": "promised, such as 0.03",
    }.items():
        predict.add_argument(name, type=float, help=words)
    predict.add_argument("--json", action="store_true", help="one JSON line per image")
    rival = commands.add_parser(
        "benchmark", parents=[shared], help="exits, stream and batches timed against each other"
    )
    rival.add_argument("--rounds", type=int, default=200)
    return parser


def _info(classifier: Classifier) -> None:
    policy, bundle = classifier.policy, classifier.bundle
    height, width, channels = classifier.image_shape
    print(f"model      {bundle.model}, precision {bundle.precision or 'unknown'}")
    print(f"segments   {bundle.segments or 'none: no stream, batches image by image'}")
    print(f"image      uint8 [{height}, {width}, {channels}]")
    print(f"classes    {len(classifier.classes)}: {', '.join(classifier.classes)}")
    print(f"score      {policy.score}, promises from {policy.samples} calibration images")
    if classifier.measured is None:
        print("costs      not measured here yet; run the profile command")
    else:
        _print_costs(classifier.measured)
    print("\noperating points: cost in shares of the plain network, promises at most")
    wide = max(map(len, policy.named))
    print(f"{'name':{wide}} {'cost':>7} {'accuracy':>9} {'max_degradation':>9} {'max_error':>9}")
    cap = len(policy.macs) - 1
    for label, point in policy.named.items():
        bounds = [
            point.promised(kind, policy.delta, cap) for kind in ("max_degradation", "max_error")
        ]
        promises = [f"{bound:9.4f}" if math.isfinite(bound) else f"{'-':>9}" for bound in bounds]
        cost = point.expected_cost(policy.cost_shares)
        print(f"{label:{wide}} {cost:7.3f} {point.accuracy:9.4f} {' '.join(promises)}")


def _print_profile(classifier: Classifier, measured: Profile) -> None:
    _print_costs(measured)
    print(f"rounds     {measured.rounds}, {classifier.threads or 'all'} threads")


def _print_costs(measured: Profile) -> None:
    print(f"costs      {'':8}{'median':>10} {'p95':>10}  milliseconds on this device")
    for exit, (median, p95) in enumerate(zip(measured.median_ms, measured.p95_ms, strict=True)):
        print(f"           exit {exit:<3}{median:10.3f} {p95:10.3f}")


def _predict(classifier: Classifier, asked: argparse.Namespace) -> None:
    for path in asked.images:
        answer = classifier.predict(
            read_image(path, classifier.image_shape, classifier.bits),
            asked.mean_latency_ms,
            asked.deadline_ms,
            asked.min_accuracy,
            asked.max_degradation,
        )
        sure = float(answer.probabilities[answer.label])
        left = "the vote" if answer.exit == len(classifier.policy.macs) else f"exit {answer.exit}"
        point = answer.point.name if answer.point else ""
        if asked.json:
            row = {"image": str(path), "label": answer.label, "class": answer.class_name}
            row |= {"probability": sure, "exit": answer.exit, "point": point}
            print(json.dumps({**row, "latency_ms": answer.latency_ms}))
        else:
            print(
                f"{path}: {answer.class_name} ({100 * sure:.1f} %) from {left} in "
                f"{answer.latency_ms:.2f} ms at {point}"
            )


def _benchmark(classifier: Classifier, rounds: int) -> None:
    found = benchmark(classifier, rounds)
    print(f"{'milliseconds':16} {'min':>9} {'median':>9} {'p95':>9}")
    for name, row in found.items():
        print(f"{name:16} {row['min']:9.3f} {row['median']:9.3f} {row['p95']:9.3f}")
    result: dict[str, object] = {"milliseconds": found}
    if "stream" in found:
        full = found[f"exit_{len(classifier.policy.macs) - 1}"]["median"]
        result["stream_over_full_path"] = found["stream"]["median"] / full
        print(f"the whole stream takes {found['stream']['median'] / full:.3f} of the full path")
    print(json.dumps(result))

"""The command line: what a model is, what it costs here, what it answers.

python -m edgeke.device {info,profile,predict,benchmark} PATH
"""

import argparse
import io
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeke.device.benchmark import benchmark
from edgeke.device.blocks import BlockProfile
from edgeke.device.bundle import PRECISIONS
from edgeke.device.classifier import Classifier
from edgeke.device.decode import BITS, read_image
from edgeke.device.measure import run_fresh
from edgeke.device.profile import Profile
from edgeke.errors import InputError, escaped, report


def main(arguments: Sequence[str]) -> int:
    """Run a command. Returns 0, or 1 with each error in one line on standard error."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names that the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        state = getattr(options, "shift_state", None)
        classifier = Classifier(options.path, options.precision, options.threads, shift_state=state)
        if options.command == "info":
            _info(classifier)
        elif options.command == "profile":
            _profile(classifier, options)
        elif options.command == "predict":
            with classifier:
                return _predict(classifier, options)
        else:
            _benchmark(classifier, options.rounds)
    except InputError as error:
        return report(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
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
    mode = profile.add_mutually_exclusive_group()
    mode.add_argument("--backbone", action="store_true", help="blocks and the main exit alone")
    mode.add_argument("--exit", type=int, help="the way to this exit alone (default: all exits)")
    predict = commands.add_parser("predict", parents=[shared], help="answer images")
    predict.add_argument(
        "images", type=Path, nargs="+", help="pictures (with Pillow) or .npy files"
    )
    for name, words in {
        "--mean-latency-ms": "the mean over many images",
        "--deadline-ms": "for every image: leaves exits out that are too late",
        "--min-accuracy": "promised, such as 0.97",
        "--max-degradation": "promised, such as 0.03",
        "--delta": "the risk that a promise fails, such as 0.1",
    }.items():
        predict.add_argument(name, type=float, help=words)
    for name, words in {
        "--max-miss": "promised share of a class that only the best exit finds",
        "--min-recall": "promised share of a class that is answered as that class",
    }.items():
        predict.add_argument(name, metavar="CLASS=SHARE", help=f"{words}, such as crack=0.99")
    words = "promised among the images that an exit is sure of; others come back as unsure"
    predict.add_argument("--max-sure-error", type=float, help=words)
    words = "a file: whether images still come as in calibration, over many calls"
    predict.add_argument("--shift-state", type=Path, help=words)
    predict.add_argument("--json", action="store_true", help="one JSON line per image")
    timed = commands.add_parser(
        "benchmark", parents=[shared], help="exits, stream and batches timed against each other"
    )
    timed.add_argument("--rounds", type=int, default=200)
    return parser


_FITS = {
    "crop": "scaled to cover it, cropped at the centre",
    "pad": "scaled to fit inside, black around",
    "stretch": "both sides scaled",
    "exact": "refused",
}


def _say(line: str) -> None:
    """Print a line that has names of the model or of files in it."""
    print(escaped(line))


def _info(classifier: Classifier) -> None:
    policy, bundle = classifier.policy, classifier.bundle
    height, width, channels = classifier.image_shape
    _say(f"model      {bundle.model}, precision {bundle.precision or 'unknown'}")
    _say(f"segments   {bundle.segments or 'none: no stream, batches image by image'}")
    colour = "grey" if channels == 1 else "RGB"
    print(f"image      uint8 {colour}, {height} x {width} (height x width), [H, W, {channels}]")
    print("           0 to 255, normalised in the model; arrays must have this size")
    print(f"pictures   of another size: {_FITS[classifier.fit]}")
    if classifier.bits != BITS:
        print(f"pictures   of 16 bits per pixel have {classifier.bits} significant bits")
    _say(f"classes    {len(classifier.classes)}: {', '.join(classifier.classes)}")
    print(f"score      {policy.score}, promises from {policy.samples} calibration images")
    if classifier.shift is None:
        print("shift      not noticed: this file has no histogram; calibrate again")
    if classifier.measured is None:
        print("costs      not measured here yet; run the profile command")
    else:
        _print_costs(classifier.measured)
    unmet = ", ".join(result.name for result in policy.unmet)
    _say(f"default    {policy.default}" + (f"; {unmet} cannot be promised" if unmet else ""))
    print(f"\noperating points: cost in shares of the plain network, promises at {policy.delta:g}")
    wide, cap = max(map(len, policy.named)), len(policy.macs) - 1
    print(f"{'name':{wide}} {'cost':>7} {'accuracy':>9} {'degradation <=':>15} {'error <=':>9}")
    for label, point in policy.named.items():
        degradation = point.promised("max_degradation", policy.delta, cap)
        error = point.promised("max_error", policy.delta, cap)
        promises = " ".join(
            f"{bound:{width}.4f}" if math.isfinite(bound) else f"{'-':>{width}}"
            for bound, width in ((degradation, 15), (error, 9))
        )
        cost = point.expected_cost(policy.cost_shares)
        _say(f"{label:{wide}} {cost:7.3f} {point.accuracy:9.4f} {promises}")
        for each in point.inspections:
            if each.cap in (None, cap):
                bound = point.promised(each.risk, policy.delta, cap, each.class_name)
                about = f" of {each.class_name}" if each.class_name else ""
                words = f"{each.risk}{about}: {each.bad} of {each.images} bad, promised {bound:.4f}"
                _say(f"{'':{wide}} {words}")
        if point.unsure:
            print(f"{'':{wide}} automation {point.automation:.4f}: the rest comes back as unsure")


def _profile(classifier: Classifier, options: argparse.Namespace) -> None:
    """Costs of the exits, which are kept; then of blocks, where the model lists them."""
    exits, threads = len(classifier.policy.macs), classifier.threads
    if options.exit is not None and options.exit not in range(exits):
        raise InputError(f"exit = {options.exit} must be 0 to {exits - 1}")
    one = exits - 1 if options.backbone else options.exit
    blocks = None
    if classifier.lists_blocks or one is not None:
        blocks = classifier.profile_blocks(options.rounds)
    measured = classifier.profile(options.rounds)
    _print_costs(measured)
    print(f"rounds     {measured.rounds}, {threads or 'all'} threads")
    if blocks is None:
        print("blocks     not listed in this file; export the model again for their costs")
    else:
        _print_blocks(blocks, one)
    peak = run_fresh(classifier.bundle.model, threads)["peak_memory_mib"]
    print(f"memory     {peak:.1f} MiB at most in a fresh process, Python and ONNX Runtime included")


def _print_blocks(profile: BlockProfile, exit: int | None) -> None:
    rows = profile.cascade() if exit is None else profile.path(exit)
    wide = max(len(row.name) for row in rows)
    print(
        f"\n{'':{wide}} {'median':>9} {'p95':>9} {'sum of ms':>9} {'MACs':>13} {'parameters':>11} "
        f"{'bytes fp32':>11} {'int8':>9}"
    )
    for row in rows:
        _say(
            f"{row.name:{wide}} {row.median_ms:9.3f} {row.p95_ms:9.3f} {row.cumulative_ms:9.3f} "
            f"{row.macs:13,} {row.parameters:11,} {row.output_bytes_fp32:11,} "
            f"{row.output_bytes_int8:9,}"
        )
    print(f"kernels    {profile.kernels}: add up to {profile.share:.3f} of the whole cascade")
    own, rounds = 1e3 * profile.overhead_ms, len(profile.whole_ms)
    print(f"           less {own:.1f} us of the profiler's own in each; {rounds} rounds")


def _print_costs(measured: Profile) -> None:
    print(f"costs      {'':8}{'median':>10} {'p95':>10}  milliseconds on this device")
    for exit, (median, p95) in enumerate(zip(measured.median_ms, measured.p95_ms, strict=True)):
        print(f"           exit {exit:<3}{median:10.3f} {p95:10.3f}")


_VOID = "; nothing is promised: images do not come as in calibration (alarm of shift)"


def _predict(classifier: Classifier, options: argparse.Namespace) -> int:
    """Answer every image that can be read; returns 1 when one could not."""
    status = 0
    for path in options.images:
        try:
            image = read_image(path, classifier.image_shape, classifier.bits, classifier.fit)
        except InputError as error:
            status = report(error)
            continue
        answer = classifier.predict(
            image,
            options.mean_latency_ms,
            options.deadline_ms,
            options.min_accuracy,
            options.max_degradation,
            options.delta,
            options.max_miss,
            options.min_recall,
            options.max_sure_error,
        )
        probability = float(answer.probabilities.max())
        left = "the vote" if answer.exit == len(classifier.policy.macs) else f"exit {answer.exit}"
        point = answer.point.name if answer.point else ""
        if answer.unsure and answer.point:
            left = f"no exit ({100 * answer.point.automation:.1f} % are sure)"
        if options.json:
            row: dict[str, object] = {
                "image": str(path),
                "label": answer.label,
                "class": answer.class_name,
            }
            row |= {"probability": probability, "exit": answer.exit, "point": point}
            row["promised"] = answer.promised
            if answer.point and answer.point.unsure:
                row |= {"unsure": answer.unsure, "automation": answer.point.automation}
            print(json.dumps({**row, "latency_ms": answer.latency_ms}))
        else:
            _say(
                f"{path}: {answer.class_name} ({100 * probability:.1f} %) from {left} in "
                f"{answer.latency_ms:.2f} ms at {point}{'' if answer.promised else _VOID}"
            )
    return status


def _benchmark(classifier: Classifier, rounds: int) -> None:
    measured = benchmark(classifier, rounds)
    print(f"{'milliseconds':16} {'min':>9} {'median':>9} {'p95':>9}")
    for name, row in measured.items():
        print(f"{name:16} {row['min']:9.3f} {row['median']:9.3f} {row['p95']:9.3f}")
    result: dict[str, object] = {"milliseconds": measured}
    if "stream" in measured:
        full = measured[f"exit_{len(classifier.policy.macs) - 1}"]["median"]
        result["stream_over_full_path"] = measured["stream"]["median"] / full
        print(f"the whole stream takes {measured['stream']['median'] / full:.3f} of the full path")
    print(json.dumps(result))

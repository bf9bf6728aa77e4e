"""The headline in one JSON, and the model card of the files that are brought back."""

from collections.abc import Mapping
from typing import Any

__all__ = ["HEADLINE", "compared_point", "model_card", "summarise"]

HEADLINE = (  # what the project is measured by; null where it was not measured
    "teacher",
    "exits",
    "vote",
    "exit_macs_share",
    "plain_resnet18",
    "speedup_over_fastest_static_int8",
    "speedup_over_fastest_static_fp32",
)

_STATIC = ("main", "teacher")
_MEASURE = {"max_cost": "cost_share", "min_accuracy": "accuracy", "max_loss": "loss"}


def summarise(
    results: Mapping[str, Any],
    measured: Mapping[str, Mapping[str, float]],
    device: Mapping[str, Any],
    published: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """summary.json's content from a campaign's results and the metrics of the later stages.

    Accuracies are PyTorch's on test. The speed-ups compare mean latencies of one run on one device:
    the fastest int8 operating point that on the calibration split is at least as accurate as the
    plain ResNet18, so that nothing is chosen on test, against the fastest static network of each
    precision. `within_one_point` is the same for the fastest point at most 1 point below our own
    full network. `published` is the paper's layout as published. Null where nothing was measured,
    or no point is that accurate.
    """
    steps, evaluated, exported = results["steps"], measured["evaluate"], measured["export"]
    network = steps["branchynet"]
    exits = len(network["test"]["exits"])
    latency = {
        precision: min(evaluated[f"test/{prefix}{name}/latency_ms_mean"] for name in _STATIC)
        for precision, prefix in (("int8", "int8/"), ("fp32", ""))
    }
    rival = steps.get("plain_resnet18")
    own = measured["calibrate"].get("calibration/int8/full/accuracy")
    best = compared_point(measured, rival and rival["calibration_accuracy"])
    near = compared_point(measured, None if own is None else own - 0.01)
    speed = _speed(best, evaluated, latency)
    first = evaluated["test/int8/exit_0/latency_ms_mean"]
    return {
        "teacher": _single(steps.get("teacher")),
        "exits": network["test"]["exits"],
        "vote": network["test"]["vote"],
        "exits_int8": [evaluated[f"test/int8/exit_{e}/accuracy"] for e in range(exits)],
        "exit_macs_share": [exported[f"cost/exit_{e}/macs_share"] for e in range(exits)],
        "plain_resnet18": _single(steps.get("plain_resnet18")),
        **speed,
        "within_one_point": _speed(near, evaluated, latency),
        "published_layout": published,
        "promises": _promises(measured),
        "bound_static_int8_over_exit_0": latency["int8"] / first,
        "latency_ms_mean_of_fastest_static": latency,
        "seeds": sorted({step["seed"] for step in steps.values()}),
        "steps": {name: _row(step) for name, step in steps.items()},
        "left_out": results["left_out"],
        "width": network["architecture"]["width"],
        "profile": results["settings"]["profile"],
        "limit": results["settings"]["limit"],
        "minutes": results["minutes"],
        "trained_on": results["device"],
        "measured_on": device,
        "commit_of_training": results["commit"],
    }


def compared_point(
    measured: Mapping[str, Mapping[str, float]], accuracy: float | None
) -> str | None:
    """The fastest named int8 point that accurate on the calibration split; None without one."""
    if accuracy is None:
        return None
    calibrated, evaluated = measured["calibrate"], measured["evaluate"]
    start, end = "calibration/", "/accuracy"
    names = [key[len(start) : -len(end)] for key in calibrated if key.endswith(end)]
    names = [name for name in names if name.startswith("int8/") and name.count("/") == 1]
    good = [name for name in names if calibrated.get(f"{start}{name}{end}", 0.0) >= accuracy]
    timed = [name for name in good if f"test/{name}/latency_ms_mean" in evaluated]
    return min(timed, key=lambda of: evaluated[f"test/{of}/latency_ms_mean"], default=None)


def _speed(
    point: str | None, evaluated: Mapping[str, float], static: Mapping[str, float]
) -> dict[str, Any]:
    found: dict[str, Any] = {f"speedup_over_fastest_static_{p}": None for p in static}
    if point is not None:
        own = evaluated[f"test/{point}/latency_ms_mean"]
        found = {f"speedup_over_fastest_static_{p}": of / own for p, of in static.items()}
        keys = ("accuracy", "latency_ms_mean", "cost_share")
        found["operating_point"] = {"name": point} | {
            key: evaluated[f"test/{point}/{key}"] for key in keys
        }
    return found


def _promises(measured: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float | bool]]:
    """Of every certified requirement: what was promised, what test gave, whether it was kept."""
    calibrated, evaluated = measured["calibrate"], measured["evaluate"]
    found: dict[str, dict[str, float | bool]] = {}
    for key, value in evaluated.items():
        if not key.endswith("/kept"):
            continue
        name = key.removeprefix("test/").removesuffix("/kept")
        what = next(of for kind, of in _MEASURE.items() if name.split("/")[-1].startswith(kind))
        found[name] = {
            "promised": calibrated[f"calibration/{name}/promised"],
            f"test_{what}": evaluated[f"test/{name}/{what}"],
            "kept": value == 1.0,
        }
    return found


def _single(step: Mapping[str, Any] | None) -> float | None:
    return None if step is None else float(step["test"]["exits"][-1])


def _row(step: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("epochs_asked", "epochs_run", "phases", "seconds", "images_per_second", "seed", "macs")
    return {
        "exits": step["test"]["exits"],
        "vote": step["test"]["vote"],
        "validation": step["validation"]["exits"],
    } | {key: step[key] for key in kept}


def model_card(summary: Mapping[str, Any]) -> str:
    """A README for `models/pretrained/`, every number from the summary."""

    def percent(share: float | None) -> str:
        return "not measured" if share is None else f"{100 * share:.2f} %"

    network = summary["steps"]["branchynet"]
    exits = zip(summary["exits"], summary["exits_int8"], summary["exit_macs_share"], strict=True)
    rows = "\n".join(
        f"| exit {number} | {percent(fp32)} | {percent(int8)} | {percent(share)} |"
        for number, (fp32, int8, share) in enumerate(exits)
    )
    epochs = ", ".join(
        f"{name} {summary['steps'][name]['epochs_run']} of {summary['steps'][name]['epochs_asked']}"
        for name in ("teacher", "main", "branchynet")
    )
    file = "summary" if summary["profile"] == "cifar100" else summary["profile"]
    return f"""# CIFAR-100, ResNet18 of width {summary["width"]} with four exits, int8

`edgeke.int8.onnx` answers 32 x 32 colour images in one of the 100 classes of CIFAR-100, early where
it is sure; `policy.int8.json` holds its operating points. Both are written by
`scripts/cifar100 --import`, never by hand. To try it on a picture of yours:

    python -m edgeke.device predict models/pretrained PICTURE

- **Data**: CIFAR-100 (Krizhevsky 2009), 45,000 images to train, 1,000 to validate, 4,000 to
  certify the promises, the 10,000 test images for the numbers below alone.
- **Recipe**: profile `{summary["profile"]}`, width {summary["width"]}, seed {network["seed"]}; a
  ResNet34 teaches the main branch, then all exits learn together (order `mixed`). Epochs that were
  run, of those that the profile asks for: {epochs}.
- **Trained on** {summary["trained_on"]}, commit {summary["commit_of_training"]}; measured on
  {summary["date"]}.

| | test accuracy, fp32 | test accuracy, int8 | MACs, of the plain ResNet18's |
| --- | --- | --- | --- |
{rows}

Vote of all exits: {percent(summary["vote"])}. Teacher: {percent(summary["teacher"])}. Plain
ResNet18, as long under the same teacher: {percent(summary["plain_resnet18"])}.

**Limits**: photographs of single objects at 32 x 32 pixels; nothing else was tested. Confidences
and promises hold for images like CIFAR-100's. Latencies are in `results/cifar100/{file}.json`.
"""

"""CIFAR-100 against its own plain network.  python -m benchmarks.cifar100 --folder DIR --key NAME

DIR is a project whose stages up to `calibrate` have run on CIFAR-100 (docs/results.md has the
parameters). On all test images, one thread, interleaved: int8 operating points chosen on
calibration (the cheapest that is at least as accurate there as the plain network, or 1 or 4.84
points less), each exit, and the plain network as fp32 and int8 in ONNX Runtime and OpenVINO. Under
caps of 25, 50 and 75 % of the plain network's time the most accurate point on validation whose mean
cost at the measured times keeps the cap. Writes results/cifar100/summary.json under NAME (`paper`:
at its top level); the last line is JSON.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.inference import has_openvino
from edgeke.data.dataset import channels_last, load_dataset
from edgeke.device.bundle import read_metadata
from edgeke.device.policy import OperatingPoint, Policy, force_exit
from edgeke.device.session import open_session
from edgeke.device.timing import time_interleaved
from edgeke.files import write_json
from edgeke.graph.runner import segment_logits

SUMMARY = Path(__file__).resolve().parent.parent / "results" / "cifar100" / "summary.json"
LOSSES = (0.0, 1.0, 4.84)  # points of accuracy; the last is the paper's
CAPS = (0.25, 0.5, 0.75)


def accuracy(file: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """Percent of right answers of a static network."""
    return 100 * float((segment_logits([file], images, 0)[0].argmax(-1) == labels).mean())


def plain_calls(models: Path, image: NDArray[np.uint8]) -> dict[str, Any]:
    """The plain network in every runtime and precision; each takes an image `[1, H, W, C]`."""
    calls: dict[str, Any] = {}
    for precision, suffix in (("fp32", ""), ("int8", ".int8")):
        file = models / "static" / f"plain{suffix}.onnx"
        session = open_session(file, 1)
        calls[f"ONNX Runtime {precision}"] = lambda image, s=session: s.run(None, {"image": image})
        if has_openvino():
            import openvino

            core = openvino.Core()
            model = core.read_model(file)
            model.reshape({"image": list(image.shape)})
            settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
            settings["INFERENCE_PRECISION_HINT"] = "f32"
            request = core.compile_model(model, "CPU", settings).create_infer_request()
            calls[f"OpenVINO {precision}"] = lambda image, r=request: r.infer(
                {"image": image}, share_inputs=True
            )
    return calls


def measure(folder: Path) -> dict[str, Any]:
    """All keys of the summary."""
    models = folder / "models"
    dataset = load_dataset(folder / "data" / "dataset.safetensors", ("calibration", "test"))
    images = {name: channels_last(dataset[name].images) for name in ("calibration", "test")}
    labels = dataset["test"].labels
    session = open_session(models / "edgeke.int8.onnx", 1)
    policy = read_metadata(session, "edgeke.int8.onnx").policy
    exits = len(policy.macs)
    plain = accuracy(
        models / "static" / "plain.int8.onnx", images["calibration"], dataset["calibration"].labels
    )
    chosen = {f"{loss:g}": cheapest(policy, plain - loss) for loss in LOSSES}

    def run(point: OperatingPoint, image: NDArray[np.uint8]) -> Any:
        inputs = {"image": image, "bias": np.zeros(len(dataset.classes), np.float32)}
        inputs |= {
            "thresholds": np.float32(point.thresholds),
            "votes": np.float32(point.votes),
        }
        return session.run(None, inputs)

    forced = {
        f"exit {exit}" if exit < exits else "vote": OperatingPoint(
            **{**vars(policy.points[0]), "thresholds": force_exit(exit, exits), "name": f"{exit}"}
        )
        for exit in range(exits + 1)
    }
    first = images["test"][:1]
    calls = plain_calls(models, first)
    calls |= {name: partial(run, point) for name, point in forced.items()}
    some = timed(calls, images["test"][:200])
    costs = [some[f"exit {exit}"] for exit in range(exits)]
    fastest = min(some[name] for name in some if name.endswith("int8"))
    for cap in CAPS:
        enough = [p for p in policy.points if p.expected_cost(costs) <= cap * fastest]
        if enough:
            chosen[f"cap {cap:g}"] = max(enough, key=lambda point: point.validation_accuracy)
    calls |= {f"point {name}": partial(run, point) for name, point in chosen.items() if point}
    ms = timed(calls, images["test"])
    right = {
        name: 100 * float(np.mean([int(call(images["test"][n : n + 1])[0].argmax()) == labels[n]
                                   for n in range(len(labels))]))
        for name, call in calls.items() if name.startswith(("exit", "vote", "point"))
    }  # fmt: skip
    static = {
        name: accuracy(models / "static" / f"{name}.int8.onnx", images["test"], labels)
        for name in ("teacher", "plain")
    }

    def speedup(loss: float, precision: str) -> float | None:
        name = f"point {loss:g}"
        against = min(value for key, value in ms.items() if key.endswith(precision))
        return against / ms[name] if name in ms else None

    return {
        **static,
        "exits": [right[f"exit {exit}"] for exit in range(exits)],
        "vote": right["vote"],
        "exit_macs_share": list(policy.cost_shares),
        **{
            f"speedup_over_fastest_static_{precision}": speedup(0, precision)
            for precision in ("int8", "fp32")
        },
        **{f"speedup_at_{loss:g}_points": speedup(loss, "int8") for loss in LOSSES[1:]},
        "accuracy_at_points": {k: right[f"point {k}"] for k, p in chosen.items() if p},
        "accuracy_lost_under_caps": {
            f"{cap:g}": static["plain"] - right[f"point cap {cap:g}"]
            if f"cap {cap:g}" in chosen
            else None
            for cap in CAPS
        },
        "ms_mean": ms,
    }


def cheapest(policy: Policy, percent: float) -> OperatingPoint | None:
    """The point of least cost that answers so many right on calibration."""
    enough = [point for point in policy.points if 100 * point.accuracy >= percent]
    return min(enough, key=lambda p: p.expected_cost(policy.macs), default=None)


def timed(calls: dict[str, Any], images: NDArray[np.uint8]) -> dict[str, float]:
    """Mean milliseconds of every call over all images."""
    image = images[:1]

    def choose(number: int) -> None:
        nonlocal image
        image = images[number : number + 1]

    bound = {name: lambda call=call: call(image) for name, call in calls.items()}
    times = time_interleaved(bound, len(images), float("inf"), choose)
    return {name: float(np.mean(values)) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--key", default="pretrained")
    chosen = parser.parse_args()
    result = measure(chosen.folder)
    summary = json.loads(SUMMARY.read_text())
    write_json(SUMMARY, summary | (result if chosen.key == "paper" else {chosen.key: result}))
    print(json.dumps(result))


if __name__ == "__main__":
    main()

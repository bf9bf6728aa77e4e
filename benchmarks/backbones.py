"""Early exits on a pretrained backbone, and without.  python -m benchmarks.backbones

The whole pipeline on steel (profile `steel`; pictures and weights of ../shared) in a temporary
folder, and then, interleaved on one thread over all test images: operating points in int8, the
plain network in int8 and fp32, and every exit alone in int8 (a truncated network). A point is the
cheapest whose accuracy on calibration is at most 0, 1 or 3.6 points below the plain int8
network's, or (`best`) none below the most accurate exit alone; the truncated baseline is the
fastest exit alone at most 0.2 points below the point (or the most accurate one, where none is), on
calibration, too. `--parts` adds image
sizes (`sizes`), seeds 1 and 2 (`seeds`), kinds of heads at the same cut points (`heads`), 20
pictures a class, pretrained and from scratch (`transfer`), and four backbones on 20 classes of
CIFAR-100 (`cifar`; `--networks` picks some): each trained from scratch, then exits on its frozen
trunk. Writes results/backbones/summary.json after every network: what was not run keeps its value,
or is null. The last line is JSON.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from ruamel.yaml import YAML
from tqdm import tqdm

from edgeke import params
from edgeke.data.dataset import channels_last, load_dataset
from edgeke.device.bundle import read_metadata
from edgeke.device.session import open_session
from edgeke.device.timing import time_interleaved
from edgeke.files import write_json
from edgeke.graph.runner import segment_logits
from edgeke.policy.intervals import share_interval

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
SUMMARY = ROOT / "results" / "backbones" / "summary.json"
STAGES = ("download", "train_teacher", "distill", "train_branchynet", "export", "calibrate")
LOSSES = (0.0, 1.0, 3.6)
KEYS = (
    "steel", "speedup_at_1_point", "int8_drop_points", "sizes", "seeds", "heads", "cifar",
    "transfer_gain_points",
)  # fmt: skip
HEADS = ("pooled", "linear", "separable", "attention")
NETWORKS: dict[str, dict[str, Any]] = {  # on 32x32
    "mobilenetv4_conv_small": {"network": "timm/mobilenetv4_conv_small", "stem": "small"},
    "resnet50": {"network": "timm/resnet50"},
    "vgg11_bn": {"network": "timm/vgg11_bn"},
    "resnet18": {"network": "resnet18", "width": 16},
}


def steel(size: int = 128, seed: int = 0, **changes: Any) -> dict[str, Any]:
    """The content of params.yaml for steel; `changes` are of its profile's data or student."""
    content = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    content["profile"], content["data"]["path"] = "steel", str(SHARED / "data" / "neu")
    content["seed"] = seed
    content["branchynet"] |= changes.get("branchynet", {})
    profile = content["profiles"]["steel"]
    profile["data"] |= {"image_size": size, **changes.get("data", {})}
    weights = str(SHARED / "weights" / "tf_efficientnet_lite0.safetensors")
    for name in ("teacher", "student"):
        profile[name] |= {"weights": weights, **changes.get("network", {})}
    return dict(content)


def cifar(folder: Path, network: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The content of params.yaml for 20 classes: the teacher from scratch, its exits behind it."""
    content = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    content["profile"], content["data"]["path"] = "image_folder", str(folder)
    content["branchynet"]["layout"] = [0.1, 0.25, 0.5, 0.75]
    content["kd"]["distance"] = "none"
    profile = content["profiles"]["image_folder"]
    sizes = {
        "image_size": 32,
        "fit": "exact",
        "validation": 1000,
        "calibration": 2000,
        "test": None,
    }
    profile["data"] |= sizes
    profile["augmentation"] |= {"crop_padding": 4, "flip": True}
    profile["teacher"] = network
    weights = {"weights": "models/teacher.safetensors", "trunk": "frozen"}
    profile["student"] = network | weights
    profile["recipes"]["train_teacher"] = {"epochs": epochs, "learning_rate": 0.05}
    return dict(content)


def write_cifar(folder: Path, classes: int = 20) -> None:
    """The first classes of CIFAR-100 as an image folder, `train/` and `test/`."""
    for split in ("train", "test"):
        for strip in sorted((SHARED / "data" / "cifar100" / split).glob("*.webp"))[:classes]:
            target = folder / split / strip.stem
            target.mkdir(parents=True)
            images = np.asarray(Image.open(strip)).reshape(-1, 32, 32, 3)
            for number, image in enumerate(images):
                Image.fromarray(image).save(target / f"{number:03d}.png", compress_level=1)


def run(content: dict[str, Any], stages: tuple[str, ...] = STAGES) -> dict[str, dict[str, float]]:
    """Run stages in the current folder; their metrics."""
    ignored = dict.fromkeys(("epoch", "headline", "model"), lambda *_: None)
    log = SimpleNamespace(**ignored, cleanups=[])
    parsed, metrics = params.parse(content), {}
    for stage in tqdm(stages, desc="stages"):
        metrics[stage] = import_module(f"stages.{stage}").run(parsed, log)
        write_json(Path("results") / stage / "metrics.json", metrics[stage])
    return metrics


def compare() -> dict[str, Any]:
    """Points and static networks of the models in this folder, on calibration and on test."""
    models = Path("models")
    dataset = load_dataset(Path("data/dataset.safetensors"), ("calibration", "test"))
    calibration, test = (channels_last(dataset[name].images) for name in ("calibration", "test"))
    labels = dataset["test"].labels
    cascade = open_session(models / "edgeke.int8.onnx", 1)
    policy = read_metadata(cascade, "edgeke.int8.onnx").policy
    static = {
        file.name.removesuffix(".onnx"): file
        for file in sorted((models / "static").glob("*.int8.onnx"))
        if file.name.startswith(("plain", "branch"))
    } | {"plain": models / "static" / "plain.onnx"}
    on_calibration, right = {}, {}
    for name, file in static.items():
        answers = segment_logits([file], calibration, 0)[0].argmax(-1)
        on_calibration[name] = 100 * float((answers == dataset["calibration"].labels).mean())
        right[name] = segment_logits([file], test, 0)[0].argmax(-1) == labels

    least = {f"{loss:g}": on_calibration["plain.int8"] - loss for loss in LOSSES}
    least["best"] = max(v for name, v in on_calibration.items() if name.endswith("int8"))
    reached = 100 * max(point.accuracy for point in policy.points)
    points = {}
    for name, percent in least.items():
        enough = [p for p in policy.points if 100 * p.accuracy >= min(percent, reached)]
        points[name] = min(enough, key=lambda point: point.expected_cost(policy.macs))
    image = test[:1]
    calls: dict[str, Any] = {}
    for name, file in static.items():
        session = open_session(file, 1)
        calls[name] = lambda session=session: session.run(None, {"image": image})
    for name, point in points.items():
        inputs = {
            key: np.float32(value)
            for key, value in (("thresholds", point.thresholds), ("votes", point.votes))
        }
        inputs["bias"] = np.zeros(len(dataset.classes), np.float32)
        answer = partial(_answer, cascade, inputs)
        right[f"point_{name}"] = np.asarray(
            [answer(test[n : n + 1]) == labels[n] for n in range(len(test))]
        )
        calls[f"point_{name}"] = lambda answer=answer: answer(image)

    def choose(number: int) -> None:
        nonlocal image
        image = test[number : number + 1]

    times = time_interleaved(calls, len(test), float("inf"), choose)
    ms = {name: float(np.mean(values)) for name, values in times.items()}
    truncated = {}
    for name, point in points.items():
        enough_alone = min(100 * point.accuracy - 0.2, least["best"])
        single = [n for n in static if n.endswith("int8") and on_calibration[n] >= enough_alone]
        truncated[name] = min(single, key=ms.__getitem__)
    percent = {name: 100 * float(answers.mean()) for name, answers in right.items()}
    return {
        "accuracy_full": percent["plain.int8"],
        "accuracy_point": percent["point_0"],
        "accuracy_point_interval": [
            100 * end for end in share_interval(int(right["point_0"].sum()), len(labels))
        ],
        "speedup_over_static_int8": ms["plain.int8"] / ms["point_0"],
        "speedup_over_best_truncated_int8": ms[truncated["0"]] / ms["point_0"],
        "best_truncated": truncated["0"],
        "speedup_over_static_fp32": ms["plain"] / ms["point_0"],
        "speedup_at_points": {n: ms["plain.int8"] / ms[f"point_{n}"] for n in points},
        "speedup_of_best_over_truncated": ms[truncated["best"]] / ms["point_best"],
        "truncated_for_best": truncated["best"],
        "ms_mean": ms,
        "test_accuracy": percent,
        "calibration_accuracy": on_calibration,
    }


def _answer(session: Any, inputs: dict[str, Any], image: Any) -> int:
    return int(session.run(None, {"image": image, **inputs})[0].argmax())


def alone(content: dict[str, Any]) -> dict[str, Any]:
    """The whole pipeline in an empty folder, then `compare`."""
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        started = time.perf_counter()
        metrics = run(content)
        minutes = (time.perf_counter() - started) / 60
        return compare() | {"minutes": minutes, "int8_drop_points": lost_in_int8(metrics)}


def lost_in_int8(metrics: dict[str, dict[str, float]]) -> float:
    """Points of validation accuracy that int8 loses at its worst exit."""
    return 100 * max(v for k, v in metrics["export"].items() if k.endswith("/int8_accuracy_lost"))


def measure(part: str, networks: list[str], epochs: int) -> Iterator[dict[str, Any]]:
    """What a part adds to the summary, a step at a time."""
    if part == "transfer":
        few = {"data": {"validation": 600, "calibration": 600, "test": 450}}  # 20 a class are left
        scratch = {"network": {"weights": None, "trunk": "finetuned"}}
        stages, key = STAGES[:2], "validation/accuracy"
        pretrained = run(steel(**few), stages)["train_teacher"][key]
        fresh = run(steel(**few, **scratch), stages)["train_teacher"][key]
        yield {"transfer_gain_points": 100 * (pretrained - fresh)}
    elif part == "sizes":
        for size in (64, 96, 128, 224):
            yield {"sizes": {str(size): alone(steel(size))}}
    elif part == "seeds":
        for seed in (1, 2):
            yield {"seeds": {str(seed): alone(steel(seed=seed))}}
    elif part == "heads":
        for kind in HEADS:
            layout = [{"attach": share, "kind": kind} for share in (0.02, 0.1, 0.25, 0.6)]
            yield {"heads": {kind: alone(steel(branchynet={"layout": layout}))}}
    elif part == "cifar":
        pictures = Path.cwd() / "pictures"
        write_cifar(pictures)
        for name in networks:
            result = alone(cifar(pictures, NETWORKS[name], epochs))
            yield {
                "cifar": {name: result},
                "speedup_at_1_point": {name: result["speedup_at_points"]["1"]},
                "int8_drop_points": {name: result["int8_drop_points"]},
            }
    else:
        result, name = alone(steel()), "tf_efficientnet_lite0"
        yield {
            "steel": result,
            "speedup_at_1_point": {name: result["speedup_at_points"]["1"]},
            "int8_drop_points": {name: result["int8_drop_points"]},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = ("steel", "sizes", "seeds", "heads", "transfer", "cifar")
    parser.add_argument("--parts", nargs="+", choices=parts, default=["steel"])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=15, help="of each network in part cifar")
    chosen = parser.parse_args()
    if not (SHARED / "data" / "neu").is_dir():
        raise SystemExit(f"{SHARED / 'data' / 'neu'} is missing: it holds NEU's pictures")
    summary = dict.fromkeys(KEYS) | (json.loads(SUMMARY.read_text()) if SUMMARY.exists() else {})
    for part in chosen.parts:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for step in measure(part, chosen.networks, chosen.epochs):
                for key, value in step.items():
                    known = summary[key]
                    both = isinstance(value, dict) and isinstance(known, dict) and key != "steel"
                    summary[key] = known | value if both else value
                write_json(SUMMARY, summary)
                os.chdir(folder)
            os.chdir(ROOT)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

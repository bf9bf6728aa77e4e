"""Trains getitune's recipes on a project's splits, and prints them beside ours.

getitune gets train, validation and test as the files that they were read from; calibration, from
which ours has its promises, it does not use. Its weights cannot be downloaded where this was
written, so its two recipes train from scratch; `timm_generic` starts from the ImageNet weights of
../shared, as ours does. What was trained is kept in `--work`, and not trained again. Then one
thread answers the test pictures, everything interleaved: of getitune the bare network in OpenVINO,
of ours the whole call of `Classifier` at its default point. Decoding and scaling of pictures are
in neither. Writes results/getitune/summary.json; the last line is JSON.
"""

import argparse
import json
import math
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke import params
from edgeke.data.dataset import channels_last, load_dataset
from edgeke.data.sources import read_source
from edgeke.device.classifier import Classifier
from edgeke.device.timing import time_interleaved
from edgeke.files import read_json, write_json
from edgeke.policy.classes import class_metrics, class_rows
from edgeke.policy.intervals import share_interval

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT.parent / "shared" / "weights" / "tf_efficientnet_lite0.safetensors"
SUMMARY = ROOT / "results" / "getitune" / "summary.json"
SUBSETS = {"train": "TRAINING", "validation": "VALIDATION", "test": "TESTING"}
SCRATCH = {"model.pretrained": False}
RECIPES: dict[str, dict[str, Any]] = {
    "mobilenet_v3_large": SCRATCH,
    "efficientnet_b0": SCRATCH,
    "timm_generic": {  # its rate is not a number: that of efficientnet_b0
        "model.optimizer.init_args.lr": 0.0049,
        "model.optimizer.init_args.weight_decay": 1e-4,
        "model.model_name": "tf_efficientnet_lite0",
        "model.pretrained_weights": str(WEIGHTS),
    },
}
TRAINING = ("train_teacher", "distill", "train_branchynet")
# What a person types once everything is installed. Ours: `dvc exp run` with the profile and the
# folder. Theirs: a program that converts the pictures, `getitune train`, `getitune export`, and a
# program that quantises, for which there is no command.
OURS_TYPED, THEIRS_TYPED = "1 command", "2 commands, 2 programs (30 and 3 lines)"
OWN_SIZE = 224

Row = dict[str, Any]


def pictures(project: Path) -> tuple[dict[str, list[tuple[str, int]]], tuple[str, ...]]:
    """The files and labels of each of getitune's subsets, and the names of the classes.

    A dataset file has pixels and no names, so every picture is read once more and found by them.
    """
    loaded = params.load(project / "params.yaml")
    labelled = read_source(loaded.profile.data, loaded.data)
    files = labelled.listing.files if labelled.listing is not None else labelled.names
    found = {labelled.images[n].tobytes(): str(files[n]) for n in range(len(files))}
    data = load_dataset(project / "data" / "dataset.safetensors", tuple(SUBSETS))
    subsets = {
        subset: [
            (found[image.tobytes()], int(label))
            for image, label in zip(data[name].images, data[name].labels, strict=True)
        ]
        for name, subset in SUBSETS.items()
    }
    return subsets, data.classes


def train(python: Path, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The result of a job in getitune's environment, or of the same job before."""
    before, program = folder / "job.json", Path(__file__).with_name("theirs.py")
    if not (before.exists() and read_json(before) == job):
        for name in ("trained.json", "result.json"):
            (folder / name).unlink(missing_ok=True)
        write_json(before, job)
    if not (folder / "result.json").exists():
        subprocess.run([python, program, before], cwd=folder, check=True)
    return dict(read_json(folder / "result.json"))


def openvino_call(model: str, side: int | None = None) -> Callable[[], Any]:
    """The exported network on one thread; `side`: reshaped to other pictures."""
    import openvino

    core = openvino.Core()
    network = core.read_model(model)
    shape = [1, *(n.get_length() for n in list(network.inputs[0].partial_shape)[1:])]
    if side is not None:
        shape = [1, *(side if n > 4 else n for n in shape[1:])]
    network.reshape(shape)
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    request = core.compile_model(network, "CPU", settings).create_infer_request()
    noise = np.random.default_rng(0).integers(0, 256, shape)
    inputs = [noise.astype(network.inputs[0].element_type.to_dtype())]
    return partial(request.infer, inputs, share_inputs=True)


def size_of(model: Path) -> float:
    """Megabytes, the weights beside OpenVINO's .xml included."""
    files = [model, model.with_suffix(".bin")] if model.suffix == ".xml" else [model]
    return sum(file.stat().st_size for file in files) / 1e6


def quality(answers: Any, labels: NDArray[np.int64], classes: tuple[str, ...]) -> Row:
    """Percent right with its interval, macro-F1, and the recall of the worst class."""
    given = np.asarray(answers, np.int64)
    right = int((given == labels).sum())
    return {
        "accuracy": right / len(labels),
        "interval": share_interval(right, len(labels)),
        **class_metrics(class_rows(given, labels, classes)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, required=True, help="of getitune's environment")
    parser.add_argument("--ours", nargs="+", required=True, help="name=PROJECT, the first's splits")
    parser.add_argument("--work", type=Path, required=True, help="a folder that keeps trainings")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--epochs", type=int, default=90, help="at most; 90 are the recipes' own")
    parser.add_argument("--size", type=int, default=OWN_SIZE, help="of pictures")
    parser.add_argument("--precision", default="32", help="of training: 32, bf16-mixed")
    options = parser.parse_args()
    projects = {name: Path(p) for name, _, p in (each.partition("=") for each in options.ours)}
    first = next(iter(projects.values()))
    subsets, classes = pictures(first)
    test = load_dataset(first / "data" / "dataset.safetensors", ("test",))["test"]
    work = options.work.absolute()
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for recipe in options.recipes:
        folder = work / recipe
        # Workers are whole processes that import getitune again: minutes where cores are few.
        workers = {f"data.{name}_subset.num_workers": 0 for name in ("train", "val", "test")}
        job = {
            "classes": classes,
            "pictures": subsets,
            "data": str(work / "data"),
            "recipe": recipe,
            "options": RECIPES[recipe] | workers | {"data.input_size": [options.size] * 2},
            "epochs": options.epochs,
            "precision": options.precision,
        }
        result = train(options.python.absolute(), folder, json.loads(json.dumps(job)))
        for precision, model in result["models"].items():
            name = f"getitune {recipe} {precision}"
            rows[name] = quality(result["answers"][precision], test.labels, classes) | {
                "megabytes": size_of(Path(model)),
                "minutes": result["seconds"]["wall"] / 60,
                "cpu_minutes": result["seconds"]["cpu"] / 60,
                "epochs": result["epochs"],
                "typed": THEIRS_TYPED,
            }
            calls[name] = openvino_call(model)
            if options.size != OWN_SIZE:
                calls[f"{name} at {OWN_SIZE}"] = openvino_call(model, OWN_SIZE)
    number = [0]
    for label, project in projects.items():
        data = load_dataset(project / "data" / "dataset.safetensors", ("test",))
        if data.classes != classes or not np.array_equal(data["test"].labels, test.labels):
            raise SystemExit(f"{project} has other splits than {first}")
        images = channels_last(data["test"].images)
        spent = [read_json(project / "results" / s / "run.json") for s in TRAINING]
        minutes = sum(run["ended"] - run["started"] for run in spent) / 6e4
        for precision in ("fp32", "int8"):
            classifier = Classifier(project / "models", precision)
            name = f"EdgeKE {label} {precision}"
            answers = [classifier.predict(image).label for image in images]
            rows[name] = quality(answers, test.labels, classes) | {
                "megabytes": size_of(classifier.bundle.model),
                "minutes": minutes,
                "typed": OURS_TYPED,
            }
            calls[name] = lambda run=classifier.predict, of=images: run(of[number[0]])

    def choose(image: int) -> None:
        number[0] = image

    times = time_interleaved(calls, len(test.labels), math.inf, choose)
    print(
        "| network | right | 95 % interval | macro-F1 | worst recall | ms | MB | minutes | typed |"
    )
    print("| --- " * 9 + "|")
    for name, row in rows.items():
        row["ms_median"], row["ms_mean"] = np.median(times[name]), np.mean(times[name])
        row["ms_min"] = min(times[name])
        if f"{name} at {OWN_SIZE}" in times:
            row["ms_mean_at_own_size"] = np.mean(times[f"{name} at {OWN_SIZE}"])
        low, high = row["interval"]
        print(
            f"| {name} | {row['accuracy']:.1%} | {low:.1%} to {high:.1%} | {row['macro_f1']:.3f} "
            f"| {row['least_recall']:.1%} | {row['ms_mean']:.2f} | {row['megabytes']:.1f} "
            f"| {row['minutes']:.1f} | {row['typed']} |"
        )
    settings = {"size": options.size, "precision": options.precision, "load": os.getloadavg()[0]}
    rows = {name: row | settings for name, row in rows.items()}
    known = read_json(SUMMARY) if SUMMARY.exists() else {}
    profile = params.load(first / "params.yaml").profile_name
    write_json(SUMMARY, known | {profile: known.get(profile, {}) | rows})  # what was not run stays
    print(json.dumps({name: row["accuracy"] for name, row in rows.items()}))


if __name__ == "__main__":
    main()

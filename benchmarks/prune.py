"""A pruned network against a plain one of the same MACs.  python -m benchmarks.prune

ResNet10 of width 16, from scratch, on NEU's steel at 64x64 and on 20 classes of CIFAR-100
(../shared): trained for some epochs, then pruned to half of its MACs within as many again. Plain:
the widest ResNet10 with no more MACs, trained for the sum. Labels alone, no teacher. The last line
is JSON: accuracy on test, and MACs.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ruamel.yaml import YAML

from benchmarks.backbones import ROOT, SHARED, write_cifar
from edgeke import params
from edgeke.data.augment import Normalise
from edgeke.data.dataset import Dataset, load_dataset
from edgeke.learning.alone import train_alone
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy
from edgeke.learning.predict import predict
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.networks.layouts import single_exit
from edgeke.prune import prune
from stages import download

WIDTH, SHARE = 16, 0.5
DATA: dict[str, dict[str, Any]] = {
    "steel": {"image_size": 64, "channels": 1, "validation": 0.1, "calibration": 0.05, "test": 0.4},
    "cifar": {
        "image_size": 32, "channels": 3, "fit": "exact", "validation": 1000, "calibration": 1000,
        "test": None,
    },
}  # fmt: skip


def content(data: str, folder: Path, epochs: int, seed: int) -> params.Params:
    """Parameters for one of the sets; the plan of `distill` trains everything."""
    values = YAML(typ="safe", pure=True).load(ROOT / "params.yaml")
    values["profile"], values["seed"] = "image_folder", seed
    values["data"]["path"] = str(SHARED / "data" / "neu" if data == "steel" else folder / "images")
    values["kd"]["distance"] = "none"
    values["training"]["precision"] = "bf16"
    profile = values["profiles"]["image_folder"]
    profile["data"] |= DATA[data]
    profile["augmentation"] |= {"crop_padding": 4, "flip": True}
    profile["student"] = {"network": "resnet10", "width": WIDTH}
    profile["recipes"]["distill"] = {"epochs": epochs, "learning_rate": 0.1}
    profile["recipes"] |= {"batch_size": 64, "warmup": 0.2}
    return params.parse(values)


def compare(data: str, epochs: int, seed: int) -> dict[str, Any]:
    """Accuracy and MACs of the whole, the pruned and the plain network, in this folder."""
    here = Path()
    chosen = content(data, here.absolute(), epochs, seed)
    if data == "cifar" and not (here / "images").exists():
        write_cifar(here / "images")
    download.run(chosen, SimpleNamespace())
    dataset = load_dataset(here / "data/dataset.safetensors", ("train", "validation", "test"))
    plan = chosen.plan(chosen.profile.recipes.distill)
    size, channels = dataset.image_shape[1], dataset.image_shape[0]

    def backbone(width: int) -> Backbone:
        return Backbone("resnet10", channels, len(dataset.classes), size, width)

    def train(width: int, epochs: int) -> BranchyNet:
        recipe = params.Recipe(epochs, 0.1, plan.recipe.batch_size, plan.recipe.warmup)
        longer = params.Plan(seed, plan.training, plan.augmentation, plan.optimisation, recipe)
        trained = train_alone(
            single_exit(backbone(width)), CrossEntropy(), Images.of(dataset, torch.device("cpu")),
            longer, description=f"width {width}", on_epoch=lambda *_: None,
            slot=f"benchmark/{data}", depends_on={"data": dataset.sha256},
        )  # fmt: skip
        trained.remove_checkpoints()
        return trained.network

    def macs(network: BranchyNet) -> int:
        return exit_costs(network, size)[0].macs

    times, started = {}, time.process_time()
    whole = train(WIDTH, epochs)
    times["whole"], started = time.process_time() - started, time.process_time()
    pruned = prune(
        dataset, whole, None, chosen.kd, params.Prune(SHARE, 0.99), plan,
        start=chosen.profile.student, on_epoch=lambda *_: None,
    )  # fmt: skip
    for resume in pruned.resumes:
        resume.remove()
    times["pruned"], started = time.process_time() - started, time.process_time()
    most = macs(pruned.network)
    width = max(w for w in range(1, WIDTH) if macs(BranchyNet(single_exit(backbone(w)))) <= most)
    plain = train(width, 2 * epochs)
    times["plain"] = time.process_time() - started
    networks = {"whole": whole, "pruned": pruned.network, "plain": plain}
    rows = {
        name: {
            "accuracy": accuracy(network, dataset),
            "macs": macs(network),
            "parameters": exit_costs(network, size)[0].parameters,
            "cpu_seconds": round(times[name]),
        }
        for name, network in networks.items()
    }
    return {"images": len(dataset["train"].labels), "width": width, **rows}


def accuracy(network: BranchyNet, dataset: Dataset) -> float:
    normalise = Normalise(dataset.mean, dataset.std, torch.device("cpu"))
    answers = predict(network, torch.tensor(dataset["test"].images), normalise)[0].argmax(-1)
    return float((answers.numpy() == dataset["test"].labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", nargs="+", choices=DATA, default=list(DATA))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=1)
    chosen = parser.parse_args()
    results: dict[str, list[dict[str, Any]]] = {}
    for data in chosen.data:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            for seed in range(chosen.seeds):
                row = compare(data, chosen.epochs, seed)
                results.setdefault(data, []).append(row)
                print(data, seed, json.dumps(row), flush=True)
            os.chdir(ROOT)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

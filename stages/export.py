"""Trained networks -> models/segments/ and models/static/, in fp32 and int8."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.export import export, left_out
from edgeke.learning.checkpoints import load_checkpoint
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    cpu, models = torch.device("cpu"), Path("models")
    network, preprocessing = load_checkpoint(models / "branchynet", cpu)
    static = {"main": (network.branch(-1), preprocessing)}
    for name in ("teacher", "plain"):
        static[name] = load_checkpoint(models / name, cpu)
    for exit in range(len(network.exits)):
        static[f"branch_{exit}"] = load_checkpoint(models / "branches" / str(exit), cpu)
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    train, validation = dataset["train"], dataset["validation"]
    metrics = export(network, static, preprocessing, train, validation, params.export, models)
    if line := left_out(metrics):
        print(line, file=sys.stderr)
    return metrics


if __name__ == "__main__":
    sys.exit(entry("export", run))

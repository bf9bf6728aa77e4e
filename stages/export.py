"""BranchyNet and teacher -> models/segments/ and models/static/, in fp32 and int8."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.export import export
from edgeke.learning.checkpoints import load_checkpoint
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    cpu = torch.device("cpu")
    network, preprocessing = load_checkpoint(Path("models/branchynet"), cpu)
    teacher, _ = load_checkpoint(Path("models/teacher"), cpu)
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train",))
    train = dataset["train"]
    return export(network, teacher, preprocessing, train, params.export, Path("models"))


if __name__ == "__main__":
    sys.exit(entry("export", run))

"""Dataset and teacher -> models/branches/<i>.{safetensors,json}; i is the one argument."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.distill import distill
from edgeke.files import write_table
from edgeke.learning.build import student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.params import Params
from edgeke.tracking import Run
from stages._entry import entry


def run(params: Params, log: Run, branch: int) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    network, recipe, kd = params.profile.student, params.profile.recipes.distill, params.kd
    student = student_architecture(network, params.branchynet.layout, dataset)
    teacher = None
    if kd.distance != "none":
        teacher, _ = load_checkpoint(Path("models/teacher"), torch.device("cpu"))
    trained = distill(
        dataset, student, branch, teacher, kd, recipe, seed=params.seed, on_epoch=log.epoch
    )
    metrics = trained.history[-1]
    save_checkpoint(
        trained.network,
        Path(f"models/branches/{branch}"),
        preprocessing=Preprocessing.of(dataset),
        params={"seed": params.seed, "kd": kd, "recipe": recipe},
        metrics=metrics,
    )
    write_table(Path(f"results/distill/{branch}/history.csv"), trained.rows())
    return metrics


if __name__ == "__main__":
    number = int(sys.argv[1])
    sys.exit(entry(f"distill/{number}", lambda params, log: run(params, log, number)))

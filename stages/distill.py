"""Dataset and teacher -> models/branches/<i>.{safetensors,json}; i is the one argument."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.distill import distill
from edgeke.files import write_table
from edgeke.learning.build import student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.params import Params, Plan
from edgeke.tracking import Run
from stages._entry import entry


def run(params: Params, log: Run, branch: int) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    recipe, augmentation, kd = (
        params.profile.recipes.distill,
        params.profile.augmentation,
        params.kd,
    )
    plan = Plan(params.seed, params.training, augmentation, recipe)
    student = student_architecture(params.profile.student, params.branchynet.layout, dataset)
    teacher = None
    if kd.distance != "none":
        teacher, _ = load_checkpoint(Path("models/teacher"), torch.device("cpu"))
    trained = distill(dataset, student, branch, teacher, kd, plan, on_epoch=log.epoch)
    metrics = trained.history[-1]
    save_checkpoint(
        trained.network,
        Path(f"models/branches/{branch}"),
        preprocessing=Preprocessing.of(dataset),
        params={"plan": plan, "kd": kd},
        metrics=metrics,
    )
    write_table(Path(f"results/distill/{branch}/history.csv"), trained.rows())
    trained.forget_checkpoints()
    return metrics


if __name__ == "__main__":
    number = int(sys.argv[1])
    sys.exit(entry(f"distill/{number}", lambda params, log: run(params, log, number)))

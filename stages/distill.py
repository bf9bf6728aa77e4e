"""Dataset and teacher -> models/branches/<i>.{safetensors,json}; i is the one argument."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.distill import distill
from edgeke.errors import InputError
from edgeke.files import write_table
from edgeke.learning.build import student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.params import Params, Plan
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run, number: str) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    recipe, augmentation, kd = (
        params.profile.recipes.distill,
        params.profile.augmentation,
        params.kd,
    )
    plan = Plan(params.seed, params.training, augmentation, recipe)
    student = student_architecture(params.profile.student, params.branchynet.layout, dataset)
    if number not in map(str, range(len(student.exits))):
        raise InputError(
            f"branch {number} does not exist; run `python -m stages.distill BRANCH` with a number "
            f"from 0 to {len(student.exits) - 1}"
        )
    branch, teacher = int(number), None
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
    number = sys.argv[1] if len(sys.argv) == 2 else "none"
    sys.exit(entry(f"distill/{number}", lambda params, log: run(params, log, number)))

"""Dataset and teacher -> models/branches/<i>.{safetensors,json}, one for each exit."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.distill import distill
from edgeke.files import write_table
from edgeke.learning.build import student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    kd, plan = params.kd, params.plan(params.profile.recipes.distill)
    student = student_architecture(params.profile.student, params.branchynet.layout, dataset)
    teacher = None
    if kd.distance != "none":
        teacher, _ = load_checkpoint(Path("models/teacher"), torch.device("cpu"))
    metrics: dict[str, float] = {}
    branches, rows = [], []
    for number in range(len(student.exits)):

        def on_epoch(epoch: int, row: dict[str, float], number: int = number) -> None:
            log.epoch(epoch, _named(row, number))

        branch = distill(dataset, student, number, teacher, kd, plan, on_epoch=on_epoch)
        save_checkpoint(
            branch.network,
            Path(f"models/branches/{number}"),
            preprocessing=Preprocessing.of(dataset),
            params={"plan": plan, "kd": kd},
            metrics=branch.history[-1],
        )
        metrics |= _named(branch.history[-1], number)
        rows += [{"branch": number, **row} for row in branch.rows()]
        branches.append(branch)
    write_table(Path("results/distill/history.csv"), rows)
    for branch in branches:  # only now: a stage that is killed before starts from an empty folder
        branch.forget_checkpoints()
    return metrics


def _named(row: dict[str, float], number: int) -> dict[str, float]:
    """`train/loss` of branch 1 is `train/branch_1/loss`."""
    return {key.replace("/", f"/branch_{number}/", 1): value for key, value in row.items()}


if __name__ == "__main__":
    sys.exit(entry("distill", run))

"""Dataset, teacher, distilled branches -> models/branchynet.{safetensors,json}."""

import sys
from dataclasses import asdict
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.files import write_table
from edgeke.learning.build import student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.learning.orders import ORDERS
from edgeke.params import Params
from edgeke.tracking.runs import Run
from edgeke.train_branchynet import exit_metrics, train_branchynet
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    kd, settings, cpu = params.kd, params.branchynet, torch.device("cpu")
    shared = settings.order != "independent"
    student = student_architecture(params.profile.student, settings.layout, dataset, shared=shared)
    order = ORDERS[settings.order](student.depths)
    recipes = params.profile.recipes.train_branchynet.phases(len(order.phases))
    plans = [params.plan(recipe) for recipe in recipes]
    branches = {i: load_checkpoint(Path(f"models/branches/{i}"), cpu)[0] for i in order.starts}
    teacher = None
    if kd.distance != "none":
        teacher, _ = load_checkpoint(Path("models/teacher"), cpu)
    trained = train_branchynet(
        dataset,
        student,
        order,
        branches,
        teacher,
        kd,
        settings.weights(len(student.exits)),
        plans,
        on_epoch=log.epoch,
    )
    metrics = exit_metrics(trained.network, dataset)
    save_checkpoint(
        trained.network,
        Path("models/branchynet"),
        preprocessing=Preprocessing.of(dataset),
        params={"plans": [asdict(plan) for plan in plans], "kd": kd, "branchynet": settings},
        metrics=metrics,
    )
    write_table(Path("results/train_branchynet/history.csv"), trained.rows())
    trained.forget_checkpoints()
    return metrics


if __name__ == "__main__":
    sys.exit(entry("train_branchynet", run))

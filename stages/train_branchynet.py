"""Dataset, teacher, distilled branches -> models/branchynet.{safetensors,json}."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.files import write_table
from edgeke.learning.build import student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.learning.orders import ORDERS
from edgeke.params import Params, Plan
from edgeke.tracking.runs import Run
from edgeke.train_branchynet import exit_metrics, train_branchynet
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    recipe, kd, knobs = params.profile.recipes.train_branchynet, params.kd, params.branchynet
    plan = Plan(params.seed, params.training, params.profile.augmentation, recipe)
    shared = knobs.order != "independent"
    student = student_architecture(params.profile.student, knobs.layout, dataset, shared=shared)
    order, cpu = ORDERS[knobs.order](student.depths), torch.device("cpu")
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
        knobs.weights,
        plan,
        on_epoch=log.epoch,
    )
    metrics = exit_metrics(trained.network, dataset)
    save_checkpoint(
        trained.network,
        Path("models/branchynet"),
        preprocessing=Preprocessing.of(dataset),
        params={"plan": plan, "kd": kd, "branchynet": knobs},
        metrics=metrics,
    )
    write_table(Path("results/train_branchynet/history.csv"), trained.rows())
    trained.forget_checkpoints()
    return metrics


if __name__ == "__main__":
    sys.exit(entry("train_branchynet", run))

"""Dataset, teacher, distilled branches -> models/branchynet.{safetensors,json}."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.files import write_table
from edgeke.learning.build import student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.learning.orders import start_exit
from edgeke.params import Params
from edgeke.tracking import Run
from edgeke.train_branchynet import exit_metrics, train_branchynet
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    network, recipe, kd = params.profile.student, params.profile.recipes.train_branchynet, params.kd
    order = params.branchynet.order
    student = student_architecture(network, params.branchynet.layout, dataset)
    cpu = torch.device("cpu")
    first = start_exit(order, len(student.exits))
    branch, _ = load_checkpoint(Path(f"models/branches/{first}"), cpu)
    teacher = None
    if kd.distance != "none":
        teacher, _ = load_checkpoint(Path("models/teacher"), cpu)
    trained = train_branchynet(
        dataset,
        student,
        order,
        (first, branch),
        teacher,
        kd,
        recipe,
        seed=params.seed,
        on_epoch=log.epoch,
    )
    metrics = exit_metrics(trained.network, dataset)
    save_checkpoint(
        trained.network,
        Path("models/branchynet"),
        preprocessing=Preprocessing.of(dataset),
        params={
            "seed": params.seed,
            "order": order,
            "kd": kd,
            "recipe": recipe,
        },
        metrics=metrics,
    )
    write_table(Path("results/train_branchynet/history.csv"), trained.rows())
    return metrics


if __name__ == "__main__":
    sys.exit(entry("train_branchynet", run))

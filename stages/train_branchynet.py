"""Dataset, teacher, branches -> models/{branchynet,plain}.{safetensors,json}."""

import sys
from pathlib import Path

import torch

from edgeke.data.dataset import load_dataset
from edgeke.files import write_table
from edgeke.learning.architectures import normalised_for, student_architecture
from edgeke.learning.checkpoints import (
    Preprocessing,
    load_checkpoint,
    load_teacher,
    save_checkpoint,
)
from edgeke.learning.orders import ORDERS, with_codec
from edgeke.params import Params
from edgeke.tracking.runs import Run
from edgeke.train_branchynet import exit_metrics, train_branchynet
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    start = params.profile.student
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    trained_on = Preprocessing.of(normalised_for(params.profile.teacher, dataset))
    dataset = normalised_for(start, dataset)
    preprocessing, cpu = Preprocessing.of(dataset), torch.device("cpu")
    recipe, kd, settings = params.profile.recipes.train_branchynet, params.kd, params.branchynet
    shared = settings.order != "independent"
    pruned = None
    if params.student.prune is not None:
        pruned, _ = load_checkpoint(Path("models/pruned/main"), cpu, preprocessing)
    shapes = pruned.architecture.backbone.pruned if pruned else ()
    student = student_architecture(start, settings.layout, dataset, shared=shared, pruned=shapes)
    order, exits = ORDERS[settings.order](student.depths), len(student.exits)
    if settings.codec is not None:
        order = with_codec(order, student.depths, settings.codec.after)
    plans = [params.plan(phase) for phase in recipe.phases(len(order.phases))]
    branches = {
        branch: load_checkpoint(Path(f"models/branches/{branch}"), cpu, preprocessing)[0]
        for branch in (range(exits) if start.trunk == "frozen" else {*order.starts, exits - 1})
    }
    if pruned:
        branches[exits - 1] = pruned
    teacher = None
    if kd.distance != "none":
        teacher = load_teacher(Path("models/teacher"), preprocessing, trained_on)
    trained, plain = train_branchynet(
        dataset,
        student,
        order,
        branches,
        teacher,
        kd,
        plans,
        start=start,
        seed=params.seed,
        weights=settings.weights(exits),
        detach=settings.detach,
        codec=settings.codec,
        on_epoch=log.epoch,
    )
    metrics = exit_metrics(trained.network, plain, dataset)
    for name, network in (("branchynet", trained.network), ("plain", plain)):
        save_checkpoint(
            network,
            Path("models") / name,
            preprocessing=preprocessing,
            params={"plans": plans, "kd": kd, "branchynet": settings},
            metrics=metrics,
        )
    write_table(Path("results/train_branchynet/history.csv"), trained.rows())
    log.cleanups.append(trained.remove_checkpoints)
    return metrics


if __name__ == "__main__":
    sys.exit(entry("train_branchynet", run))

"""data/dataset.safetensors -> models/teacher.{safetensors,json}."""

import sys
from pathlib import Path

from edgeke.data.dataset import load_dataset
from edgeke.files import write_table
from edgeke.learning.architectures import check_student, normalised_for
from edgeke.learning.checkpoints import Preprocessing, save_checkpoint
from edgeke.params import Params
from edgeke.tracking.runs import Run
from edgeke.train_teacher import train_teacher
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    check_student(params, dataset)
    dataset = normalised_for(params.profile.teacher, dataset)
    plan = params.plan(params.profile.recipes.train_teacher)
    trained = train_teacher(dataset, params.profile.teacher, plan, on_epoch=log.epoch)
    metrics = trained.metrics
    save_checkpoint(
        trained.network,
        Path("models/teacher"),
        preprocessing=Preprocessing.of(dataset),
        params={"plan": plan},
        metrics=metrics,
    )
    write_table(Path("results/train_teacher/history.csv"), trained.rows())
    log.cleanups.append(trained.remove_checkpoints)
    return metrics


if __name__ == "__main__":
    sys.exit(entry("train_teacher", run))

"""Dataset and teacher -> models/branches/<exit>.{safetensors,json}, for every exit."""

import sys
from pathlib import Path

from edgeke.data.dataset import load_dataset
from edgeke.distill import branch_metrics, distill
from edgeke.files import write_table
from edgeke.learning.architectures import normalised_for, student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_teacher, save_checkpoint
from edgeke.params import Params
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    start, kd = params.profile.student, params.kd
    trained_on = Preprocessing.of(normalised_for(params.profile.teacher, dataset))
    dataset = normalised_for(start, dataset)
    preprocessing = Preprocessing.of(dataset)
    plan = params.plan(params.profile.recipes.distill)
    student = student_architecture(start, params.branchynet.layout, dataset)
    teacher = None
    if kd.distance != "none":
        teacher = load_teacher(Path("models/teacher"), preprocessing, trained_on)
    trained = distill(dataset, student, teacher, kd, plan, start=start, on_epoch=log.epoch)
    folder, numbers = Path("models/branches"), [str(branch) for branch in range(len(trained))]
    for file in folder.glob("*.*"):  # DVC versions the whole folder
        if file.stem not in numbers:  # left by a layout with more exits
            file.unlink(missing_ok=True)
    for branch, one in enumerate(trained):
        save_checkpoint(
            one.network,
            folder / str(branch),
            preprocessing=preprocessing,
            params={"plan": plan, "kd": kd},
            metrics=one.metrics,
        )
    rows = [{"branch": branch, **row} for branch, one in enumerate(trained) for row in one.rows()]
    write_table(Path("results/distill/history.csv"), rows)
    log.cleanups.extend(one.remove_checkpoints for one in trained)
    return branch_metrics(trained)


if __name__ == "__main__":
    sys.exit(entry("distill", run))

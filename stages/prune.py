"""Dataset, teacher, main branch -> models/pruned/main.{safetensors,json}, where that is asked for.

With `student.prune` empty models/pruned stays empty.
"""

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
from edgeke.params import Params
from edgeke.prune import prune
from edgeke.tracking.runs import Run
from stages._entry import entry


def run(params: Params, log: Run) -> dict[str, float]:
    folder, history = Path("models/pruned"), Path("results/prune/history.csv")
    settings, start, kd = params.student.prune, params.profile.student, params.kd
    if settings is None:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.glob("main.*"):
            file.unlink()
        write_table(history, [])
        return {"cost/macs_share": 1.0}
    dataset = load_dataset(Path("data/dataset.safetensors"), ("train", "validation"))
    trained_on = Preprocessing.of(normalised_for(params.profile.teacher, dataset))
    dataset = normalised_for(start, dataset)
    preprocessing, cpu = Preprocessing.of(dataset), torch.device("cpu")
    last = len(student_architecture(start, params.branchynet.layout, dataset).exits) - 1
    main, _ = load_checkpoint(Path(f"models/branches/{last}"), cpu, preprocessing)
    teacher = None
    if kd.distance != "none":
        teacher = load_teacher(Path("models/teacher"), preprocessing, trained_on)
    plan = params.plan(params.profile.recipes.distill)
    pruned = prune(dataset, main, teacher, kd, settings, plan, start=start, on_epoch=log.epoch)
    save_checkpoint(
        pruned.network,
        folder / "main",
        preprocessing=preprocessing,
        params={"plan": plan, "kd": kd, "prune": settings},
        metrics=pruned.metrics,
    )
    write_table(history, pruned.rows)
    share = pruned.metrics["cost/macs_share"]
    if share > settings.macs:
        print(
            f"note: pruned to {share:.1%} of the operations only: the next step had lost more than "
            f"student.prune.max_loss = {settings.max_loss:g} of the accuracy; train longer (recipes"
            ".distill.epochs), or allow more",
            file=sys.stderr,
        )
    log.cleanups.extend(resume.remove for resume in pruned.resumes)
    return pruned.metrics


if __name__ == "__main__":
    sys.exit(entry("prune", run))

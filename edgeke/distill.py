"""Stage `distill`: every branch of the layout alone under the teacher, the paper's first stage."""

from collections.abc import Sequence

import torch

from edgeke.data.dataset import Dataset
from edgeke.learning.fit import OnEpoch, fit
from edgeke.learning.images import Images
from edgeke.learning.objectives import make_objective
from edgeke.learning.parallel import local_device
from edgeke.learning.resume import ResumeFile, fingerprint
from edgeke.learning.trained import Trained
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, Plan

__all__ = ["branch_metrics", "distill"]


def distill(
    dataset: Dataset,
    student: Architecture,
    teacher: BranchyNet | None,
    kd: KD,
    plan: Plan,
    *,
    on_epoch: OnEpoch,
) -> tuple[Trained, ...]:
    """Train each exit of `student` as a network of its own, from fresh weights; one result each.

    `teacher` may be None when `kd.distance` is none. Needs the splits train and validation. Rows
    given to `on_epoch` are named by branch, as in `train/branch_0/loss`. The checkpoint of a
    finished branch is kept, so that a later call does not train it again.
    """
    device = local_device()
    images = Images.of(dataset, device)
    objective = make_objective(
        kd,
        teacher.to(device) if teacher else None,
        label_smoothing=plan.optimisation.label_smoothing,
        paper_factor=1.0,
    )
    trained = []
    for branch in range(len(student.exits)):

        def on_branch_epoch(epoch: int, row: dict[str, float], branch: int = branch) -> None:
            on_epoch(epoch, _named(row, branch))

        torch.manual_seed(plan.seed)
        network = BranchyNet(student.branch(branch))
        resume = ResumeFile(
            f"distill/{branch}",
            plan=plan,
            kd=kd,
            architecture=network.architecture,
            start=fingerprint(network),
            data=dataset.sha256,
            teacher=fingerprint(teacher),
        )
        history = fit(
            network,
            objective,
            images,
            plan,
            description=f"branch {branch}",
            on_epoch=on_branch_epoch,
            resume=resume,
        )
        trained.append(Trained(network, history, (resume,)))
    return tuple(trained)


def branch_metrics(trained: Sequence[Trained]) -> dict[str, float]:
    """The last epoch's metrics of all branches, such as `validation/branch_0/accuracy`."""
    metrics: dict[str, float] = {}
    for branch, one in enumerate(trained):
        metrics |= _named(one.history[-1], branch)
    return metrics


def _named(row: dict[str, float], branch: int) -> dict[str, float]:
    return {key.replace("/", f"/branch_{branch}/"): value for key, value in row.items()}

"""Stage `distill`: one branch alone under the teacher, the paper's first knob."""

from edgeke.data.dataset import Dataset
from edgeke.learning.fit import Images, OnEpoch, Trained, default_device, train_alone
from edgeke.learning.objectives import make_objective
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, Recipe

__all__ = ["distill"]


def distill(
    dataset: Dataset,
    student: Architecture,
    branch: int,
    teacher: BranchyNet | None,
    kd: KD,
    recipe: Recipe,
    *,
    seed: int,
    on_epoch: OnEpoch,
) -> Trained:
    """Train exit `branch` of `student` as a network of its own, from fresh weights.

    `teacher` may be None when `kd.distance` is none. Needs the splits train and validation.
    """
    device = default_device()
    return train_alone(
        student.branch(branch),
        make_objective(kd, teacher.to(device) if teacher else None),
        Images.of(dataset, device),
        recipe,
        seed=seed,
        description=f"branch {branch}",
        on_epoch=on_epoch,
    )

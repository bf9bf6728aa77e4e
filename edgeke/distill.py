"""Stage `distill`: one branch alone under the teacher, the paper's first knob."""

from edgeke.data.dataset import Dataset
from edgeke.learning.alone import Trained, train_alone
from edgeke.learning.fit import OnEpoch
from edgeke.learning.images import Images
from edgeke.learning.objectives import make_objective
from edgeke.learning.parallel import local_device
from edgeke.learning.resume import ResumeFile, fingerprint
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, Plan

__all__ = ["distill"]


def distill(
    dataset: Dataset,
    student: Architecture,
    branch: int,
    teacher: BranchyNet | None,
    kd: KD,
    plan: Plan,
    *,
    on_epoch: OnEpoch,
) -> Trained:
    """Train exit `branch` of `student` as a network of its own, from fresh weights.

    `teacher` may be None when `kd.distance` is none. Needs the splits train and validation.
    """
    device = local_device()
    objective = make_objective(
        kd,
        teacher.to(device) if teacher else None,
        student.classes,
        label_smoothing=plan.optimisation.label_smoothing,
    )
    return train_alone(
        student.branch(branch),
        objective,
        Images.of(dataset, device),
        plan,
        description=f"branch {branch}",
        on_epoch=on_epoch,
        resume=ResumeFile(
            f"distill/{branch}",
            plan=plan,
            kd=kd,
            architecture=student.branch(branch),
            data=dataset.sha256,
            teacher=fingerprint(teacher),
        ),
    )

"""Stage `distill`: every branch of the layout alone under the teacher, the paper's first stage."""

from collections.abc import Sequence

from edgeke.data.dataset import Dataset
from edgeke.learning.alone import train_alone
from edgeke.learning.architectures import start_weights
from edgeke.learning.fit import OnEpoch
from edgeke.learning.frozen_trunk import Features
from edgeke.learning.images import Images
from edgeke.learning.objectives import class_weights, make_objective
from edgeke.learning.parallel import local_device
from edgeke.learning.resume import fingerprint
from edgeke.learning.trained import Trained
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, Network, Plan


def distill(
    dataset: Dataset,
    student: Architecture,
    teacher: BranchyNet | None,
    kd: KD,
    plan: Plan,
    *,
    start: Network,
    on_epoch: OnEpoch,
) -> tuple[Trained, ...]:
    """Train each exit of `student` as a network of its own; one result each.

    `start` says where trunks start, and whether they are frozen.
    `teacher` may be None when `kd.distance` is none. Needs the splits train and validation. Rows
    given to `on_epoch` are named by branch, as in `train/branch_0/loss`. The checkpoint of a
    finished branch is kept, so that a later call does not train it again.
    """
    device = local_device()
    images = Images.of(dataset, device)
    teacher = teacher.to(device) if teacher else None
    key = {"plan": plan, "kd": kd, "network": start, "data": dataset.sha256}
    key |= {"teacher": fingerprint(teacher)}
    weights, features = start_weights(start, student.backbone, plan.seed), None
    if start.trunk == "frozen":
        features = Features(BranchyNet(student, weights), images, plan, teacher)
        images, plan = features.images, features.plan
    objective = make_objective(
        kd,
        features.teacher if features else teacher,
        label_smoothing=plan.optimisation.label_smoothing,
        class_weights=class_weights(images, plan.optimisation),
        paper_factor=1.0,
    )
    trained = []
    for branch in range(len(student.exits)):

        def on_branch_epoch(epoch: int, row: dict[str, float], branch: int = branch) -> None:
            on_epoch(epoch, _named(row, branch))

        alone = student.branch(branch)
        trained.append(
            train_alone(
                alone,
                objective,
                images,
                plan,
                description=f"branch {branch}",
                on_epoch=on_branch_epoch,
                slot=f"distill/{branch}",
                depends_on={**key, "architecture": alone},
                weights=weights,
                features=features,
                exit=branch,
            )
        )
    return tuple(trained)


def branch_metrics(trained: Sequence[Trained]) -> dict[str, float]:
    """The metrics of all branches' kept epochs, such as `validation/branch_0/accuracy`."""
    metrics: dict[str, float] = {}
    for branch, one in enumerate(trained):
        metrics |= _named(one.metrics, branch)
    return metrics


def _named(row: dict[str, float], branch: int) -> dict[str, float]:
    return {key.replace("/", f"/branch_{branch}/"): value for key, value in row.items()}

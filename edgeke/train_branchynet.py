"""Stage `train_branchynet`: all exits of one network, in the order that was asked for."""

from collections.abc import Mapping, Sequence

import torch

from edgeke.data.dataset import Dataset
from edgeke.learning.alone import Trained
from edgeke.learning.fit import History, OnEpoch, fit
from edgeke.learning.images import Images, evaluate
from edgeke.learning.objectives import make_objective
from edgeke.learning.orders import Order
from edgeke.learning.parallel import local_device
from edgeke.learning.phases import OneExit, phase_network
from edgeke.learning.resume import ResumeFile, fingerprint
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, Plan

__all__ = ["exit_metrics", "train_branchynet"]

# The paper doubles its Wasserstein weight in the BranchyNet (kd.paper_weights).
_PAPER_FACTOR = 2.0


def train_branchynet(
    dataset: Dataset,
    student: Architecture,
    order: Order,
    branches: Mapping[int, BranchyNet],
    teacher: BranchyNet | None,
    kd: KD,
    weights: tuple[float, ...],
    plans: Sequence[Plan],
    *,
    on_epoch: OnEpoch,
) -> Trained:
    """Train a BranchyNet from the distilled branches its order starts from.

    `branches` maps their numbers to networks; what later phases do not train again stays
    unchanged. `weights` `[E]` are those of the exits' losses when they learn together, `plans` are
    one for each of the order's phases. The history has one row an epoch, its keys named by exit.
    Needs the splits train and validation.
    """
    device = local_device()
    images = Images.of(dataset, device)
    teacher = teacher.to(device) if teacher else None
    if plans:
        torch.manual_seed(plans[0].seed)
    network = BranchyNet(student)
    for number in order.starts:
        network.load_branch(number, branches[number])
    network.to(device)
    main, resumes = len(network.exits) - 1, []
    rows: dict[int, dict[str, float]] = {}
    started = [fingerprint(branches[number]) for number in order.starts]
    for number, (phase, plan) in enumerate(zip(order.phases, plans, strict=True)):
        joint = len(phase.exits) > 1
        # The main exit can supervise others once it has learnt: it comes from a distilled branch.
        guide = main in order.starts and not joint
        objective = make_objective(
            kd,
            teacher,
            student.classes,
            main=OneExit(network, main, network.attached[main]) if guide else None,
            joint=joint,
            weights=weights if joint else None,
            label_smoothing=plan.optimisation.label_smoothing,
            paper_factor=_PAPER_FACTOR,
        )

        def on_phase_epoch(
            epoch: int, row: dict[str, float], exits: tuple[int, ...] = phase.exits
        ) -> None:
            if len(exits) == 1:  # phases share their epochs: the loss is named by its exit, too
                row = {f"train/exit_{exits[0]}/loss": row["train/loss"], **row}
                del row["train/loss"]
            rows.setdefault(epoch, {}).update(row)
            on_epoch(epoch, row)

        resumes.append(
            ResumeFile(
                f"train_branchynet/{number}",
                plan=plan,
                kd=kd,
                weights=weights,
                order=order,
                architecture=student,
                data=dataset.sha256,
                teacher=fingerprint(teacher),
                branches=started,
            )
        )
        fit(
            phase_network(network, phase),
            objective,
            images,
            plan,
            description="exits" if joint else f"exit {phase.exits[0]}",
            on_epoch=on_phase_epoch,
            exits=phase.exits,
            root=network,
            resume=resumes[-1],
        )
    history: History = [rows[epoch] for epoch in sorted(rows)]
    return Trained(network.eval(), history, tuple(resumes))


def exit_metrics(network: BranchyNet, dataset: Dataset) -> dict[str, float]:
    """Validation cross-entropy and accuracy of every exit."""
    images = Images.of(dataset, local_device())
    network = network.to(images.train.device)
    return evaluate(network, images, tuple(range(len(network.exits))))

"""Stage `train_branchynet`: the exits of one network, trained one after the other under KD."""

import torch
from torch.nn import functional as F

from edgeke.data.dataset import Dataset
from edgeke.learning.fit import Images, OnEpoch, Trained, default_device, fit, predict
from edgeke.learning.objectives import make_objective
from edgeke.learning.orders import ORDERS, PhaseNetwork
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, Recipe

__all__ = ["exit_metrics", "train_branchynet"]


def train_branchynet(
    dataset: Dataset,
    student: Architecture,
    order: str,
    start: tuple[int, BranchyNet],
    teacher: BranchyNet | None,
    kd: KD,
    recipe: Recipe,
    *,
    seed: int,
    on_epoch: OnEpoch,
) -> Trained:
    """Train a BranchyNet from the distilled branch its order starts from.

    `start` is that branch's number and network; it becomes part of the result unchanged. In each
    phase one exit learns while everything trained before is frozen. The history has one row an
    epoch, its keys named by exit. Needs the splits train and validation.
    """
    device = default_device()
    images = Images.of(dataset, device)
    objective = make_objective(kd, teacher.to(device) if teacher else None)
    torch.manual_seed(seed)
    network = BranchyNet(student)
    network.load_branch(*start)
    network.to(device)
    rows: dict[int, dict[str, float]] = {}
    for phase in ORDERS[order](network.attached):

        def on_phase_epoch(epoch: int, row: dict[str, float], exit: int = phase.exit) -> None:
            named = {_at_exit(key, exit): value for key, value in row.items()}
            rows.setdefault(epoch, {}).update(named)
            on_epoch(epoch, named)

        fit(
            PhaseNetwork(network, phase),
            objective,
            images,
            recipe,
            seed=seed,
            description=f"exit {phase.exit}",
            on_epoch=on_phase_epoch,
        )
    return Trained(network.eval(), [rows[epoch] for epoch in sorted(rows)])


def exit_metrics(network: BranchyNet, dataset: Dataset) -> dict[str, float]:
    """Validation cross-entropy and accuracy of every exit."""
    images = Images.of(dataset, default_device())
    metrics = {}
    logits = predict(network, images.validation, images.normalise)
    for exit, at_exit in enumerate(logits):
        labels = images.validation_labels
        metrics[f"validation/exit_{exit}/loss"] = float(F.cross_entropy(at_exit, labels))
        right = (at_exit.argmax(-1) == labels).double().mean()
        metrics[f"validation/exit_{exit}/accuracy"] = float(right)
    return metrics


def _at_exit(key: str, exit: int) -> str:
    split, name = key.split("/")
    return f"{split}/exit_{exit}/{name}"

"""Objectives: from a network and a batch to `{"loss": ..., "logits": ..., named parts}`.

The fit loop knows only this call, so labels alone, distillation and joint exits are one line apart.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeke.errors import InputError
from edgeke.learning.distances import DISTANCES, class_costs
from edgeke.learning.frozen import Frozen
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD

__all__ = ["CrossEntropy", "Distillation", "Objective", "make_objective"]

# (network, normalised images [N, C, H, W], targets) -> loss [], logits [E, N, K], parts [E]
# Targets are labels [N], or class probabilities [N, K] where images were mixed.
Objective = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


class CrossEntropy:
    """sum_e w_e CE_e: cross-entropy with the targets at every exit the network answers at.

    `weights` `[E]`; None averages over the exits.
    """

    def __init__(
        self, weights: Sequence[float] | None = None, label_smoothing: float = 0.0
    ) -> None:
        self.weights = weights
        self.label_smoothing = label_smoothing

    def __call__(self, network: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = network(images)
        each = self.of_exits(logits, targets)
        return {"loss": self.weighted(each), "logits": logits, "cross_entropy": each.detach()}

    def of_exits(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every exit, `[E]`."""
        smoothing = self.label_smoothing
        each = [F.cross_entropy(at, targets, label_smoothing=smoothing) for at in logits]
        return torch.stack(each)

    def weighted(self, losses: Tensor) -> Tensor:
        """The weighted sum over exits, or their mean."""
        if self.weights is None:
            return losses.mean()
        return (losses * torch.tensor(self.weights, device=losses.device)).sum()


class Distillation:
    """sum_e w_e ((1 - beta) CE_e + beta T^2 D_e) (Hinton et al. 2015).

    D_e is the distance to each supervisor, averaged: frozen networks that answer `[1, N, K]`, and,
    with `from_main`, the network's own last exit for all exits before it (Zhang et al. 2019). An
    exit without supervisor learns from labels alone. T^2 keeps the size of a divergence's gradient
    independent of the temperature; that of `wasserstein` grows with T. `paper_factor` replaces the
    weights by CE + paper_factor T^2 D.
    """

    def __init__(
        self,
        supervisors: Sequence[nn.Module],
        kd: KD,
        costs: Tensor,
        *,
        from_main: bool = False,
        paper_factor: float | None = None,
        labels: CrossEntropy,
    ) -> None:
        self.supervisors = [Frozen(supervisor) for supervisor in supervisors]
        self.kd, self.costs, self.from_main = kd, costs, from_main
        self.labels = labels
        self.distance = DISTANCES[kd.distance]
        share = (1 - kd.beta, kd.beta) if paper_factor is None else (1.0, paper_factor)
        self.label_weight, self.distance_weight = share

    def __call__(self, network: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = network(images)
        cross_entropy = self.labels.of_exits(logits, targets)
        answers = [supervisor(images) for supervisor in self.supervisors]
        hard = targets if targets.dim() == 1 else targets.argmax(dim=-1)
        distances, taught = [], []
        for exit, at_exit in enumerate(logits):
            own = [answer[-1] for answer in answers]
            if self.from_main and exit < len(logits) - 1:
                own.append(logits[-1].detach())
            each = [
                self.distance(at_exit, answer, self.kd.temperature, hard, self.costs).mean()
                for answer in own
            ]
            distances.append(torch.stack(each).mean() if each else logits.new_zeros(()))
            taught.append(bool(each))
        distance, mask = torch.stack(distances), torch.tensor(taught, device=logits.device)
        guided = self.label_weight * cross_entropy
        guided = guided + self.distance_weight * self.kd.temperature**2 * distance
        return {
            "loss": self.labels.weighted(torch.where(mask, guided, cross_entropy)),
            "logits": logits,
            "cross_entropy": cross_entropy.detach(),
            "distance": distance.detach(),
        }


def make_objective(
    kd: KD,
    teacher: BranchyNet | None,
    student_classes: int,
    *,
    main: nn.Module | None = None,
    joint: bool = False,
    weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    paper_factor: float = 1.0,
) -> Objective:
    """The objective that `kd` asks for.

    `main` is the network's trained main exit where it supervises a phase; `joint` says that all
    exits learn together, so that the main exit supervises as it learns. Without either, the teacher
    supervises whatever `kd.source` says. Errors: InputError when teacher and student differ in
    classes.
    """
    labels = CrossEntropy(weights, label_smoothing)
    if kd.distance == "none":
        return labels
    if teacher is None:
        raise ValueError(f"distance {kd.distance} needs a teacher")
    if teacher.architecture.classes != student_classes:
        raise InputError(
            f"the teacher knows {teacher.architecture.classes} classes, the student "
            f"{student_classes}; they must be trained on the same dataset: run "
            "`dvc repro train_teacher`"
        )
    by_main = main is not None or joint
    supervisors: list[nn.Module] = [teacher] if kd.source != "main" or not by_main else []
    if main is not None and kd.source != "teacher":
        supervisors.append(main)
    return Distillation(
        supervisors,
        kd,
        class_costs(teacher.class_vectors()),
        from_main=joint and kd.source != "teacher",
        paper_factor=paper_factor if kd.paper_weights and kd.distance == "wasserstein" else None,
        labels=labels,
    )

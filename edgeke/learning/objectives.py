"""Objectives: from a network and a batch to `{"loss": ..., "logits": ..., named parts}`.

The fit loop calls them all alike, whether they are labels alone, distillation or joint exits.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeke.learning.distances import DISTANCES, class_costs
from edgeke.learning.frozen import Frozen
from edgeke.learning.frozen_trunk import Answers
from edgeke.learning.images import Images
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, Optimisation

# (network, normalised images [N, C, H, W], targets) -> loss [], logits [E, N, K], parts [E]
# Targets are labels [N], or class probabilities [N, K] where images were mixed.
Objective = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


class CrossEntropy:
    """sum_e w_e CE_e: cross-entropy with the targets at every exit of the network.

    `weights` `[E]`; None averages over the exits. `class_weights` `[K]` weigh the images of a
    batch by their class, and their sum is divided by that of the weights.
    """

    def __init__(
        self,
        weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
    ) -> None:
        self.weights = weights
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights

    def __call__(self, network: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = network(images)
        losses = self.per_exit(logits, targets)
        return {"loss": self.weighted(losses), "logits": logits, "cross_entropy": losses.detach()}

    def per_exit(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every exit, `[E]`."""
        smoothing, weights = self.label_smoothing, self.class_weights
        return torch.stack(
            [
                F.cross_entropy(at_exit, targets, weights, label_smoothing=smoothing)
                for at_exit in logits
            ]
        )

    def weighted(self, losses: Tensor) -> Tensor:
        """The weighted sum over exits, or their mean."""
        if self.weights is None:
            return losses.mean()
        return (losses * torch.tensor(self.weights, device=losses.device)).sum()


def class_weights(images: Images, optimisation: Optimisation) -> Tensor | None:
    """Weights `[K]` of the classes in cross-entropy; None where all images count alike.

    `balanced`: N / (K n_k) for a class with n_k of the N training images, so that every class has
    the same say; 1 for a class without images.
    """
    if optimisation.class_weights == "none":
        return None
    counts = torch.bincount(images.train_labels, minlength=len(images.classes))
    balanced = len(images.train_labels) / (len(images.classes) * counts.clamp(min=1))
    return torch.where(counts > 0, balanced, torch.ones_like(balanced))


class Distillation:
    """sum_e w_e ((1 - beta) CE_e + beta T^2 D_e) (Hinton et al. 2015).

    D_e is the distance to each supervisor, averaged: frozen networks that answer `[1, N, K]`, and,
    with `from_main`, the network's own last exit for all exits before it (Zhang et al. 2019). An
    exit without supervisor learns from labels alone. T^2 keeps the size of a divergence's gradient
    independent of the temperature; that of `wasserstein` grows with T. With `paper_factor` an
    exit's loss is CE_e + paper_factor T^2 D_e. Class weights are those of the cross-entropy alone:
    a distance is a mean over images, and the teacher's answers, which it comes from, were weighted
    when the teacher learned.
    """

    def __init__(
        self,
        supervisors: Sequence[nn.Module],
        kd: KD,
        costs: Tensor,
        *,
        labels: CrossEntropy,
        from_main: bool = False,
        paper_factor: float | None = None,
    ) -> None:
        self.supervisors = [Frozen(supervisor) for supervisor in supervisors]
        self.kd, self.costs, self.labels, self.from_main = kd, costs, labels, from_main
        self.distance = DISTANCES[kd.distance]
        weights = (1 - kd.beta, kd.beta) if paper_factor is None else (1.0, paper_factor)
        self.label_weight, self.distance_weight = weights

    def __call__(self, network: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits, temperature = network(images), self.kd.temperature
        cross_entropy = self.labels.per_exit(logits, targets)
        supervised = [supervisor(images)[-1] for supervisor in self.supervisors]
        labels = targets if targets.dim() == 1 else targets.argmax(dim=-1)
        losses, distances = [], []
        for exit, at_exit in enumerate(logits):
            answers = list(supervised)
            if self.from_main and exit < len(logits) - 1:
                answers.append(logits[-1].detach())
            if not answers:
                losses.append(cross_entropy[exit])
                distances.append(logits.new_zeros(()))
                continue
            distance = torch.stack(
                [self.distance(at_exit, a, temperature, labels, self.costs) for a in answers]
            ).mean()
            guided = self.label_weight * cross_entropy[exit]
            losses.append(guided + self.distance_weight * temperature**2 * distance)
            distances.append(distance.detach())
        return {
            "loss": self.labels.weighted(torch.stack(losses)),
            "logits": logits,
            "cross_entropy": cross_entropy.detach(),
            "distance": torch.stack(distances),
        }


def make_objective(
    kd: KD,
    teacher: BranchyNet | Answers | None,
    *,
    main: nn.Module | None = None,
    joint: bool = False,
    weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    paper_factor: float | None = None,
) -> Objective:
    """The objective that `kd` describes; `teacher` may be None when its distance is none.

    `main` is the network's trained main exit where it supervises a phase; `joint` says that all
    exits learn together, so that the main exit supervises as it learns. Without either, the teacher
    supervises whatever `kd.source` says. `paper_factor` counts under `kd.paper_weights` alone.
    """
    labels = CrossEntropy(weights, label_smoothing, class_weights)
    if kd.distance == "none":
        return labels
    if teacher is None:
        raise ValueError(f"distance {kd.distance} needs a teacher")
    by_main = main is not None or joint
    supervisors: list[nn.Module] = [teacher] if kd.source != "main" or not by_main else []
    if main is not None and kd.source != "teacher":
        supervisors.append(main)
    return Distillation(
        supervisors,
        kd,
        class_costs(teacher.class_vectors()),
        labels=labels,
        from_main=joint and kd.source != "teacher",
        paper_factor=paper_factor if kd.paper_weights and kd.distance == "wasserstein" else None,
    )

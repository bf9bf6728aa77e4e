"""Objectives: from a network and a batch to `{"loss": ..., "logits": ..., named parts}`.

The fit loop knows only this call, so labels alone and distillation are one line apart.
"""

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from edgeke.learning.distances import DISTANCES
from edgeke.learning.frozen import Frozen
from edgeke.params import KD

__all__ = ["CrossEntropy", "Distillation", "Objective", "make_objective"]

# (network, normalised images [N, C, H, W], labels [N]) -> loss [], logits [E, N, K], parts []
Objective = Callable[[nn.Module, Tensor, Tensor], dict[str, Tensor]]


class CrossEntropy:
    """Cross-entropy with the labels, averaged over the exits the network answers at."""

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = network(images)
        loss = _cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits, "cross_entropy": loss.detach()}


class Distillation:
    """(1 - beta) CE + beta T^2 D(student/T, teacher/T), averaged over exits (Hinton et al. 2015).

    T^2 keeps the size of D's gradient independent of the temperature.
    """

    def __init__(self, teacher: nn.Module, kd: KD) -> None:
        self.teacher = Frozen(teacher)
        self.kd = kd
        self.distance = DISTANCES[kd.distance]

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        beta, temperature = self.kd.beta, self.kd.temperature
        logits = network(images)
        cross_entropy = _cross_entropy(logits, labels)
        # The teacher answers at one exit, so [1, N, K] broadcasts over the student's [E, N, K].
        distance = self.distance(logits, self.teacher(images), temperature).mean()
        loss = (1 - beta) * cross_entropy + beta * temperature**2 * distance
        return {
            "loss": loss,
            "logits": logits,
            "cross_entropy": cross_entropy.detach(),
            "distance": distance.detach(),
        }


def make_objective(kd: KD, teacher: nn.Module | None) -> Objective:
    """Distillation under `teacher`, or cross-entropy alone when `kd.distance` is none."""
    if kd.distance == "none":
        return CrossEntropy()
    if teacher is None:
        raise ValueError(f"distance {kd.distance} needs a teacher")
    return Distillation(teacher, kd)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from edgeke.learning.distances import kl
from edgeke.learning.objectives import CrossEntropy, Distillation, make_objective
from edgeke.params import KD


class Fixed(nn.Module):
    """Answers with its own logits `[E, N, K]`."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.logits + 0 * images.sum()


def fixed(seed: int, exits: int = 1) -> Fixed:
    return Fixed(torch.randn(exits, 4, 3, generator=torch.Generator().manual_seed(seed)))


IMAGES, LABELS = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 2, 0])


def test_distillation_is_the_weighted_sum():
    student, teacher, kd = fixed(0), fixed(1), KD("kl", 0.3, 4.0)
    outcome = Distillation(teacher, kd)(student, IMAGES, LABELS)
    distance = kl(student.logits[0], teacher.logits[0], 4.0).mean()
    expected = 0.7 * F.cross_entropy(student.logits[0], LABELS) + 0.3 * 16 * distance
    assert torch.allclose(outcome["loss"], expected)
    assert torch.allclose(outcome["distance"], distance)


def test_the_teacher_pulls_and_does_not_move():
    student, teacher = fixed(0), fixed(1)
    outcome = Distillation(teacher, KD("kl", 1.0, 4.0))(student, IMAGES, LABELS)
    outcome["loss"].backward()
    assert student.logits.grad is not None
    assert student.logits.grad.abs().max() > 0
    assert not teacher.logits.requires_grad
    stepped = Fixed(student.logits.detach() - 0.5 * student.logits.grad)
    closer = Distillation(teacher, KD("kl", 1.0, 4.0))(stepped, IMAGES, LABELS)
    assert closer["distance"] < outcome["distance"]


def test_several_exits_are_averaged():
    student, teacher = fixed(0, exits=2), fixed(1)
    together = Distillation(teacher, KD("js", 0.5, 2.0))(student, IMAGES, LABELS)["loss"]
    alone = [
        Distillation(teacher, KD("js", 0.5, 2.0))(Fixed(one[None]), IMAGES, LABELS)["loss"]
        for one in student.logits.detach()
    ]
    assert torch.allclose(together, torch.stack(alone).mean())


def test_none_means_no_teacher():
    assert isinstance(make_objective(KD("none", 0.5, 4.0), None), CrossEntropy)
    with pytest.raises(ValueError, match="needs a teacher"):
        make_objective(KD("kl", 0.5, 4.0), None)

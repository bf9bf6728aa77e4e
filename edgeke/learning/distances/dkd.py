"""Decoupled knowledge distillation (Zhao et al. 2022)."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dkd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    labels: Tensor,
    target_weight: float = 1.0,
    other_weight: float = 8.0,
) -> Tensor:
    """target_weight TCKD + other_weight NCKD; the defaults are the paper's for CIFAR-100.

    TCKD is KL between (p_label, 1 - p_label) of teacher and student, NCKD is KL between their
    distributions over the other classes. KL itself is TCKD + (1 - t_label) NCKD: the better the
    teacher knows an image, the less plain KL says about the other classes. Logits `[..., N, K]`,
    labels `[N]`; returns `[..., N]`, in nats.
    """
    teacher_logits = teacher_logits.expand_as(student_logits)
    others = ~F.one_hot(labels, student_logits.shape[-1]).bool().expand_as(student_logits)
    student, student_others = _split(student_logits / temperature, others)
    teacher, teacher_others = _split(teacher_logits / temperature, others)
    target = (teacher.exp() * (teacher - student)).sum(dim=-1)
    other = (teacher_others.exp() * (teacher_others - student_others)).sum(dim=-1)
    return target_weight * target + other_weight * other


def _split(logits: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (label, not label) `[..., 2]` and among the others `[..., K - 1]`."""
    rest = logits[others].view(*logits.shape[:-1], -1)
    label = logits[~others].view(*logits.shape[:-1], 1)
    binary = torch.cat([label, rest.logsumexp(dim=-1, keepdim=True)], dim=-1)
    return F.log_softmax(binary, dim=-1), F.log_softmax(rest, dim=-1)

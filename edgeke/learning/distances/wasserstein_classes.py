"""Class-aware Wasserstein distance: optimal transport between classes (after Lv et al. 2024)."""

import torch
from torch import Tensor
from torch.nn import functional as F

_EPSILON = 0.1  # entropic regularisation, as a share of the largest cost
_STEPS = 20


def class_costs(class_vectors: Tensor) -> Tensor:
    """Cost of moving probability between classes, `[K, K]` in [0, 1], zero on the diagonal.

    One minus the cosine similarity of the teacher's class vectors `[K, D]` (the rows of its last
    linear layer, centred), divided by the largest: cheap between classes that it finds alike.
    """
    rows = F.normalize(class_vectors - class_vectors.mean(dim=0), dim=-1)
    costs = (1 - rows @ rows.T).clamp(min=0).fill_diagonal_(0)
    return costs / costs.max().clamp(min=torch.finfo(costs.dtype).tiny)


def wasserstein_classes(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float, costs: Tensor
) -> Tensor:
    """Debiased Sinkhorn divergence S(s, t) with s, t = softmax(logits / temperature).

    S(s, t) = OT(s, t) - OT(s, s) / 2 - OT(t, t) / 2, where OT is entropic optimal transport with
    costs `[K, K]` in [0, 1] and regularisation 0.1 (Feydy et al. 2019). Zero for s = t; for
    distributions on single classes it is their cost; elsewhere it was seen within 0.1 of exact
    transport. Logits `[..., K]`; returns `[...]`. The gradient goes through the 20 Sinkhorn steps:
    the gradient of the converged transport needs hundreds of them to be as good.
    """
    student_log = F.log_softmax(student_logits / temperature, dim=-1)
    teacher_log = F.log_softmax(teacher_logits / temperature, dim=-1)
    teacher_log = teacher_log.expand_as(student_log)
    costs = costs.to(student_log)
    to_teacher, to_student = _potentials(student_log, teacher_log, costs)
    within_student, _ = _potentials(student_log, student_log, costs)
    within_teacher, _ = _potentials(teacher_log, teacher_log, costs)
    moved = student_log.exp() * (to_teacher - within_student)
    received = teacher_log.exp() * (to_student - within_teacher)
    return (moved + received).sum(dim=-1)


def _potentials(first: Tensor, second: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Dual potentials of both sides, `[..., K]`, by averaged Sinkhorn steps in the log domain.

    Both sides step at once, so that equal distributions keep equal potentials exactly.
    """
    f, g = torch.zeros_like(first), torch.zeros_like(second)
    for _ in range(_STEPS):
        f, g = (f + _soft_minimum(second, g, costs)) / 2, (g + _soft_minimum(first, f, costs.T)) / 2
    return _soft_minimum(second, g, costs), _soft_minimum(first, f, costs.T)


def _soft_minimum(log_weights: Tensor, potential: Tensor, costs: Tensor) -> Tensor:
    exponents = log_weights + potential / _EPSILON
    return (exponents.unsqueeze(-2) - costs / _EPSILON).logsumexp(dim=-1) * -_EPSILON

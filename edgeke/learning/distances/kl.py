"""Kullback-Leibler divergence from the teacher (Hinton et al. 2015)."""

from torch import Tensor
from torch.nn import functional as F


def kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """sum_k t_k ln(t_k / s_k) with s, t = softmax(logits / temperature); SciPy's entropy(t, s).

    Logits `[..., K]`; returns `[...]`, in nats.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1)

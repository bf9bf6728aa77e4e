"""Jensen-Shannon divergence (Lin 1991)."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def js(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """(KL(s || m) + KL(t || m)) / 2 with m = (s + t) / 2 and s, t = softmax(logits / temperature).

    The square of SciPy's jensenshannon(s, t). Logits `[..., K]`; returns `[...]`, in nats, at most
    ln 2. Near s = t its gradient is a quarter of KL's.
    """
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    mean = torch.logaddexp(student, teacher) - math.log(2)
    parts = student.exp() * (student - mean) + teacher.exp() * (teacher - mean)
    return parts.sum(dim=-1) / 2

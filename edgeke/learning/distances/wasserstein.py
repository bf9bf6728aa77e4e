"""The paper's Wasserstein distance, between sorted probability values (Fang et al. 2021)."""

from torch import Tensor


def wasserstein(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """mean_k |sort(s)_k - sort(t)_k| with s, t = softmax(logits / temperature).

    SciPy's wasserstein_distance(s, t) on the probability values. Logits `[..., K]`; returns
    `[...]`. Sorting forgets which class is which: it matches the teacher's sharpness, not its
    answer.
    """
    student = (student_logits / temperature).softmax(dim=-1).sort(dim=-1).values
    teacher = (teacher_logits / temperature).softmax(dim=-1).sort(dim=-1).values
    return (student - teacher).abs().mean(dim=-1)

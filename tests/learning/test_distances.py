import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy, wasserstein_distance

from edgeke.learning.distances import DISTANCES

SCIPY = {
    "kl": lambda s, t: entropy(t, s),
    "js": lambda s, t: jensenshannon(s, t) ** 2,
    "wasserstein": lambda s, t: wasserstein_distance(s, t),
}


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(6, 7, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_equal_scipys(name, temperature):
    student, teacher = logits(0), logits(1)
    found = DISTANCES[name](student, teacher, temperature)
    expected = [
        SCIPY[name](softmax(s / temperature), softmax(t / temperature))
        for s, t in zip(student.numpy(), teacher.numpy(), strict=True)
    ]
    assert np.allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", DISTANCES)
def test_the_gradient_is_the_true_one_and_not_zero(name):
    student = logits(0).requires_grad_()
    teacher = logits(1)
    assert torch.autograd.gradcheck(lambda s: DISTANCES[name](s, teacher, 2.0), (student,))
    DISTANCES[name](student, teacher, 2.0).sum().backward()
    assert student.grad is not None
    assert (student.grad.abs().sum(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_zero_when_the_student_equals_the_teacher(name):
    same = logits(0)
    assert DISTANCES[name](same, same.clone(), 4.0).abs().max() < 1e-9


@pytest.mark.parametrize("name", DISTANCES)
def test_extreme_logits_stay_finite(name):
    student = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]], requires_grad=True)
    teacher = torch.tensor([[-1e4, 1e4, 0.0], [-1e4, 1e4, 0.0]])
    value = DISTANCES[name](student, teacher, 1.0)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("name", DISTANCES)
def test_one_teacher_for_several_exits(name):
    students, teacher = torch.stack([logits(0), logits(2)]), logits(1)
    together = DISTANCES[name](students, teacher[None], 4.0)
    assert together.shape == (2, 6)
    assert torch.allclose(together[1], DISTANCES[name](students[1], teacher, 4.0))

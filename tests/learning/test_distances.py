import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import entropy, wasserstein_distance

from edgeke.learning.distances import DISTANCES, class_costs, dkd, kl, wasserstein_classes

LABELS = torch.tensor([0, 1, 2, 3, 4, 5])
COSTS = class_costs(
    torch.randn(7, 5, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
)


def distance(name, student, teacher, temperature):
    return DISTANCES[name](student, teacher, temperature, LABELS[: student.shape[-2]], COSTS)


def logits(seed: int, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(6, 7, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("kl", lambda s, t: entropy(t, s)),
        ("js", lambda s, t: jensenshannon(s, t) ** 2),
        ("wasserstein", lambda s, t: wasserstein_distance(s, t)),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_values_equal_scipys(name, expected, temperature):
    student, teacher = logits(0), logits(1)
    values = distance(name, student, teacher, temperature)
    pairs = zip(student.numpy(), teacher.numpy(), strict=True)
    by_scipy = [expected(softmax(s / temperature), softmax(t / temperature)) for s, t in pairs]
    assert np.allclose(values.numpy(), by_scipy, rtol=1e-9, atol=1e-12)


def test_dkd_decouples_kl():
    """With its natural weights, TCKD + (1 - t_label) NCKD is KL (Zhao et al., equation 7)."""
    student, teacher = logits(0), logits(1)
    target = dkd(student, teacher, 2.0, LABELS, 1.0, 0.0)
    other = dkd(student, teacher, 2.0, LABELS, 0.0, 1.0)
    at_label = (teacher / 2).softmax(-1).gather(-1, LABELS[:, None])[:, 0]
    assert torch.allclose(target + (1 - at_label) * other, kl(student, teacher, 2.0))
    assert torch.allclose(dkd(student, teacher, 2.0, LABELS), target + 8 * other)


def transport(s: np.ndarray, t: np.ndarray, costs: np.ndarray) -> float:
    """Unregularised optimal transport as a linear programme."""
    size = len(s)
    rows = np.kron(np.eye(size), np.ones(size))
    columns = np.kron(np.ones(size), np.eye(size))
    solved = linprog(
        costs.ravel(), A_eq=np.vstack([rows, columns]), b_eq=np.concatenate([s, t]), method="highs"
    )
    return float(solved.fun)


def test_class_aware_wasserstein_is_near_the_linear_programme():
    """The regularised divergence stays within 0.1 (of a largest cost of 1) of exact transport."""
    student, teacher = logits(0), logits(1)
    values = wasserstein_classes(student, teacher, 1.0, COSTS)
    for value, s, t in zip(values, student.numpy(), teacher.numpy(), strict=True):
        exact = transport(softmax(s), softmax(t), COSTS.numpy())
        assert float(value) == pytest.approx(exact, abs=0.1)


def test_the_classes_matter_to_one_wasserstein_and_not_to_the_other():
    teacher = torch.tensor([[4.0, 1, 0, 0, 0, 0, 0]], dtype=torch.float64)
    swapped = teacher[:, [1, 0, 2, 3, 4, 5, 6]]
    assert float(distance("wasserstein", swapped, teacher, 1.0)) == 0
    assert float(distance("wasserstein_classes", swapped, teacher, 1.0)) > 0.05


@pytest.mark.parametrize("name", DISTANCES)
def test_the_gradient_is_the_true_one_and_not_zero(name):
    student = logits(0, scale=1.5).requires_grad_()
    teacher = logits(1, scale=1.5)
    assert torch.autograd.gradcheck(lambda s: distance(name, s, teacher, 2.0), (student,))
    distance(name, student, teacher, 2.0).sum().backward()
    assert student.grad is not None
    assert (student.grad.abs().sum(dim=-1) > 1e-4).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_extreme_logits_stay_finite(name):
    student = torch.zeros(2, 7)
    student[0, 0], student[0, 1], student[1, 0], student[1, 1] = 1e4, -1e4, -1e4, 1e4
    teacher = student[[1, 1]].clone()
    student.requires_grad_()
    value = distance(name, student, teacher, 1.0)
    value.sum().backward()
    assert value.isfinite().all()
    assert student.grad is not None
    assert student.grad.isfinite().all()

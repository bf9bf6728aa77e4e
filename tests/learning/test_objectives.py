import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import randomise, replace

from edgeke.learning.distances import js, kl, wasserstein
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy, Distillation, class_weights, make_objective
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit
from edgeke.params import KD

HALF = KD("kl", 0.5, 4.0, "teacher", False)


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
COSTS = torch.ones(3, 3) - torch.eye(3)


def distil(supervisors, kd, *, labels=None, **options):
    return Distillation(supervisors, kd, COSTS, labels=labels or CrossEntropy(), **options)


def test_distillation_is_the_weighted_sum():
    student, teacher, kd = fixed(0), fixed(1), replace(HALF, beta=0.3)
    outcome = distil([teacher], kd)(student, IMAGES, LABELS)
    distance = kl(student.logits[0], teacher.logits[0], 4.0).mean()
    expected = 0.7 * F.cross_entropy(student.logits[0], LABELS) + 0.3 * 16 * distance
    assert torch.allclose(outcome["loss"], expected)
    assert torch.allclose(outcome["distance"], distance)


def test_exits_are_averaged_or_weighted():
    student, teacher = fixed(0, exits=2), fixed(1)
    exits = [Fixed(logits[None]) for logits in student.logits.detach()]
    alone = [distil([teacher], HALF)(exit, IMAGES, LABELS)["loss"] for exit in exits]
    averaged = distil([teacher], HALF)(student, IMAGES, LABELS)["loss"]
    assert torch.allclose(averaged, (alone[0] + alone[1]) / 2)
    weighted = distil([teacher], HALF, labels=CrossEntropy((0.2, 0.6)))
    expected = 0.2 * alone[0] + 0.6 * alone[1]
    assert torch.allclose(weighted(student, IMAGES, LABELS)["loss"], expected)


def test_the_main_exit_supervises_the_others_and_is_not_pulled():
    student, kd = fixed(0, exits=3), replace(HALF, distance="js", beta=1.0, source="main")
    outcome = distil([], kd, from_main=True)(student, IMAGES, LABELS)
    expected = [js(student.logits[e], student.logits[2], 4.0).mean() for e in (0, 1)]
    assert torch.allclose(outcome["distance"][:2], torch.stack(expected))
    assert outcome["distance"][2] == 0
    outcome["loss"].backward()
    # The main exit learns from labels alone: its gradient is that of cross-entropy.
    main = student.logits.detach()[2].requires_grad_()
    (F.cross_entropy(main, LABELS) / 3).backward()
    assert torch.allclose(student.logits.grad[2], main.grad)


def test_two_supervisors_are_averaged():
    student, teacher = fixed(0, exits=2), fixed(1)
    both = distil([teacher], replace(HALF, source="both"), from_main=True)
    outcome = both(student, IMAGES, LABELS)
    from_teacher = kl(student.logits[0], teacher.logits[0], 4.0).mean()
    from_main = kl(student.logits[0], student.logits[1], 4.0).mean()
    assert torch.allclose(outcome["distance"][0], (from_teacher + from_main) / 2)
    last = kl(student.logits[1], teacher.logits[0], 4.0).mean()
    assert torch.allclose(outcome["distance"][1], last)


def test_balanced_classes_have_the_same_say_in_cross_entropy_and_none_in_distances(dataset, plan):
    images = Images.of(dataset, torch.device("cpu"))
    skewed = replace(images, train_labels=torch.tensor([0] * 6 + [1] * 2))
    weights = class_weights(skewed, replace(plan.optimisation, class_weights="balanced"))
    assert weights.tolist() == pytest.approx([8 / 18, 8 / 6, 1.0])  # no image of the third
    assert class_weights(skewed, plan.optimisation) is None
    student, teacher = fixed(0), fixed(1)
    outcome = distil([teacher], HALF, labels=CrossEntropy(class_weights=weights))(
        student, IMAGES, LABELS
    )
    each = F.cross_entropy(student.logits[0], LABELS, reduction="none")
    by_hand = (each * weights[LABELS]).sum() / weights[LABELS].sum()
    assert torch.allclose(outcome["cross_entropy"][0], by_hand)
    plain = distil([teacher], HALF)(student, IMAGES, LABELS)
    assert torch.equal(outcome["distance"], plain["distance"])


def test_mixed_targets_are_probabilities():
    student, teacher = fixed(0), fixed(1)
    mixed = 0.75 * F.one_hot(LABELS, 3).float() + 0.25 * F.one_hot(LABELS.flip(0), 3).float()
    outcome = CrossEntropy()(student, IMAGES, mixed)
    log_probabilities = student.logits[0].log_softmax(-1)
    assert torch.allclose(outcome["loss"], -(mixed * log_probabilities).sum(-1).mean())
    dkd = replace(HALF, distance="dkd")
    hard = distil([teacher], dkd)(student, IMAGES, LABELS)["distance"]
    assert torch.allclose(distil([teacher], dkd)(student, IMAGES, mixed)["distance"], hard)


def real_teacher() -> BranchyNet:
    return randomise(BranchyNet(single_exit(Backbone("resnet10", 1, 3, 8, 4))))


@pytest.mark.parametrize("factor", [1.0, 2.0, None])
def test_the_published_weights_of_wasserstein(factor):
    """CE + factor T^2 W, or (1 - beta) CE + beta T^2 W."""
    kd = replace(HALF, distance="wasserstein", beta=0.3, paper_weights=True)
    teacher, images = real_teacher(), torch.randn(4, 1, 8, 8)
    student = fixed(0)
    distance = wasserstein(student.logits[0], teacher(images)[0], 4.0).mean()
    label_weight, distance_weight = (0.7, 0.3) if factor is None else (1.0, factor)
    expected = label_weight * F.cross_entropy(student.logits[0], LABELS)
    expected = expected + distance_weight * 16 * distance
    loss = make_objective(kd, teacher, paper_factor=factor)(student, images, LABELS)["loss"]
    assert torch.allclose(loss, expected, atol=1e-6)

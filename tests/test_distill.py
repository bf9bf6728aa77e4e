import pytest
import torch
from toys import with_recipe

from edgeke.distill import distill
from edgeke.learning.distances import DISTANCES
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD


def quiet(epoch: int, row: dict[str, float]) -> None:
    return


@pytest.fixture
def teacher(dataset) -> BranchyNet:
    torch.manual_seed(3)
    return BranchyNet(Architecture.single("resnet10", 8, 1, len(dataset.classes))).eval()


@pytest.mark.parametrize("distance", [*DISTANCES, "none"])
def test_every_distance_trains_a_branch_alone(dataset, architecture, plan, teacher, distance):
    kd = KD(distance, 0.5, 4.0, "teacher", False)
    supervisor = None if distance == "none" else teacher
    trained = distill(dataset, architecture, 0, supervisor, kd, plan, on_epoch=quiet)
    assert trained.network.architecture == architecture.branch(0)
    assert len(trained.history) == plan.recipe.epochs


def test_the_teacher_changes_the_branch_and_stays_as_it_was(dataset, architecture, plan, teacher):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    runs = [
        distill(
            dataset,
            architecture,
            2,
            teacher,
            KD("kl", beta, 4.0, "teacher", False),
            plan,
            on_epoch=quiet,
        )
        for beta in (0.0, 0.9)
    ]
    states = [run.network.state_dict() for run in runs]
    assert any(not torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_beta_zero_is_training_without_a_teacher(dataset, architecture, plan, teacher):
    one = with_recipe(plan, epochs=1)
    with_teacher = distill(
        dataset, architecture, 1, teacher, KD("kl", 0.0, 4.0, "teacher", False), one, on_epoch=quiet
    )
    without = distill(
        dataset, architecture, 1, None, KD("none", 0.0, 4.0, "teacher", False), one, on_epoch=quiet
    )
    for key, value in without.network.state_dict().items():
        assert torch.allclose(value.float(), with_teacher.network.state_dict()[key].float())

import copy

import pytest
import torch
from toys import randomise

from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD
from edgeke.train_branchynet import exit_metrics, train_branchynet

NO_TEACHER = KD("none", 0.0, 4.0)


def train(dataset, architecture, order, start, recipe, kd=NO_TEACHER, teacher=None, log=None):
    return train_branchynet(
        dataset,
        architecture,
        order,
        start,
        teacher,
        kd,
        recipe,
        seed=0,
        on_epoch=log or (lambda epoch, row: None),
    )


@pytest.mark.parametrize(("order", "first"), [("asynchronous", 2), ("asynchronous_back", 0)])
def test_what_was_trained_first_is_bit_identical_afterwards(
    dataset, architecture, recipe, order, first
):
    """The frozen trunk, batch-norm statistics included, and the exit that is not trained again."""
    branch = randomise(BranchyNet(architecture.branch(first)), seed=4)
    before = copy.deepcopy(branch.state_dict())
    trained = train(dataset, architecture, order, (first, branch), recipe).network
    after = trained.branch(first).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("order", "first"), [("asynchronous", 2), ("asynchronous_back", 0)])
def test_the_other_exits_learn(dataset, architecture, recipe, order, first):
    branch = randomise(BranchyNet(architecture.branch(first)), seed=4)
    rows = []
    trained = train(
        dataset, architecture, order, (first, branch), recipe, log=lambda e, row: rows.append(row)
    )
    others = [e for e in range(3) if e != first]
    named = {key.split("/")[1] for row in rows for key in row}
    assert named == {f"exit_{e}" for e in others}
    assert len(trained.history) == recipe.epochs
    assert {key.split("/")[1] for key in trained.history[0]} == named
    for e in others:
        key = f"train/exit_{e}/loss"
        assert trained.history[-1][key] < trained.history[0][key]


def test_a_teacher_supervises_every_phase(dataset, architecture, recipe):
    teacher = randomise(BranchyNet(Architecture.single("resnet10", 8, 1, 3)), seed=9)
    start = (2, randomise(BranchyNet(architecture.branch(2)), seed=4))
    with_kd = train(
        dataset, architecture, "asynchronous", start, recipe, KD("kl", 0.9, 4.0), teacher
    )
    without = train(dataset, architecture, "asynchronous", start, recipe)
    for e in (0, 1):
        weight = f"exits.{e}.head.3.weight"
        assert not torch.equal(
            with_kd.network.state_dict()[weight], without.network.state_dict()[weight]
        )


def test_metrics_of_every_exit(dataset, network):
    metrics = exit_metrics(network, dataset)
    assert set(metrics) == {
        f"validation/exit_{e}/{what}" for e in range(3) for what in ("loss", "accuracy")
    }
    alone = exit_metrics(network.branch(1), dataset)
    assert metrics["validation/exit_1/loss"] == pytest.approx(alone["validation/exit_0/loss"])

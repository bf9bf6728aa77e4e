import copy

import pytest
import torch
from toys import randomise, replace

from edgeke.learning.orders import ORDERS
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD
from edgeke.train_branchynet import exit_metrics, train_branchynet

NO_TEACHER = KD("none", 0.0, 4.0, "teacher", False)
WEIGHTS = (0.2, 0.2, 0.6)


def train(dataset, architecture, name, plan, kd=NO_TEACHER, teacher=None, log=None):
    """Train in an order from random branches; returns them, too."""
    order = ORDERS[name](architecture.depths)
    student = replace(architecture, shared=order.shared)
    branches = {e: randomise(BranchyNet(architecture.branch(e)), seed=e) for e in order.starts}
    trained = train_branchynet(
        dataset,
        student,
        order,
        branches,
        teacher,
        kd,
        WEIGHTS,
        [plan] * len(order.phases),
        on_epoch=log or (lambda epoch, row: None),
    )
    return trained, branches


@pytest.mark.parametrize("order", ["asynchronous", "asynchronous_back", "independent"])
def test_what_was_trained_first_is_bit_identical_afterwards(dataset, architecture, plan, order):
    """The frozen trunk, batch-norm statistics included, and the exits not trained again."""
    trained, branches = train(dataset, architecture, order, plan)
    assert branches
    for number, branch in branches.items():
        before, after = branch.state_dict(), trained.network.branch(number).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("order", "others"),
    [
        ("asynchronous", {0, 1}),
        ("asynchronous_back", {1, 2}),
        ("synchronous", {0, 1, 2}),
        ("mixed", {0, 1, 2}),
        ("independent", set()),
    ],
)
def test_the_other_exits_learn(dataset, architecture, plan, order, others):
    rows = []
    trained, _ = train(dataset, architecture, order, plan, log=lambda e, row: rows.append(row))
    named = {key.split("/")[1] for row in rows for key in row if "exit_" in key}
    assert named == {f"exit_{e}" for e in others}
    assert len(trained.history) == (plan.recipe.epochs if others else 0)
    losses = [
        key for key in (trained.history or [{}])[0] if key.startswith("train/") and "loss" in key
    ]
    assert bool(losses) == bool(others)
    for key in losses:
        assert trained.history[-1][key] < trained.history[0][key]


def test_a_joint_order_moves_everything(dataset, architecture, plan):
    trained, branches = train(dataset, architecture, "mixed", plan)
    before, after = branches[2].state_dict(), trained.network.branch(2).state_dict()
    assert not any(torch.equal(before[k], after[k]) for k in before if k.endswith("weight"))


@pytest.mark.parametrize("order", ["asynchronous", "synchronous", "mixed"])
@pytest.mark.parametrize("source", ["teacher", "main", "both"])
def test_every_source_supervises(dataset, architecture, plan, order, source):
    teacher = randomise(BranchyNet(Architecture.single("resnet10", 8, 1, 3)), seed=9)
    kd = KD("kl", 0.9, 4.0, source, False)
    before = copy.deepcopy(teacher.state_dict())
    guided, _ = train(dataset, architecture, order, plan, kd, teacher)
    alone, _ = train(dataset, architecture, order, plan)
    weight = "exits.0.head.3.weight"
    assert not torch.equal(guided.network.state_dict()[weight], alone.network.state_dict()[weight])
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_metrics_of_every_exit(dataset, network):
    metrics = exit_metrics(network, dataset)
    assert set(metrics) == {
        f"validation/exit_{e}/{what}" for e in range(3) for what in ("loss", "accuracy")
    }
    alone = exit_metrics(network.branch(1), dataset)
    assert metrics["validation/exit_1/loss"] == pytest.approx(alone["validation/exit_0/loss"])

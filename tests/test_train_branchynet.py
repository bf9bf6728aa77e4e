import copy

import pytest
import torch
from toys import randomise, replace, with_recipe

from edgeke.learning.fit import fit
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy
from edgeke.learning.orders import ORDERS
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit
from edgeke.params import KD, Network
from edgeke.train_branchynet import train_branchynet

FRESH = Network("resnet10", 4)
NO_TEACHER = KD("none", 0.0, 4.0, "teacher", False)
WEIGHTS = (0.2, 0.2, 0.6)


def train(dataset, architecture, name, plan, kd=NO_TEACHER, teacher=None, **options):
    """Train in an order from random branches; returns result, plain network and branches."""
    order = ORDERS[name](architecture.depths)
    student = replace(architecture, shared=order.shared)
    branches = {e: randomise(BranchyNet(architecture.branch(e)), seed=e) for e in range(3)}
    plans = options.pop("plans", [plan] * len(order.phases))
    settings = {"weights": WEIGHTS, "detach": False, "on_epoch": lambda *_: None, **options}
    trained, plain = train_branchynet(
        dataset,
        student,
        order,
        branches,
        teacher,
        kd,
        plans,
        start=FRESH,
        seed=plan.seed,
        **settings,
    )
    return trained, plain, branches


def equal(first: BranchyNet, second: BranchyNet) -> bool:
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    ("order", "starts"),
    [("asynchronous", [2]), ("asynchronous_back", [0]), ("independent", [0, 1, 2])],
)
def test_what_was_trained_first_is_bit_identical_afterwards(
    dataset, architecture, plan, order, starts
):
    """The frozen trunk, batch-norm statistics included, and the exits not trained again."""
    trained, plain, branches = train(dataset, architecture, order, plan)
    assert all(equal(branches[number], trained.network.branch(number)) for number in starts)
    assert equal(plain, branches[2])  # the distilled main branch


@pytest.mark.parametrize(
    ("order", "others"),
    [
        ("asynchronous", ["exit_0", "exit_1"]),
        ("asynchronous_back", ["exit_1", "exit_2"]),
        ("synchronous", ["exit_0", "exit_1", "exit_2", "plain"]),
        ("mixed", ["exit_0", "exit_1", "exit_2", "plain"]),
        ("independent", []),
    ],
)
def test_the_other_exits_learn(dataset, architecture, plan, order, others):
    rows = []
    trained, *_ = train(
        dataset, architecture, order, plan, on_epoch=lambda e, row: rows.append(row)
    )
    names = {key.split("/")[1] for row in rows for key in row if key.endswith("accuracy")}
    assert sorted(names) == others
    assert len(trained.history) == (plan.recipe.epochs if others else 0)
    losses = [key for key in rows[0] if key.startswith("train/") and "loss" in key] if rows else []
    assert bool(losses) == bool(others)
    for key in losses:
        assert trained.history[-1][key] < trained.history[0][key]


def test_every_phase_has_epochs_of_its_own(dataset, architecture, plan):
    plans = [with_recipe(plan, epochs=3), with_recipe(plan, epochs=1)]
    trained, *_ = train(dataset, architecture, "asynchronous", plan, plans=plans)
    assert ["train/exit_1/loss" in row for row in trained.history] == [True, True, True]
    assert ["train/exit_0/loss" in row for row in trained.history] == [True, False, False]


@pytest.mark.parametrize("order", ["synchronous", "mixed"])
def test_the_plain_network_learns_as_long_as_the_main_exit(dataset, architecture, plan, order):
    trained, plain, branches = train(dataset, architecture, order, plan)
    assert not any(equal(plain, other) for other in (branches[2], trained.network.branch(2)))
    torch.manual_seed(plan.seed)
    start = BranchyNet(architecture.branch(2)) if order == "synchronous" else branches[2]
    alone = [Images.of(dataset, torch.device("cpu")), plan]
    fit(start, CrossEntropy(), *alone, description="alone", on_epoch=lambda *_: None)
    assert equal(plain, start)


@pytest.mark.parametrize("detach", [False, True])
def test_detached_exits_leave_trunk_and_main_exit_alone(dataset, architecture, plan, detach):
    """With `detach` both learn as if the main exit were alone, on its weight of 0.6."""
    trained, _, branches = train(dataset, architecture, "mixed", plan, detach=detach)
    main = branches[2]
    images = Images.of(dataset, torch.device("cpu"))
    objective = CrossEntropy((0.6,))
    fit(main, objective, images, plan, description="main", on_epoch=lambda *_: None)
    assert equal(main, trained.network.branch(2)) == detach
    early = trained.network.branch(0).state_dict()
    before = randomise(BranchyNet(architecture.branch(0)), seed=0).state_dict()
    assert not torch.equal(early["exits.0.head.3.weight"], before["exits.0.head.3.weight"])


@pytest.mark.parametrize("order", ["asynchronous", "synchronous", "mixed"])
@pytest.mark.parametrize("source", ["teacher", "main", "both"])
def test_every_source_supervises(dataset, architecture, plan, order, source):
    teacher = randomise(BranchyNet(single_exit(Backbone("resnet10", 1, 3, 8, 8))), seed=9)
    kd = KD("kl", 0.9, 4.0, source, False)
    before = copy.deepcopy(teacher)
    guided, *_ = train(dataset, architecture, order, plan, kd, teacher)
    alone, *_ = train(dataset, architecture, order, plan)
    weight = "exits.0.head.3.weight"
    assert not torch.equal(guided.network.state_dict()[weight], alone.network.state_dict()[weight])
    assert equal(before, teacher)


def test_a_killed_plain_network_goes_on(dataset, architecture, plan):
    class KilledError(Exception):
        pass

    def die(epoch: int, row: dict[str, float]) -> None:
        if epoch == 2 and "train/plain/loss" in row:
            raise KilledError

    whole, plain, _ = train(dataset, architecture, "mixed", plan)
    whole.remove_checkpoints()
    with pytest.raises(KilledError):
        train(dataset, architecture, "mixed", plan, on_epoch=die)
    rows = []
    again, plain_again, _ = train(
        dataset, architecture, "mixed", plan, on_epoch=lambda e, row: rows.append(row)
    )
    assert equal(whole.network, again.network)
    assert equal(plain, plain_again)
    assert again.history == whole.history

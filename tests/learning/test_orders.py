import copy

import pytest
import torch
from toys import SIZE, randomise, replace

from edgeke.learning.orders import ORDERS, Order, Phase
from edgeke.learning.phases import phase_network
from edgeke.networks.branchynet import BranchyNet


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("asynchronous", Order((2,), (Phase((1,), 7), Phase((0,), 6)))),
        ("asynchronous_back", Order((0,), (Phase((1,), 6), Phase((2,), 7)), paper_factor=2.0)),
        ("synchronous", Order((), (Phase((0, 1, 2), 0),))),
        ("mixed", Order((2,), (Phase((0, 1, 2), 0),))),
        ("independent", Order((0, 1, 2), (), shared=False)),
    ],
)
def test_the_orders_on_resnet18(name, order):
    attached = (6, 7, 9)  # layer3.0, layer3.1, layer4.1
    assert ORDERS[name](attached) == order


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("attached", [(3, 5), (3, 5, 7, 9), (2, 3, 4, 5, 6)])
def test_every_exit_is_trained_or_taken_over_for_any_number_of_exits(order, attached):
    plan = ORDERS[order](attached)
    trained = {exit for phase in plan.phases for exit in phase.exits}
    assert trained | set(plan.starts) == set(range(len(attached)))
    assert all(phase.frozen <= attached[phase.exits[0]] for phase in plan.phases)


@pytest.mark.parametrize("order", ["asynchronous", "asynchronous_back", "synchronous", "mixed"])
def test_a_phase_moves_only_what_it_says(network, order):
    images = torch.randn(8, 1, SIZE, SIZE)
    for phase in ORDERS[order](network.attached).phases:
        before = copy.deepcopy(network.state_dict())
        view = phase_network(network, phase).train()
        optimiser = torch.optim.SGD([p for p in view.parameters() if p.requires_grad], lr=0.1)
        view(images).square().sum().backward()
        optimiser.step()
        moved = {key for key, value in network.state_dict().items() if not before[key].equal(value)}
        end = network.attached[phase.exits[-1]]
        blocks = [{f"backbone.{name}" for name in block.state_dict()} for block in network.trunk]
        assert [not moved.isdisjoint(names) for names in blocks] == [
            phase.frozen <= number < end for number in range(len(blocks))
        ]
        exits = {int(key.split(".")[1]) for key in moved if key.startswith("exits.")}
        assert exits == set(phase.exits)


@torch.no_grad()
def test_independent_branches_lie_side_by_side(architecture):
    side_by_side = BranchyNet(replace(architecture, shared=False))
    images = torch.randn(4, 1, SIZE, SIZE)
    assert len(side_by_side.trunk) == 0
    branches = [randomise(BranchyNet(architecture.branch(e)), seed=e) for e in range(3)]
    for exit, branch in enumerate(branches):
        side_by_side.load_branch(exit, branch)
    side_by_side.eval()
    for exit, branch in enumerate(branches):
        assert torch.equal(side_by_side(images)[exit], branch(images)[0])
        assert torch.equal(side_by_side.branch(exit)(images), branch(images))

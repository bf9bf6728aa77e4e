import copy

import pytest
import torch
from toys import SIZE

from edgeke.learning.orders import ORDERS, Phase, PhaseNetwork, start_exit


def test_phases_of_the_papers_layout():
    attached = (6, 7, 9)  # ResNet18: layer3.0, layer3.1, layer4.1
    assert list(ORDERS["asynchronous"](attached)) == [Phase(1, 7), Phase(0, 6)]
    assert list(ORDERS["asynchronous_back"](attached)) == [Phase(1, 6), Phase(2, 7)]
    assert start_exit("asynchronous", 3) == 2
    assert start_exit("asynchronous_back", 3) == 0


@pytest.mark.parametrize("order", ORDERS)
def test_a_phase_moves_only_what_it_says(network, order):
    images = torch.randn(8, 1, SIZE, SIZE)
    for phase in ORDERS[order](network.attached):
        before = copy.deepcopy(network.state_dict())
        view = PhaseNetwork(network, phase).train()
        optimiser = torch.optim.SGD([p for p in view.parameters() if p.requires_grad], lr=0.1)
        view(images).square().sum().backward()
        optimiser.step()
        moved = {key for key, value in network.state_dict().items() if not before[key].equal(value)}
        end = network.attached[phase.exit]
        allowed = {f"trunk.{i}." for i in range(phase.frozen, end)} | {f"exits.{phase.exit}."}
        assert moved
        assert all(key.startswith(tuple(allowed)) for key in moved)
        assert {key.split(".")[0] + "." + key.split(".")[1] + "." for key in moved} == allowed


@pytest.mark.parametrize("order", ORDERS)
@torch.no_grad()
def test_the_view_answers_like_the_exit(network, order):
    images = torch.randn(4, 1, SIZE, SIZE)
    for phase in ORDERS[order](network.attached):
        view = PhaseNetwork(network, phase).eval()
        assert torch.equal(view(images)[0], network(images)[phase.exit])

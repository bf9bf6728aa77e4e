import torch
from torch import nn

from edgeke.learning.frozen import Frozen


def test_nothing_in_a_frozen_module_moves_and_later_layers_learn():
    inner = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = {key: value.clone() for key, value in inner.state_dict().items()}
    head = nn.Linear(2, 3)
    whole = nn.Sequential(Frozen(inner), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head).train()
    assert not inner.training
    whole(torch.randn(4, 1, 6, 6)).square().sum().backward()
    assert all(torch.equal(before[key], value) for key, value in inner.state_dict().items())
    assert all(parameter.grad is None for parameter in inner.parameters())
    assert head.weight.grad is not None
    assert head.weight.grad.abs().sum() > 0

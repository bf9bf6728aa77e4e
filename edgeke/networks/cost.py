"""What reaching an exit costs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgeke.networks.architecture import ImageSize, sides
from edgeke.networks.branchynet import BranchyNet


@dataclass(frozen=True)
class ExitCost:
    """Per image, until an exit has answered: the trunk once, and all heads up to this exit.

    `macs`: multiply-accumulates. `parameters`: weights that must be loaded. `activation_bytes`:
    what all layers write, in float32.
    """

    macs: int
    parameters: int
    activation_bytes: int


def exit_costs(network: BranchyNet, image_size: ImageSize) -> tuple[ExitCost, ...]:
    """The cost of every exit as the cascade runs, `[E]`, increasing.

    Operations are counted by `torch.utils.flop_counter`, two per multiply-accumulate.
    """
    device = next(network.parameters()).device
    features = torch.zeros(1, network.architecture.channels, *sides(image_size), device=device)
    training, start = network.training, 0
    macs = parameters = written = 0
    costs = []

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal written
        written += output.numel() * 4

    silent = (nn.Sequential, nn.ModuleList, nn.Identity)  # pass on what they are given
    layers = [m for m in network.modules() if not list(m.children()) and not isinstance(m, silent)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network.eval()
    for exit, end in zip(network.exits, network.attached, strict=True):
        for module in (*network.trunk[start:end], exit):
            output, operations, weights = count_module(module, features)
            features = features if module is exit else output
            macs, parameters = macs + operations, parameters + weights
        costs.append(ExitCost(macs, parameters, written))
        start = end
    for hook in hooks:
        hook.remove()
    network.train(training)
    return tuple(costs)


def count_module(module: nn.Module, inputs: Tensor) -> tuple[Tensor, int, int]:
    """A module's output for one image, its multiply-accumulates and its parameters."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        output: Tensor = module(inputs)
    weights = sum(parameter.numel() for parameter in module.parameters())
    return output, counter.get_total_flops() // 2, weights

"""What reaching an exit costs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

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


def exit_costs(network: BranchyNet, image_size: int) -> tuple[ExitCost, ...]:
    """The cost of every exit as the cascade runs, `[E]`, increasing.

    Operations are counted by `torch.utils.flop_counter`, two per multiply-accumulate.
    """
    device = next(network.parameters()).device
    features = torch.zeros(1, network.architecture.channels, image_size, image_size, device=device)
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
    with torch.no_grad():
        for exit, end in zip(network.exits, network.attached, strict=True):
            with FlopCounterMode(display=False) as counter:
                features = network.through(features, start, end)
                exit(features)
            macs += counter.get_total_flops() // 2
            used = [*network.trunk[start:end], exit]
            parameters += sum(p.numel() for module in used for p in module.parameters())
            costs.append(ExitCost(macs, parameters, written))
            start = end
    for hook in hooks:
        hook.remove()
    network.train(training)
    return tuple(costs)

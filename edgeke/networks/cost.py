"""What reaching an exit costs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from edgeke.networks.branchynet import BranchyNet

__all__ = ["exit_macs"]


def exit_macs(network: BranchyNet, image_size: int) -> tuple[int, ...]:
    """Multiply-accumulates per image until exit e has answered, `[E]`, increasing.

    As the cascade runs: the trunk once, and the heads of all exits up to e. Counted by
    `torch.utils.flop_counter`, which counts two operations per multiply-accumulate.
    """
    device = next(network.parameters()).device
    features = torch.zeros(1, network.architecture.channels, image_size, image_size, device=device)
    training, start, total, macs = network.training, 0, 0, []
    network.eval()
    with torch.no_grad():
        for exit, end in zip(network.exits, network.attached, strict=True):
            with FlopCounterMode(display=False) as counter:
                features = network.through(features, start, end)
                exit(features)
            total += counter.get_total_flops() // 2
            macs.append(total)
            start = end
    network.train(training)
    return tuple(macs)

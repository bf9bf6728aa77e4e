"""A phase of an order as a network to train."""

import torch
from torch import Tensor, nn

from edgeke.learning.frozen import Frozen
from edgeke.learning.orders import Phase
from edgeke.networks.branchynet import BranchyNet


class OneExit(nn.Module):
    """One exit of a BranchyNet after its trunk, whose first blocks are frozen.

    Shares the BranchyNet's modules: training it trains them. Answers `[1, N, K]`.
    """

    def __init__(self, network: BranchyNet, exit: int, frozen: int) -> None:
        super().__init__()
        end = network.attached[exit]
        self.frozen = Frozen(nn.Sequential(*network.trunk[:frozen]))
        self.free = nn.Sequential(*network.trunk[frozen:end])
        self.exit = network.exits[exit]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.exit(self.free(self.frozen(images)))
        return logits[None]


class DetachedExits(nn.Module):
    """A BranchyNet whose early exits learn without moving the trunk. Answers `[E, N, K]`.

    Only the main exit's gradient reaches the trunk: main exit and trunk get the weights that they
    would get without the other exits.
    """

    def __init__(self, network: BranchyNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        features, start, logits = images, 0, []
        last = len(self.network.exits) - 1
        for number, end in enumerate(self.network.attached):
            features = self.network.through(features, start, end)
            seen = features if number == last else features.detach()
            logits.append(self.network.exits[number](seen))
            start = end
        return torch.stack(logits)


def phase_network(network: BranchyNet, phase: Phase, *, detach: bool = False) -> nn.Module:
    """What a phase trains: one exit alone, or the whole network when all learn together.

    With `detach` the early exits of a joint phase do not move the trunk.
    """
    if len(phase.exits) == 1:
        return OneExit(network, phase.exits[0], phase.frozen)
    if len(phase.exits) != len(network.exits) or phase.frozen:
        raise ValueError(f"a joint phase trains all exits and freezes nothing: {phase}")
    return DetachedExits(network) if detach else network

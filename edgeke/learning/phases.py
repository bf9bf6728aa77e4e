"""A phase of an order as a network to train."""

from torch import Tensor, nn

from edgeke.learning.frozen import Frozen
from edgeke.learning.orders import Phase
from edgeke.networks.branchynet import BranchyNet

__all__ = ["OneExit", "phase_network"]


class OneExit(nn.Module):
    """One exit of a BranchyNet behind its trunk, whose first blocks are frozen.

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


def phase_network(network: BranchyNet, phase: Phase) -> nn.Module:
    """What a phase trains: one exit alone, or the whole network when all learn together."""
    if len(phase.exits) == 1:
        return OneExit(network, phase.exits[0], phase.frozen)
    if len(phase.exits) != len(network.exits) or phase.frozen:
        raise ValueError(f"a joint phase trains all exits and freezes nothing: {phase}")
    return network

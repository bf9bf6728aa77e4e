"""A phase of an order as a network to train."""

import torch
from torch import Tensor, nn

from edgeke.device.codec import Codec
from edgeke.learning.coding import Coding
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


class CodedExits(nn.Module):
    """Exits that learn together, those behind exit `after` on features that a codec changed.

    Trunk blocks that the phase freezes do not learn. With `detach` the exits before the main one
    do not move the trunk. Answers `[E, N, K]`.
    """

    def __init__(
        self, network: BranchyNet, phase: Phase, after: int, codec: Codec, detach: bool
    ) -> None:
        super().__init__()
        self.frozen = Frozen(nn.Sequential(*network.trunk[: phase.frozen]))
        self.blocks = nn.ModuleList(network.trunk[number] for number in phase.exits)
        self.exits = nn.ModuleList(network.exits[number] for number in phase.exits)
        self.first_behind = phase.exits.index(after + 1)
        self.coding, self.detach = Coding(codec), detach

    def forward(self, images: Tensor) -> Tensor:
        features, logits = self.frozen(images), []
        last = len(self.exits) - 1
        for number, (block, exit) in enumerate(zip(self.blocks, self.exits, strict=True)):
            if number == self.first_behind:
                features = self.coding(features)
            features = block(features)
            seen = features.detach() if self.detach and number < last else features
            logits.append(exit(seen))
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

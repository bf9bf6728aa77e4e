"""Orders: which exit learns when, and what is frozen meanwhile."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from edgeke.learning.frozen import Frozen
from edgeke.networks.branchynet import BranchyNet

__all__ = ["ORDERS", "Phase", "PhaseNetwork", "asynchronous", "asynchronous_back", "start_exit"]


@dataclass(frozen=True)
class Phase:
    """Train exit `exit` and the trunk blocks from `frozen` up to its attach point.

    The first `frozen` trunk blocks stay as they are, batch-norm statistics included.
    """

    exit: int
    frozen: int


def asynchronous(attached: tuple[int, ...]) -> Iterator[Phase]:
    """Deepest first (the paper's): starts from the distilled main branch.

    Then every earlier exit, deep to shallow: only its own body and head move, the whole trunk in
    front of it is frozen.
    """
    for exit in reversed(range(len(attached) - 1)):
        yield Phase(exit, attached[exit])


def asynchronous_back(attached: tuple[int, ...]) -> Iterator[Phase]:
    """Shallowest first: starts from the distilled branch 0.

    Then every deeper exit: its own body and head and the trunk blocks behind the previous attach
    point move; everything the previous exits use is frozen.
    """
    for exit in range(1, len(attached)):
        yield Phase(exit, attached[exit - 1])


ORDERS = {"asynchronous": asynchronous, "asynchronous_back": asynchronous_back}


def start_exit(order: str, exits: int) -> int:
    """The distilled branch that an order starts from; its exit is not trained again."""
    return 0 if order == "asynchronous_back" else exits - 1


class PhaseNetwork(nn.Module):
    """One exit of a BranchyNet as a network to train, with a frozen part of the trunk.

    Shares the BranchyNet's modules: training it trains them. Answers `[1, N, K]`.
    """

    def __init__(self, network: BranchyNet, phase: Phase) -> None:
        super().__init__()
        end = network.attached[phase.exit]
        self.frozen = Frozen(nn.Sequential(*network.trunk[: phase.frozen]))
        self.free = nn.Sequential(*network.trunk[phase.frozen : end])
        self.exit = network.exits[phase.exit]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.exit(self.free(self.frozen(images)))
        return logits[None]

"""The multi-exit network: a trunk that is computed once, and exits attached to its blocks."""

import torch
from torch import Tensor, nn

from edgeke.networks.architecture import Architecture, ExitSpec, block_names
from edgeke.networks.heads import branch_head, main_head
from edgeke.networks.resnet import block_channels, make_block

__all__ = ["BranchyNet", "Exit"]


class Exit(nn.Module):
    """A place to answer: the branch body (may be empty) and the head."""

    def __init__(self, body: nn.Sequential, head: nn.Sequential) -> None:
        super().__init__()
        self.body = body
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(features))
        return logits


class BranchyNet(nn.Module):
    """Trunk and exits (Teerapittayanon et al. 2016), built from an `Architecture`.

    With one exit it is a plain network: a teacher, or one branch seen alone. `attached[e]` counts
    the trunk blocks in front of exit e.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        names = block_names(architecture.backbone)
        self.attached = tuple(names.index(spec.attach) + 1 for spec in architecture.exits)
        self.trunk = nn.ModuleList(
            make_block(architecture, name) for name in names[: self.attached[-1]]
        )
        self.exits = nn.ModuleList(_make_exit(architecture, spec) for spec in architecture.exits)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of every exit, `[E, N, K]`, for normalised images `[N, C, H, W]`."""
        features, start, logits = images, 0, []
        for exit, end in zip(self.exits, self.attached, strict=True):
            features = self.through(features, start, end)
            logits.append(exit(features))
            start = end
        return torch.stack(logits)

    def through(self, features: Tensor, start: int, end: int) -> Tensor:
        """Features behind trunk block `end - 1`, given those in front of block `start`."""
        for block in self.trunk[start:end]:
            features = block(features)
        return features

    def load_branch(self, exit: int, branch: "BranchyNet") -> None:
        """Take over trunk and exit from a branch that was trained alone."""
        if branch.architecture != self.architecture.branch(exit):
            raise ValueError(f"not exit {exit} of this network: {branch.architecture}")
        self.trunk[: self.attached[exit]].load_state_dict(branch.trunk.state_dict())
        self.exits[exit].load_state_dict(branch.exits[0].state_dict())

    def branch(self, exit: int) -> "BranchyNet":
        """A copy of exit `exit` seen alone."""
        alone = BranchyNet(self.architecture.branch(exit))
        alone.trunk.load_state_dict(self.trunk[: self.attached[exit]].state_dict())
        alone.exits[0].load_state_dict(self.exits[exit].state_dict())
        return alone.train(self.training)


def _make_exit(architecture: Architecture, spec: ExitSpec) -> Exit:
    names, classes = block_names(architecture.backbone), architecture.classes
    if spec.kind == "main":
        channels = block_channels(architecture, spec.attach)
        return Exit(nn.Sequential(), main_head(channels, classes))
    own = names[names.index(spec.attach) + 1]
    body = nn.Sequential(make_block(architecture, own))
    return Exit(body, branch_head(block_channels(architecture, own), classes))

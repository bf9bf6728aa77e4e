"""The multi-exit network: a trunk that is computed once, and exits attached to its blocks."""

import torch
from torch import Tensor, nn

from edgeke.errors import InputError
from edgeke.networks.architecture import Architecture, ExitSpec, block_names
from edgeke.networks.heads import attention_body, branch_head, main_head, separable_body
from edgeke.networks.resnet import block_channels, make_block

__all__ = ["BranchyNet", "Exit"]

_BODIES = {"attention": attention_body, "separable": separable_body}


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
    the trunk blocks in front of exit e. Where nothing is shared the trunk is empty, and every
    exit's body begins with blocks of its own.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        names, depths = block_names(architecture.backbone), architecture.depths
        self.attached = depths if architecture.shared else (0,) * len(depths)
        self.trunk = nn.ModuleList(
            make_block(architecture, name) for name in names[: self.attached[-1]]
        )
        self.exits = nn.ModuleList(
            _make_exit(architecture, spec, names[end:depth])
            for spec, end, depth in zip(architecture.exits, self.attached, depths, strict=True)
        )

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
            raise InputError(
                f"branch {exit} was distilled for another network than the student in params.yaml;"
                " run `dvc repro distill`"
            )
        self._path(exit).load_state_dict(branch._path(0).state_dict())

    def branch(self, exit: int) -> "BranchyNet":
        """A copy of exit `exit` seen alone."""
        alone = BranchyNet(self.architecture.branch(exit))
        alone._path(0).load_state_dict(self._path(exit).state_dict())
        return alone.train(self.training)

    def class_vectors(self) -> Tensor:
        """The last exit's linear weights, one row per class: `[K, D]`, without gradient."""
        head = self.get_submodule(f"exits.{len(self.exits) - 1}.head")
        weight = next(p for p in reversed(list(head.parameters())) if p.dim() == 2)
        return weight.detach()

    def _path(self, exit: int) -> nn.Sequential:
        """Every module an image passes on its way to exit `exit` alone, in order."""
        own = self.exits[exit]
        assert isinstance(own, Exit)
        return nn.Sequential(*self.trunk[: self.attached[exit]], *own.body, *own.head)


def _make_exit(architecture: Architecture, spec: ExitSpec, own: tuple[str, ...]) -> Exit:
    """An exit whose body begins with the blocks `own` (none where the trunk is shared)."""
    names, classes = block_names(architecture.backbone), architecture.classes
    body = nn.Sequential(*(make_block(architecture, name) for name in own))
    channels = block_channels(architecture, spec.attach)
    if spec.kind == "branch":
        copied = names[names.index(spec.attach) + 1]
        body.append(make_block(architecture, copied))
        return Exit(body, branch_head(block_channels(architecture, copied), classes))
    if spec.kind in _BODIES:
        last = block_channels(architecture, names[-1])
        body.extend(_BODIES[spec.kind](channels, last))
        return Exit(body, main_head(last, classes))
    return Exit(body, main_head(channels, classes))

"""The multi-exit network: a trunk that is computed once, and exits attached to its cut points."""

import copy
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from edgeke.errors import InputError
from edgeke.networks.architecture import Architecture, ExitSpec
from edgeke.networks.build import build_network
from edgeke.networks.heads import (
    attention_body,
    branch_head,
    linear_head,
    pooled_head,
    separable_body,
)
from edgeke.networks.layouts import attach_points
from edgeke.networks.tracing import CutPoint, Traced, trace

_BODIES = {"attention": attention_body, "separable": separable_body}


class Exit(nn.Module):
    """A place to answer: a trunk of its own and a body, both of which may be empty, and a head."""

    def __init__(self, trunk: nn.Module, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.body = body
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.trunk(features)))
        return logits


class BranchyNet(nn.Module):
    """Trunk and exits (Teerapittayanon et al. 2016), built from an `Architecture`.

    With one exit it is a plain network: a teacher, or one branch seen alone. `trunk` has one block
    per exit, from the attach point before it to its own; `attached[e]` counts the blocks before
    exit e. Where nothing is shared the trunk is empty, and every exit has a trunk of its own.

    `weights` are initial ones of the backbone, by its own parameter names. In the network's state
    dict those names follow `backbone.` and, for the classifier, the main exit's `head.`.
    Errors: InputError when an exit cannot be attached where the architecture says.
    """

    def __init__(
        self, architecture: Architecture, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        traced = trace(architecture.backbone)
        cuts = attach_points(architecture, traced)
        network = build_network(architecture.backbone)
        if weights is not None:
            network.load_state_dict(weights)
        count = len(cuts)
        self.attached = tuple(range(1, count + 1)) if architecture.shared else (0,) * count
        self.backbone: nn.Module = nn.Sequential()
        # Views of the backbone: they share its modules and are not registered a second time.
        self.trunk: list[nn.Module] = []
        if architecture.shared:
            self.backbone = traced.part(network, None, cuts[-1])
            starts = (None, *cuts[:-1])
            self.trunk = [
                traced.part(network, start, end) for start, end in zip(starts, cuts, strict=True)
            ]
        self.exits = nn.ModuleList(
            _make_exit(spec, cut, traced, network, architecture.shared)
            for spec, cut in zip(architecture.exits, cuts, strict=True)
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
        """Features after trunk block `end - 1`, given those before block `start`."""
        for block in self.trunk[start:end]:
            features = block(features)
        return features

    def blocks(self, exit: int) -> dict[str, nn.Module]:
        """The trunk between the exit before and this one, cut at every cut point on the way.

        By the names of the cut points where the blocks end; they share the trunk's modules. Empty
        where nothing is shared.
        """
        if not self.architecture.shared:
            return {}
        traced = trace(self.architecture.backbone)
        attached = attach_points(self.architecture, traced)
        starts: list[CutPoint | None] = [attached[exit - 1] if exit else None]
        first = starts[0].node if starts[0] else 0
        ends = [cut for cut in traced.cuts if first < cut.node <= attached[exit].node]
        starts += ends[:-1]
        return {
            end.name: traced.part(self.backbone, start, end)
            for start, end in zip(starts, ends, strict=True)
        }

    def load_branch(self, exit: int, branch: "BranchyNet") -> None:
        """Take over trunk and exit from a branch that was trained alone."""
        if branch.architecture != self.architecture.branch(exit):
            raise InputError(
                f"branch {exit} was distilled for another network than the student in params.yaml;"
                " run `dvc repro distill`"
            )
        self._take_over(self._path(exit), branch._path(0))

    def branch(self, exit: int) -> "BranchyNet":
        """A copy of exit `exit` seen alone."""
        alone = BranchyNet(self.architecture.branch(exit))
        self._take_over(alone._path(0), self._path(exit))
        return alone.train(self.training)

    def until(self, exit: int) -> "BranchyNet":
        """A copy that ends at exit `exit`, without the exits behind it."""
        own = self.architecture
        shorter = BranchyNet(replace(own, exits=own.exits[: exit + 1]))
        for number in range(exit + 1):
            self._take_over(shorter._path(number), self._path(number))
        return shorter.train(self.training)

    def class_vectors(self) -> Tensor:
        """The last exit's linear weights, one row per class: `[K, D]`, without gradient."""
        head = self.get_submodule(f"exits.{len(self.exits) - 1}.head")
        weight = next(p for p in reversed(list(head.parameters())) if p.dim() > 1)
        return weight.detach().flatten(1)

    def backbone_state(self) -> dict[str, Tensor]:
        """Weights of trunk and main exit by the backbone's own names, as the plain network's."""
        head = self.get_submodule(f"exits.{len(self.exits) - 1}.head")
        return {**self.backbone.state_dict(), **head.state_dict()}

    def _path(self, exit: int) -> dict[str, Tensor]:
        """All tensors that an image meets on its way to exit `exit` alone."""
        own = self.exits[exit]
        assert isinstance(own, Exit)
        tensors: dict[str, Tensor] = {}
        for block in (*self.trunk[: self.attached[exit]], own.trunk):
            block.state_dict(destination=tensors, prefix="trunk.")
        own.body.state_dict(destination=tensors, prefix="body.")
        own.head.state_dict(destination=tensors, prefix="head.")
        return tensors

    @staticmethod
    @torch.no_grad()
    def _take_over(target: dict[str, Tensor], source: dict[str, Tensor]) -> None:
        for name, tensor in target.items():
            tensor.copy_(source[name])


def _make_exit(
    spec: ExitSpec, cut: CutPoint, traced: Traced, network: nn.Module, shared: bool
) -> Exit:
    trunk = nn.Sequential() if shared else copy.deepcopy(traced.part(network, None, cut))
    classes, outputs = traced.backbone.classes, traced.cuts[-1].shape[0]
    if spec.kind == "main":
        return Exit(trunk, nn.Sequential(), traced.part(network, cut, None))
    if spec.kind == "branch":
        end = traced.next_block(cut)
        assert end is not None, "checked by attach_points"
        block = copy.deepcopy(traced.part(network, cut, end))
        return Exit(trunk, block, branch_head(end.shape[0], classes))
    if spec.kind in _BODIES:
        body = _BODIES[spec.kind](cut.shape, outputs)
        return Exit(trunk, body, linear_head(max(cut.shape[0], outputs), classes))
    pooled = spec.kind == "pooled"
    head = pooled_head(cut.shape, classes) if pooled else linear_head(cut.shape[0], classes)
    return Exit(trunk, nn.Sequential(), head)

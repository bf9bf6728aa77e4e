"""Layouts: from a name, shares of operations or attach points to the exits of a backbone."""

import itertools
from collections.abc import Sequence

from edgeke.errors import InputError
from edgeke.networks.architecture import Architecture, Backbone, ExitSpec, Layout, check_layout
from edgeke.networks.tracing import CutPoint, Traced, trace

# What a share of operations alone gets.
_DEFAULT_KIND = "pooled"


def single_exit(backbone: Backbone) -> Architecture:
    """The plain backbone, answering at its end."""
    return Architecture(backbone, (_main(trace(backbone)),))


def with_layout(layout: Layout, backbone: Backbone, *, shared: bool = True) -> Architecture:
    """The backbone with the exits of a layout, shallow to deep, the main exit last.

    `edgeke`, the paper's three: a branch before the last halving of the feature maps, one a block
    earlier, and the backbone itself (on ResNet18: layer3.0, layer3.1, layer4.1). `stages`: an
    attention exit before each halving, and the backbone itself. A share of the backbone's
    operations stands for the nearest cut point that no other exit has.
    Errors: InputError when an attach point does not exist or exits are out of order.
    """
    check_layout(layout)
    traced = trace(backbone)
    if isinstance(layout, str):
        early = _edgeke(traced) if layout == "edgeke" else _stages(traced)
    else:
        early = _listed(layout, traced)
    architecture = Architecture(backbone, (*early, _main(traced)), shared)
    attach_points(architecture, traced)
    return architecture


def attach_points(architecture: Architecture, traced: Traced) -> list[CutPoint]:
    """The exits' cut points, `[E]`. Errors: InputError when exits cannot be attached there."""
    cuts = [traced.cut(str(spec.attach)) for spec in architecture.exits]
    if any(after.node <= before.node for before, after in itertools.pairwise(cuts)):
        raise InputError(
            "exits must be attached shallow to deep, each after the one before; got "
            f"{[cut.name for cut in cuts]}"
        )
    last = traced.cuts[-1]
    for spec, cut in zip(architecture.exits, cuts, strict=True):
        if spec.kind == "main" and cut != last:
            raise InputError(
                f"the main exit is attached to {cut.name}; it is the rest of the backbone after "
                f"its last feature map, {last.name}"
            )
        if spec.kind == "branch" and traced.next_block(cut) is None:
            raise InputError(
                f"an exit of kind branch after {cut.name} has no next block to copy; attach it "
                "earlier, or use another kind"
            )
    return cuts


def _main(traced: Traced) -> ExitSpec:
    return ExitSpec(traced.cuts[-1].name, "main")


def _before_halvings(traced: Traced) -> list[CutPoint]:
    pairs = itertools.pairwise(traced.cuts)
    return [cut for cut, after in pairs if after.shape[2] < cut.shape[2]]


def _edgeke(traced: Traced) -> list[ExitSpec]:
    ends = _before_halvings(traced)
    place = traced.cuts.index(ends[-1]) if ends else 0
    if place == 0:
        raise InputError(
            f"layout edgeke needs two cut points before the last halving of the feature maps; "
            f"{traced.backbone.network} has fewer: use shares such as [0.25, 0.5]"
        )
    return [ExitSpec(cut.name, "branch") for cut in traced.cuts[place - 1 : place + 1]]


def _stages(traced: Traced) -> list[ExitSpec]:
    ends = _before_halvings(traced)
    if not ends:
        raise InputError(
            f"layout stages needs feature maps of several sizes; {traced.backbone.network} has "
            "one: use shares such as [0.25, 0.5]"
        )
    return [ExitSpec(cut.name, "attention") for cut in ends]


def _listed(layout: Sequence[float | ExitSpec], traced: Traced) -> list[ExitSpec]:
    specs = [
        item if isinstance(item, ExitSpec) else ExitSpec(item, _DEFAULT_KIND) for item in layout
    ]
    specs = [
        ExitSpec(traced.cut(spec.attach).name, spec.kind) if isinstance(spec.attach, str) else spec
        for spec in specs
    ]
    named = {spec.attach for spec in specs if isinstance(spec.attach, str)}
    shares = [spec.attach for spec in specs if not isinstance(spec.attach, str)]
    nearest = iter(_nearest(traced, shares, named))
    return [
        spec if isinstance(spec.attach, str) else ExitSpec(next(nearest), spec.kind)
        for spec in specs
    ]


def _nearest(traced: Traced, shares: Sequence[float], taken: set[str]) -> list[str]:
    """The cut points nearest to shares of the operations, distinct, shallow to deep."""
    free = [cut for cut in traced.cuts[:-1] if cut.name not in taken]
    if len(shares) > len(free):
        raise InputError(
            f"the layout has {len(shares) + len(taken)} exits, and {traced.backbone.network} has "
            f"{len(traced.cuts) - 1} cut points before its last feature map; list fewer"
        )
    chosen = []
    for share in shares:
        chosen.append(min(free, key=lambda cut: abs(cut.macs / traced.macs - share)))
        free.remove(chosen[-1])
    return [cut.name for cut in sorted(chosen, key=lambda cut: cut.node)]

"""Networks as plain data: a backbone and the exits attached to it. No torch here."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edgeke.errors import InputError

# Every network that is not timm's: its name in params.yaml, and the function or class that builds
# it from a `Backbone`. Add a network of your own here; docs/backbones.md has an example.
NETWORKS: dict[str, str] = {
    "resnet10": "edgeke.networks.resnet:resnet10",
    "resnet18": "edgeke.networks.resnet:resnet18",
    "resnet34": "edgeke.networks.resnet:resnet34",
}

# What stands before the name of one of timm's networks.
TIMM = "timm/"

LAYOUTS = ("auto", "edgeke", "stages")
KINDS = ("branch", "attention", "separable", "linear", "pooled")


# The side of square images, or height and width.
ImageSize = int | tuple[int, int]

# Tensors of a network by name, and their shapes.
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def sides(size: ImageSize) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class Backbone:
    """A single-exit network, and the images and classes it is built for.

    `network` is a name in `NETWORKS`, or `timm/<name>`. `width`: channels of the first stage, for
    networks that have such a choice. `stem: small` removes the first halvings of one of timm's
    networks (stride 1, no pooling), for images of 32x32. `pruned`: the tensors that pruning left
    smaller than the network's own.
    """

    network: str
    channels: int
    classes: int
    image_size: ImageSize
    width: int | None = None
    stem: Literal["standard", "small"] = "standard"
    pruned: Shapes = ()

    def __post_init__(self) -> None:
        height, width = sides(self.image_size)  # JSON gives a list; a square has one form only
        object.__setattr__(self, "image_size", height if height == width else (height, width))
        shapes = tuple((name, tuple(shape)) for name, shape in self.pruned)
        object.__setattr__(self, "pruned", shapes)
        if self.network.startswith(TIMM):
            if self.width is not None:
                raise InputError(
                    f"width = {self.width}: {self.network} has the widths that its name says; "
                    "remove the key"
                )
            return
        if self.network not in NETWORKS:
            near = difflib.get_close_matches(self.network, NETWORKS, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            raise InputError(
                f"network {self.network!r} is unknown; {meant}use one of {', '.join(NETWORKS)}, or "
                "timm/<name> for one of timm's"
            )
        if self.stem != "standard":
            raise InputError(f"stem = {self.stem}: only timm's networks have this choice")


@dataclass(frozen=True)
class ExitSpec:
    """One exit: the cut point of the backbone it is attached to, and its kind.

    In a layout `attach` may also be a share of the backbone's MACs: the nearest cut point.

    `pooled`: mean, maximum and standard deviation over positions, and a linear layer. `linear`:
    the mean over positions, and a linear layer. `branch`: its own copy of the backbone's next
    block, pooling and two linear layers (the paper's early exits). `attention`: spatial attention
    and separable convolutions up to the last feature map's width, pooling and a linear layer
    (Zhang et al. 2021). `separable`: the same with fewer convolutions and no attention, cheaper.
    `main`: the rest of the backbone.
    """

    attach: str | float
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, "main"):
            raise InputError(f"exit kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")

    def __str__(self) -> str:
        return f"{self.attach}:{self.kind}"


# A layout's name, or its early exits, shallow to deep: shares of MACs (an exit of the default kind
# at the nearest cut point) or exits. The main exit is added after them.
Layout = str | Sequence[float | ExitSpec]


def check_layout(layout: Layout) -> None:
    """Check all that can be checked without the network. Errors: InputError."""
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise InputError(
                f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}, shares of the "
                "network's operations such as [0.1, 0.25, 0.5], or exits such as "
                "{attach: layer3.0, kind: pooled}"
            )
        return
    if not layout:
        raise InputError(
            "branchynet.layout = [] leaves nothing to choose from: name an exit before the main "
            "one, such as {attach: layer3.0, kind: branch}, shares of the network's operations, or "
            f"one of {', '.join(LAYOUTS)}"
        )
    places = [item.attach if isinstance(item, ExitSpec) else item for item in layout]
    shares = [place for place in places if not isinstance(place, str)]
    if any(not 0 < share < 1 for share in shares):
        raise InputError(
            f"branchynet.layout = {shares}: a share of the network's operations lies between 0 "
            "and 1"
        )
    if shares != sorted(shares):
        raise InputError(
            f"branchynet.layout = {shares}: list exits shallow to deep, smaller shares first"
        )
    twice = sorted({str(place) for place in places if places.count(place) > 1})
    if twice:
        raise InputError(
            f"branchynet.layout attaches two exits to {', '.join(twice)}; attach each exit to "
            "another place"
        )


def resolve_layout(layout: Layout, from_weights: bool) -> Layout:
    """What `auto` stands for: a trunk that starts from weights knows much early.

    Its exits: after the stem, then about 2.5 times further each (docs/results.md: steel).
    """
    if layout != "auto":
        return layout
    return (0.02, 0.1, 0.25, 0.6) if from_weights else "edgeke"


def exit_count(layout: Layout) -> int | None:
    """How many exits a layout has, the main one included; None where the network decides."""
    if layout == "edgeke":
        return 3
    return None if isinstance(layout, str) else len(layout) + 1


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build a network: a backbone and the exits it answers at.

    A single-exit network (a teacher, or one branch seen alone) is an architecture with one exit.
    Where `shared` is false every exit has a trunk of its own, and costs add up.
    """

    backbone: Backbone
    exits: tuple[ExitSpec, ...]
    shared: bool = True

    def __post_init__(self) -> None:
        if not self.exits:
            raise InputError("a network needs at least one exit")

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.backbone.channels

    @property
    def classes(self) -> int:
        """The number of classes, K."""
        return self.backbone.classes

    @property
    def depths(self) -> tuple[int, ...]:
        """How many trunk blocks come before each exit where the trunk is shared, `[E]`."""
        return tuple(range(1, len(self.exits) + 1))

    def branch(self, exit: int) -> "Architecture":
        """Exit number `exit` seen alone, whether the others shared its trunk or not."""
        return Architecture(self.backbone, (self.exits[exit],))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        content = asdict(self)
        if not self.backbone.pruned:
            del content["backbone"]["pruned"]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Architecture":
        """Rebuild an architecture. Errors: InputError when keys are missing or unknown."""
        try:
            backbone = Backbone(**content["backbone"])
            exits = tuple(ExitSpec(**spec) for spec in content["exits"])
            return cls(**{**content, "backbone": backbone, "exits": exits})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"not the description of an EdgeKE network ({error}); delete the checkpoint and "
                "run `dvc repro`"
            ) from error

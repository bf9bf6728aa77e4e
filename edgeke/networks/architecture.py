"""Networks as plain data: block names, exits and layouts. No torch here, so checks stay cheap."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeke.errors import InputError

__all__ = [
    "BACKBONES",
    "KINDS",
    "LAYOUTS",
    "Architecture",
    "ExitSpec",
    "Layout",
    "block_names",
    "layout_exits",
]

# Residual blocks in each of the four stages (He et al. 2016, table 1).
BACKBONES: dict[str, tuple[int, int, int, int]] = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
}

LAYOUTS = ("edgeke", "stages")
KINDS = ("branch", "attention", "separable", "linear")


@dataclass(frozen=True)
class ExitSpec:
    """One exit: the backbone block it is attached to, and its kind.

    `branch`: its own copy of the backbone's next block, pooling and two linear layers (the paper's
    early exits). `attention`: spatial attention and separable convolutions down to the last
    stage's width, pooling and a linear layer (Zhang et al. 2021). `separable`: the same with fewer
    convolutions and no attention, cheaper. `linear`: pooling and a linear layer. `main`: the
    backbone's own classifier.
    """

    attach: str
    kind: str

    def __str__(self) -> str:
        return f"{self.attach}:{self.kind}"


# A layout's name, or its early exits, shallow to deep; the main exit is added behind them.
Layout = str | tuple[ExitSpec, ...]


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build a network: a backbone and the exits it answers at.

    A single-exit network (a teacher, or one branch seen alone) is an architecture with one exit.
    Where `shared` is false every exit has a trunk of its own, and costs add up.
    """

    backbone: str
    width: int
    channels: int
    classes: int
    exits: tuple[ExitSpec, ...]
    shared: bool = True

    def __post_init__(self) -> None:
        names = block_names(self.backbone)
        for spec in self.exits:
            if spec.attach not in names:
                raise InputError(
                    f"exit attached to {spec.attach!r}, which {self.backbone} does not have; "
                    f"attach it to one of {', '.join(names)}"
                )
            if spec.kind not in (*KINDS, "main"):
                raise InputError(
                    f"exit kind {spec.kind!r} is unknown; use one of {', '.join(KINDS)}"
                )
            if spec.kind == "branch" and spec.attach == names[-1]:
                raise InputError(
                    f"an exit of kind branch behind {spec.attach} has no next block to copy; "
                    "attach it earlier, or use kind linear"
                )
        positions = [names.index(spec.attach) for spec in self.exits]
        if not positions or any(b <= a for a, b in zip(positions, positions[1:], strict=False)):
            raise InputError(
                f"exits must be attached shallow to deep, each behind the one before; got "
                f"{[spec.attach for spec in self.exits]}"
            )

    @property
    def depths(self) -> tuple[int, ...]:
        """How many backbone blocks lie in front of each exit, `[E]`."""
        names = block_names(self.backbone)
        return tuple(names.index(spec.attach) + 1 for spec in self.exits)

    @classmethod
    def single(cls, backbone: str, width: int, channels: int, classes: int) -> "Architecture":
        """The plain backbone, answering at its end."""
        main = ExitSpec(block_names(backbone)[-1], "main")
        return cls(backbone, width, channels, classes, (main,))

    @classmethod
    def with_layout(
        cls,
        layout: Layout,
        backbone: str,
        width: int,
        channels: int,
        classes: int,
        shared: bool = True,
    ) -> "Architecture":
        """The backbone with the exits of a layout."""
        return cls(backbone, width, channels, classes, layout_exits(layout, backbone), shared)

    def branch(self, exit: int) -> "Architecture":
        """Exit number `exit` seen alone, whether the others shared its trunk or not."""
        return Architecture(
            self.backbone, self.width, self.channels, self.classes, (self.exits[exit],)
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Architecture":
        """Rebuild an architecture. Errors: InputError when keys are missing or unknown."""
        try:
            exits = tuple(ExitSpec(**spec) for spec in content["exits"])
            return cls(**{**content, "exits": exits})
        except (KeyError, TypeError) as error:
            raise InputError(
                f"not the description of an EdgeKE network ({error}); delete the checkpoint and "
                "run `dvc repro`"
            ) from error


def block_names(backbone: str) -> tuple[str, ...]:
    """The blocks of a backbone in order: stem, layer1.0, layer1.1, ..."""
    if backbone not in BACKBONES:
        raise InputError(f"network {backbone!r} is unknown; use one of {', '.join(BACKBONES)}")
    counts: Sequence[int] = BACKBONES[backbone]
    blocks = [f"layer{stage}.{i}" for stage, n in enumerate(counts, 1) for i in range(n)]
    return ("stem", *blocks)


def layout_exits(layout: Layout, backbone: str) -> tuple[ExitSpec, ...]:
    """The exits of a layout on a backbone, shallow to deep, the main exit last.

    `edgeke`, the paper's three: a branch that shares all but the last block of layer3, a branch
    that shares layer3, and the backbone itself (on ResNet18: layer3.0, layer3.1, layer4.1).
    `stages`: an attention exit after each stage but the last, and the backbone itself.
    Errors: InputError when an attach point does not exist or exits are out of order.
    """
    names = block_names(backbone)
    main = ExitSpec(names[-1], "main")
    ends = [names[names.index(f"layer{stage}.0") - 1] for stage in (2, 3, 4)]
    if layout == "edgeke":
        before = names[names.index(ends[2]) - 1]
        return (ExitSpec(before, "branch"), ExitSpec(ends[2], "branch"), main)
    if layout == "stages":
        return (*(ExitSpec(end, "attention") for end in ends), main)
    if isinstance(layout, str):
        raise InputError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    if not layout:
        raise InputError(
            "branchynet.layout = [] leaves nothing to choose from: name an exit before the main "
            "one, such as {attach: layer3.0, kind: branch}, or use one of "
            f"{', '.join(LAYOUTS)}"
        )
    exits = (*layout, main)
    Architecture(backbone, 1, 1, 2, exits)  # checks names, kinds and order
    return exits

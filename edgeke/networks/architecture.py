"""Networks as plain data: block names, exits and layouts. No torch here, so checks stay cheap."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgeke.errors import InputError

__all__ = ["BACKBONES", "LAYOUTS", "Architecture", "ExitSpec", "block_names", "layout_exits"]

# Residual blocks in each of the four stages (He et al. 2016, table 1).
BACKBONES: dict[str, tuple[int, int, int, int]] = {
    "resnet10": (1, 1, 1, 1),
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
}

LAYOUTS = ("edgeke",)


@dataclass(frozen=True)
class ExitSpec:
    """One exit: the backbone block it is attached to, and its kind.

    `branch` has its own copy of the backbone's next block, pooling and two linear layers (the
    paper's early exits); `main` has an empty body and the backbone's classifier.
    """

    attach: str
    kind: str


@dataclass(frozen=True)
class Architecture:
    """Everything needed to build a network: a backbone and the exits it answers at.

    A single-exit network (a teacher, or one branch seen alone) is an architecture with one exit.
    """

    backbone: str
    width: int
    channels: int
    classes: int
    exits: tuple[ExitSpec, ...]

    def __post_init__(self) -> None:
        names = block_names(self.backbone)
        for spec in self.exits:
            if spec.attach not in names:
                raise InputError(
                    f"exit attached to {spec.attach!r}, which {self.backbone} does not have; "
                    f"attach it to one of {', '.join(names)}"
                )
            if spec.kind not in ("branch", "main"):
                raise InputError(f"exit kind {spec.kind!r} is unknown; use branch or main")
        positions = [names.index(spec.attach) for spec in self.exits]
        if not positions or any(b <= a for a, b in zip(positions, positions[1:], strict=False)):
            raise InputError(
                f"exits must be attached shallow to deep, each behind the one before; got "
                f"{[spec.attach for spec in self.exits]}"
            )

    @classmethod
    def single(cls, backbone: str, width: int, channels: int, classes: int) -> "Architecture":
        """The plain backbone, answering at its end."""
        main = ExitSpec(block_names(backbone)[-1], "main")
        return cls(backbone, width, channels, classes, (main,))

    @classmethod
    def with_layout(
        cls, layout: str, backbone: str, width: int, channels: int, classes: int
    ) -> "Architecture":
        """The backbone with the exits of a named layout."""
        return cls(backbone, width, channels, classes, layout_exits(layout, backbone))

    def branch(self, exit: int) -> "Architecture":
        """Exit number `exit` seen alone."""
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


def layout_exits(layout: str, backbone: str) -> tuple[ExitSpec, ...]:
    """The exits of a layout on a backbone, shallow to deep.

    `edgeke`, the paper's three: a branch that shares all but the last block of layer3, a branch
    that shares layer3, and the backbone itself (on ResNet18: layer3.0, layer3.1, layer4.1).
    """
    if layout not in LAYOUTS:
        raise InputError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    names = block_names(backbone)
    end_of_layer3 = names.index("layer4.0") - 1
    return (
        ExitSpec(names[end_of_layer3 - 1], "branch"),
        ExitSpec(names[end_of_layer3], "branch"),
        ExitSpec(names[-1], "main"),
    )

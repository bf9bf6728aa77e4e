"""segments.json: what the exported segments are, for those who compose or run them."""

from dataclasses import asdict, dataclass
from pathlib import Path

from edgeke.errors import InputError
from edgeke.files import read_json, write_json

__all__ = ["Manifest"]

_NAME = "segments.json"


@dataclass(frozen=True)
class Manifest:
    """One precision's files in order, MACs per exit `[E]`, class names, image shape `(H, W, C)`.

    `main_macs` are those of the main exit without the other exits' branches: the plain network.
    """

    segments: tuple[str, ...]
    macs: tuple[int, ...]
    main_macs: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]

    def write(self, folder: Path) -> None:
        """Write `folder/segments.json` atomically."""
        write_json(folder / _NAME, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `folder/segments.json`. Errors: InputError when it is missing or incomplete."""
        content = read_json(folder / _NAME)
        try:
            return cls(
                segments=tuple(content["segments"]),
                macs=tuple(content["macs"]),
                main_macs=content["main_macs"],
                classes=tuple(content["classes"]),
                image_shape=tuple(content["image_shape"]),
            )
        except (TypeError, KeyError) as error:
            raise InputError(
                f"{folder / _NAME} is incomplete ({error}); run `dvc repro -f export`"
            ) from error

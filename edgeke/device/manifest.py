"""segments.json: what the segments beside it are, for those who compose or run them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from edgeke.device.decode import BITS
from edgeke.errors import InputError

MANIFEST = "segments.json"


@dataclass(frozen=True)
class Manifest:
    """One precision's files in order, MACs per exit `[E]`, class names, image shape `(H, W, C)`.

    `main_macs` are those of the main exit without the other exits' branches: the plain network.
    `bits`: significant bits of 16-bit pictures.
    """

    segments: tuple[str, ...]
    macs: tuple[int, ...]
    main_macs: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    bits: int = BITS

    def to_json(self) -> str:
        """The text of segments.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/segments.json`. Errors: InputError when it is missing, damaged or incomplete."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        return Manifest(
            segments=tuple(content["segments"]),
            macs=tuple(content["macs"]),
            main_macs=content["main_macs"],
            classes=tuple(content["classes"]),
            image_shape=tuple(content["image_shape"]),
            bits=content.get("bits", BITS),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); copy the whole bundle, or export the model, again"
        ) from error

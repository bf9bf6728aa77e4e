"""segments.json: what the segments beside it are, for those who compose or run them."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgeke.device.decode import BITS, FIT
from edgeke.errors import InputError

MANIFEST = "segments.json"


@dataclass(frozen=True)
class Block:
    """A part of a network that is timed as one, per image.

    `kind`: `block`, between two cut points, named after the one where it ends; or `exit`, body and
    head, named `exit_<e>`. `exit`: the segment it is in. `shape`: of its output. `nodes`: what the
    names of its nodes in the segment's graph begin with.
    """

    name: str
    kind: str
    exit: int
    macs: int
    parameters: int
    shape: tuple[int, ...]
    nodes: str


@dataclass(frozen=True)
class Manifest:
    """One precision's files in order, MACs per exit `[E]`, class names, image shape `(H, W, C)`.

    `main_macs` are those of the main exit without the other exits' branches: the plain network.
    `bits`: significant bits of 16-bit pictures. `blocks`, in order of execution: none in files of
    older versions. `fit`: how pictures of another size are read (`decode.fit_picture`).
    """

    segments: tuple[str, ...]
    macs: tuple[int, ...]
    main_macs: int
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    bits: int = BITS
    blocks: tuple[Block, ...] = ()
    fit: str = FIT

    def to_json(self) -> str:
        """The text of segments.json."""
        return json.dumps(asdict(self), indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """Read `folder/segments.json`. Errors: InputError when it is missing, damaged or incomplete."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text())
        names = tuple(map(str, content["segments"]))
        if any(Path(name).name != name or name == ".." or "\0" in name for name in names):
            raise ValueError(f"segments {names!r:.200} are not all plain names of files")
        return Manifest(
            segments=names,
            macs=tuple(content["macs"]),
            main_macs=content["main_macs"],
            classes=tuple(content["classes"]),
            image_shape=tuple(content["image_shape"]),
            bits=content.get("bits", BITS),
            blocks=parse_blocks(content.get("blocks", ())),
            fit=content.get("fit", FIT),
        )
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror}); copy the whole bundle, and let this user "
            "read it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(
            f"{path} is damaged ({error}); copy the whole bundle, or export the model, again"
        ) from error


def parse_blocks(rows: Iterable[Mapping[str, Any]]) -> tuple[Block, ...]:
    """Blocks from JSON values. Errors: KeyError or TypeError where a row is something else."""
    return tuple(Block(**{**row, "shape": tuple(row["shape"])}) for row in rows)

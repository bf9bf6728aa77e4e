"""Weights and logits in half precision, in files small enough to be carried home one by one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from edgeke.errors import InputError
from edgeke.files import read_json, write_bytes, write_json
from edgeke.learning.checkpoints import Preprocessing
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet

__all__ = ["LIMIT", "read_network", "read_pieces", "write_network", "write_pieces"]

LIMIT = 16_000_000  # bytes of a file; accelerator machines hand back no more than 16 MiB
_HEADER = 256_000  # more than safetensors' header of any of our networks


def write_pieces(tensors: Mapping[str, Tensor], stem: Path) -> list[str]:
    """Write `stem.<i>.safetensors`, each at most `LIMIT` bytes; returns the names.

    Matrices and kernels become float16; vectors, such as batch-norm statistics, and integers stay
    as they are: they are small, and statistics may not fit half precision. Errors: InputError when
    one tensor alone is too large, or does not fit half precision.
    """
    pieces: list[dict[str, Tensor]] = [{}]
    room = LIMIT - _HEADER
    for name, tensor in tensors.items():
        kept = tensor.detach().cpu().contiguous()
        kept = kept.half() if kept.is_floating_point() and kept.dim() >= 2 else kept
        if not bool(torch.isfinite(kept).all()):
            raise InputError(f"{stem.name}: {name} does not fit half precision; train it again")
        size = kept.numel() * kept.element_size()
        if size > LIMIT - _HEADER:
            raise InputError(f"{stem.name}: {name} alone takes {size} bytes; use a smaller --width")
        if size > room:
            pieces.append({})
            room = LIMIT - _HEADER
        pieces[-1][name] = kept
        room -= size
    for number, piece in enumerate(pieces):
        write_bytes(stem.with_name(f"{stem.name}.{number}.safetensors"), save(piece))
    return [f"{stem.name}.{number}.safetensors" for number in range(len(pieces))]


def read_pieces(folder: Path, names: list[str]) -> dict[str, Tensor]:
    """The tensors of all pieces, in the precision they were written in."""
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{folder / name} is missing or truncated ({error}); bring it home again"
            ) from error
    return tensors


def write_network(
    network: BranchyNet, stem: Path, *, preprocessing: Preprocessing, described: Mapping[str, Any]
) -> list[str]:
    """Write the pieces and, last, `stem.json` with architecture, preprocessing and description."""
    names = write_pieces(network.state_dict(), stem)
    plain = {
        "architecture": network.architecture.to_json(),
        "preprocessing": vars(preprocessing),
        "pieces": names,
        **described,
    }
    write_json(stem.with_name(f"{stem.name}.json"), plain)
    return names


def read_network(stem: Path) -> tuple[BranchyNet, Preprocessing, dict[str, Any]]:
    """The network in single precision and evaluation mode, its preprocessing and description.

    Errors: InputError when a piece is missing or does not fit the architecture.
    """
    described: dict[str, Any] = read_json(stem.with_name(f"{stem.name}.json"))
    values = described["preprocessing"]
    preprocessing = Preprocessing(**{key: tuple(value) for key, value in values.items()})
    network = BranchyNet(Architecture.from_json(described["architecture"]))
    tensors = read_pieces(stem.parent, described["pieces"])
    try:
        network.load_state_dict(tensors, strict=True)  # copies into single precision
    except RuntimeError as error:
        raise InputError(
            f"{stem}: the pieces do not fit the network ({str(error).splitlines()[0]}); bring all "
            f"of {json.dumps(described['pieces'])} home again"
        ) from error
    return network.eval(), preprocessing, described

"""Checkpoints: weights as safetensors beside a JSON file that says what they are."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from edgeke.data.dataset import Dataset
from edgeke.device.decode import BITS
from edgeke.errors import InputError
from edgeke.files import read_json, write_bytes, write_text
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet

__all__ = ["Preprocessing", "load_checkpoint", "save_checkpoint"]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What the network expects: normalisation in [0, 1], image shape [C, H, W], class names.

    `bits`: significant bits of 16-bit pictures.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    bits: int = BITS

    @classmethod
    def of(cls, dataset: Dataset) -> "Preprocessing":
        """The preprocessing that belongs to a dataset."""
        return cls(dataset.mean, dataset.std, dataset.image_shape, dataset.classes, dataset.bits)


def save_checkpoint(
    network: BranchyNet,
    path: Path,
    *,
    preprocessing: Preprocessing,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> None:
    """Write `path.safetensors` and `path.json`, each atomically.

    The JSON holds the architecture, preprocessing, params and metrics. The git commit stands in
    MLflow and in DVC's revision instead: here it would make equal networks differ, and DVC would
    train everything after them again (docs/decisions/004-no-commit-in-checkpoints.md).
    """
    state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    described = {
        "architecture": network.architecture.to_json(),
        "preprocessing": dataclasses.asdict(preprocessing),
        "params": dict(params),
        "metrics": dict(metrics),
    }
    text = json.dumps(described, indent=2, allow_nan=False, default=dataclasses.asdict) + "\n"
    write_bytes(path.with_suffix(".safetensors"), save(state))
    write_text(path.with_suffix(".json"), text)


def load_checkpoint(
    path: Path, device: torch.device, expected: Preprocessing | None = None
) -> tuple[BranchyNet, Preprocessing]:
    """Read a checkpoint strictly, in evaluation mode.

    Errors: InputError when a file is missing, truncated, or does not fit its description, or when
    the network was trained for another preprocessing than `expected`.
    """
    described, weights = read_json(path.with_suffix(".json")), path.with_suffix(".safetensors")
    try:
        architecture = Architecture.from_json(described["architecture"])
        values: dict[str, Any] = described["preprocessing"]
        lists = {key: tuple(value) for key, value in values.items() if isinstance(value, list)}
        preprocessing = Preprocessing(**{**values, **lists})
        network = BranchyNet(architecture)
        network.load_state_dict(load_file(weights), strict=True)
    except FileNotFoundError:
        raise InputError(f"{weights} is missing; `dvc repro` builds it") from None
    except (SafetensorError, OSError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{weights} is truncated or not the checkpoint its JSON describes ({reason}); delete "
            "both and run `dvc repro`"
        ) from error
    if expected not in (None, preprocessing):
        raise InputError(
            f"{weights} was trained on images of other classes, shape or normalisation than "
            "data/dataset.safetensors has; run `dvc repro`, or copy both from one machine"
        )
    return network.to(device).eval(), preprocessing

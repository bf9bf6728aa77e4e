"""Checkpoints: weights as safetensors beside a JSON file that says what they are."""

import dataclasses
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from edgeke.data.dataset import Dataset
from edgeke.errors import InputError
from edgeke.files import read_json, write_bytes, write_json
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet

__all__ = ["Preprocessing", "load_checkpoint", "save_checkpoint"]


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What the network expects: normalisation in [0, 1], image shape [C, H, W], class names."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> "Preprocessing":
        """The preprocessing that belongs to a dataset."""
        return cls(dataset.mean, dataset.std, dataset.image_shape, dataset.classes)


def save_checkpoint(
    network: BranchyNet,
    path: Path,
    *,
    preprocessing: Preprocessing,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> None:
    """Write `path.safetensors` and `path.json`, each atomically.

    The JSON holds the architecture, preprocessing, params, metrics and the git commit.
    """
    state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    write_bytes(path.with_suffix(".safetensors"), save(state))
    described = {
        "architecture": network.architecture.to_json(),
        "preprocessing": dataclasses.asdict(preprocessing),
        "params": {
            key: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
            for key, value in params.items()
        },
        "metrics": dict(metrics),
        "git_commit": _git_commit(),
    }
    write_json(path.with_suffix(".json"), described)


def load_checkpoint(path: Path, device: torch.device) -> tuple[BranchyNet, Preprocessing]:
    """Read a checkpoint strictly, in evaluation mode.

    Errors: InputError when a file is missing, truncated, or does not fit its description.
    """
    described, weights = read_json(path.with_suffix(".json")), path.with_suffix(".safetensors")
    try:
        architecture = Architecture.from_json(described["architecture"])
        values = described["preprocessing"]
        preprocessing = Preprocessing(**{key: tuple(value) for key, value in values.items()})
        network = BranchyNet(architecture)
        network.load_state_dict(load_file(weights), strict=True)
    except FileNotFoundError:
        raise InputError(f"{weights} is missing; `dvc repro` builds it") from None
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{weights} is truncated or not the checkpoint its JSON describes ({error}); delete "
            "both and run `dvc repro`"
        ) from error
    return network.to(device).eval(), preprocessing


def _git_commit() -> str | None:
    # DVC runs queued experiments in a copy whose HEAD is the experiment's baseline.
    baseline = os.environ.get("DVC_EXP_BASELINE_REV")
    if baseline:
        return baseline
    try:
        return subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

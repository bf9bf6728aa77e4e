"""Checkpoints: weights as safetensors beside a JSON file that says what they are."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from edgeke.data.dataset import Dataset
from edgeke.device.decode import BITS, FIT
from edgeke.errors import InputError
from edgeke.files import read_json, write_bytes, write_text
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """What the network expects: normalisation in [0, 1], image shape [C, H, W], class names.

    `bits`: significant bits of 16-bit pictures. `fit`: how pictures of another size are read.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_shape: tuple[int, int, int]
    classes: tuple[str, ...]
    bits: int = BITS
    fit: str = FIT

    @classmethod
    def of(cls, dataset: Dataset) -> "Preprocessing":
        """The preprocessing that belongs to a dataset."""
        shape, bits, fit = dataset.image_shape, dataset.bits, dataset.fit
        return cls(dataset.mean, dataset.std, shape, dataset.classes, bits, fit)


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
    if expected is not None and expected != preprocessing:
        raise InputError(
            f"{weights} was trained on other images than data/dataset.safetensors has: "
            f"{_differences(preprocessing, expected)}; run `dvc repro`, or copy both from one "
            "machine"
        )
    return network.to(device).eval(), preprocessing


def _differences(one: Preprocessing, other: Preprocessing) -> str:
    """What differs, in words: `classes cat, dog instead of dog, cat`."""

    def words(value: object) -> str:
        values = value if isinstance(value, tuple) else (value,)
        text = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
        return text if len(text) < 100 else f"{text[:90]}..."

    return "; ".join(
        f"{field.name} {words(first)} instead of {words(second)}"
        for field in dataclasses.fields(Preprocessing)
        if (first := getattr(one, field.name)) != (second := getattr(other, field.name))
    )


def load_teacher(path: Path, student: Preprocessing, expected: Preprocessing) -> BranchyNet:
    """Read the teacher so that it takes images normalised for the student.

    `expected` is what it must have been trained with: the dataset's, with the mean and deviation of
    its start weights where it has any. They differ from the student's where only one of the two
    starts from pretrained weights. Errors: InputError as `load_checkpoint`.
    """
    cpu = torch.device("cpu")
    teacher, _ = load_checkpoint(path, cpu, expected)
    if expected == student:
        return teacher
    per_channel = [
        torch.tensor(values).view(1, -1, 1, 1)
        for values in (student.mean, student.std, expected.mean, expected.std)
    ]

    def renormalise(module: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        mean, std, own_mean, own_std = (values.to(inputs[0].device) for values in per_channel)
        return (inputs[0] * std + mean - own_mean) / own_std

    teacher.register_forward_pre_hook(renormalise)
    return teacher

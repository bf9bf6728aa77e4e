"""A dataset's training and validation images on the device."""

from dataclasses import dataclass

import torch
from torch import Tensor

from edgeke.data.augment import Normalise
from edgeke.data.dataset import Dataset


@dataclass(frozen=True)
class Images:
    """Training and validation images, uint8 `[N, C, H, W]`, with their normalisation."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    classes: int
    normalise: Normalise

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> "Images":
        """Copy the splits `train` and `validation` of a dataset to the device, once."""
        train, validation = dataset["train"], dataset["validation"]
        return cls(
            torch.from_numpy(train.images).to(device),
            torch.from_numpy(train.labels).to(device),
            torch.from_numpy(validation.images).to(device),
            torch.from_numpy(validation.labels).to(device),
            len(dataset.classes),
            Normalise(dataset.mean, dataset.std, device),
        )

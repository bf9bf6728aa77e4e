"""A dataset's training and validation images, on the device where they fit."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from edgeke.data.augment import Normalise
from edgeke.data.dataset import Dataset

# Of images in one batch without gradients: 55 of 224x224 in colour.
_PIXELS = 16 * 128 * 128


@dataclass(frozen=True)
class Images:
    """Training and validation images, uint8 `[N, C, H, W]`, with their normalisation.

    Labels are on the device. Images are there as well, or in the file from which they are mapped:
    then every batch is brought to the device.
    """

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    classes: tuple[str, ...]
    normalise: Normalise

    @property
    def device(self) -> torch.device:
        """Where training takes place."""
        return self.train_labels.device

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> "Images":
        """The splits `train` and `validation` of a dataset."""
        train, validation = dataset["train"], dataset["validation"]
        with warnings.catch_warnings():
            # torch has no read-only tensors, and warns. Nothing writes into images.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            images = [torch.from_numpy(split.images) for split in (train, validation)]
        return cls(
            resident(images[0], device),
            torch.from_numpy(train.labels).to(device),
            resident(images[1], device),
            torch.from_numpy(validation.labels).to(device),
            dataset.classes,
            Normalise(dataset.mean, dataset.std, device),
        )


def resident(images: Tensor, device: torch.device) -> Tensor:
    """Images on the device where they take at most half of its free memory, else as they are.

    The CPU keeps what is mapped where it is: the system reads it when it is needed.
    """
    if device.type == "cuda" and images.nbytes > torch.cuda.mem_get_info(device)[0] / 2:
        return images
    return images.to(device)


def at_once(images: Tensor, most: int) -> int:
    """How many images to compute at once without gradients: `most`, fewer where they are large.

    Otherwise a CPU's cache is too small for a layer's features: at 128x128, 16 images at once are
    twice as fast as 100. On an accelerator memory would not do.
    """
    pixels = _PIXELS if images.device.type == "cpu" else 16 * _PIXELS
    return max(1, min(most, pixels // (images.shape[-2] * images.shape[-1])))

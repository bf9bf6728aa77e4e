"""Images on the device, and what a network answers on them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeke.data.augment import Normalise
from edgeke.data.dataset import Dataset, Split

__all__ = ["Images", "evaluate", "predict"]

_PREDICT_BATCH = 500


@dataclass(frozen=True)
class Images:
    """Training and validation images on the device, uint8, with their normalisation."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    classes: int
    normalise: Normalise

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device) -> "Images":
        """Move the splits `train` and `validation` of a dataset to the device, once."""

        def tensors(split: Split) -> tuple[Tensor, Tensor]:
            return (
                torch.from_numpy(split.images).to(device),
                torch.from_numpy(split.labels).to(device),
            )

        normalise = Normalise(dataset.mean, dataset.std, device)
        return cls(
            *tensors(dataset["train"]),
            *tensors(dataset["validation"]),
            len(dataset.classes),
            normalise,
        )


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, normalise: Normalise) -> Tensor:
    """Logits `[E, N, K]` of uint8 images `[N, C, H, W]`, in evaluation mode."""
    training = network.training
    network.eval()
    parts = [network(normalise(batch)) for batch in torch.split(images, _PREDICT_BATCH)]
    network.train(training)
    return torch.cat(parts, dim=1)


def evaluate(
    network: nn.Module, images: Images, exits: tuple[int, ...] | None = None
) -> dict[str, float]:
    """Cross-entropy and accuracy on the validation split, per exit where `exits` names them."""
    logits, labels = predict(network, images.validation, images.normalise), images.validation_labels
    names = [f"validation/exit_{e}/" for e in exits] if exits else ["validation/"]
    metrics = {}
    for name, at_exit in zip(names, logits, strict=True):
        metrics[f"{name}loss"] = float(F.cross_entropy(at_exit, labels))
        metrics[f"{name}accuracy"] = float((at_exit.argmax(-1) == labels).double().mean())
    return metrics

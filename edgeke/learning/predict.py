"""What a network answers on images, and how good its answers are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeke.data.augment import Normalise
from edgeke.learning.images import Images, at_once

_BATCH = 500


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, normalise: Normalise) -> Tensor:
    """Logits `[E, N, K]` of uint8 images `[N, C, H, W]`, in evaluation mode."""
    training = network.training
    network.eval()
    batches = torch.split(images, at_once(images, _BATCH))
    parts = [network(normalise(batch)) for batch in batches]
    network.train(training)
    return torch.cat(parts, dim=1)


def evaluate(
    network: nn.Module, images: Images, names: tuple[str, ...] | None = None
) -> dict[str, float]:
    """Cross-entropy (in nats) and accuracy of every exit on the validation split.

    Keys are `validation/<name>/loss` and `validation/<name>/accuracy` with the exits' names;
    without names, for one exit, `validation/loss` and `validation/accuracy`.
    """
    logits, labels = predict(network, images.validation, images.normalise), images.validation_labels
    prefixes = [f"validation/{name}/" for name in names] if names else ["validation/"]
    metrics = {}
    for prefix, at_exit in zip(prefixes, logits, strict=True):
        metrics[f"{prefix}loss"] = float(F.cross_entropy(at_exit, labels))
        metrics[f"{prefix}accuracy"] = float((at_exit.argmax(-1) == labels).double().mean())
    return metrics

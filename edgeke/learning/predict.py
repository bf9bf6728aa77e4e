"""What a network answers on images, and how good its answers are."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeke.data.answers import never_answered
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
    """What every exit is worth on the validation split.

    `loss`, cross-entropy in nats, `accuracy`, and `never_answered`, how many classes of its images
    no answer names. Keys are `validation/<name>/loss` with the exits' names; without names, for one
    exit, `validation/loss`.
    """
    logits, labels = predict(network, images.validation, images.normalise), images.validation_labels
    prefixes = [f"validation/{name}/" for name in names] if names else ["validation/"]
    metrics = {}
    for prefix, at_exit in zip(prefixes, logits, strict=True):
        metrics[f"{prefix}loss"] = float(F.cross_entropy(at_exit, labels))
        answers = at_exit.argmax(-1)
        metrics[f"{prefix}accuracy"] = float((answers == labels).double().mean())
        never = never_answered(answers.cpu().numpy(), labels.cpu().numpy())
        metrics[f"{prefix}never_answered"] = float(len(never))
    return metrics

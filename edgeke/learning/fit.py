"""The training loop, and inference: data resident on the device, one sync an epoch."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from edgeke.data.augment import Normalise, augment
from edgeke.data.dataset import Dataset, Split
from edgeke.errors import InputError
from edgeke.learning.objectives import Objective
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import Recipe

__all__ = [
    "History",
    "Images",
    "OnEpoch",
    "Trained",
    "default_device",
    "evaluate",
    "fit",
    "predict",
    "train_alone",
]

# One row an epoch: {"train/loss": ..., "validation/accuracy": ..., ...}
History = list[dict[str, float]]

# Called with the epoch, counted from 1, and its row.
OnEpoch = Callable[[int, dict[str, float]], None]

_PREDICT_BATCH = 500


@dataclass(frozen=True)
class Images:
    """Training and validation images on the device, uint8, with their normalisation."""

    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
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
        return cls(*tensors(dataset["train"]), *tensors(dataset["validation"]), normalise)


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    network: nn.Module,
    objective: Objective,
    images: Images,
    recipe: Recipe,
    *,
    seed: int,
    description: str,
    on_epoch: OnEpoch,
) -> History:
    """Train `network` in place on the objective; the last epoch's weights are kept.

    Parameters with `requires_grad=False` stay as they are. Nothing is selected: validation is only
    reported. Errors: InputError when the batch exceeds the split or the loss diverges.
    """
    count = len(images.train)
    if recipe.batch_size > count:
        raise InputError(
            f"batch_size = {recipe.batch_size} exceeds the {count} training images; lower it in "
            "the profile's recipes"
        )
    # Channels last: measured 1.2x faster on the CPU at width 16, and what GPUs prefer.
    network.to(device=images.train.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    generator = torch.Generator().manual_seed(seed)
    steps = count // recipe.batch_size
    optimiser = torch.optim.SGD(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        max_lr=recipe.learning_rate,
        total_steps=recipe.epochs * steps,
        pct_start=recipe.warmup,
        cycle_momentum=False,
    )
    history: History = []
    bar = tqdm(total=recipe.epochs * steps, desc=description, unit="step", mininterval=1)
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        order = torch.randperm(count, generator=generator).to(images.train.device)
        sums = torch.zeros(2, device=images.train.device)
        for step in range(steps):
            batch = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            inputs = augment(images.train[batch], recipe.crop_padding, recipe.flip, generator)
            labels = images.train_labels[batch]
            outcome = objective(network, images.normalise(inputs), labels)
            optimiser.zero_grad()
            outcome["loss"].backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            correct = (outcome["logits"].detach().argmax(-1) == labels).float().mean()
            sums += torch.stack([outcome["loss"].detach(), correct])
            bar.update()
        loss, accuracy = (sums / steps).tolist()
        if not torch.isfinite(sums[0]):
            raise InputError(
                f"the loss of {description} diverged in epoch {epoch}; lower learning_rate "
                f"(now {recipe.learning_rate}) in the profile's recipes, or kd.beta"
            )
        row = {"train/loss": loss, "train/accuracy": accuracy}
        row |= evaluate(network, images)
        bar.set_postfix(loss=f"{loss:.3f}", validation=f"{row['validation/accuracy']:.4f}")
        on_epoch(epoch, row)
        history.append(row)
    bar.close()
    return history


@dataclass(frozen=True)
class Trained:
    """A trained network with its curves."""

    network: BranchyNet
    history: History

    def rows(self) -> list[dict[str, object]]:
        """The history as rows of a table, epochs counted from 1."""
        return [{"epoch": epoch, **row} for epoch, row in enumerate(self.history, 1)]


def train_alone(
    architecture: Architecture,
    objective: Objective,
    images: Images,
    recipe: Recipe,
    *,
    seed: int,
    description: str,
    on_epoch: OnEpoch,
) -> Trained:
    """Build a network and train all of it; the seed fixes weights, order and augmentation."""
    torch.manual_seed(seed)
    network = BranchyNet(architecture)
    history = fit(
        network, objective, images, recipe, seed=seed, description=description, on_epoch=on_epoch
    )
    return Trained(network, history)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, normalise: Normalise) -> Tensor:
    """Logits `[E, N, K]` of uint8 images `[N, C, H, W]`, in evaluation mode."""
    training = network.training
    network.eval()
    parts = [network(normalise(batch)) for batch in torch.split(images, _PREDICT_BATCH)]
    network.train(training)
    return torch.cat(parts, dim=1)


def evaluate(network: nn.Module, images: Images) -> dict[str, float]:
    """Cross-entropy and accuracy of the network's last exit on the validation split."""
    logits = predict(network, images.validation, images.normalise)[-1]
    labels = images.validation_labels
    return {
        "validation/loss": float(F.cross_entropy(logits, labels)),
        "validation/accuracy": float((logits.argmax(-1) == labels).double().mean()),
    }

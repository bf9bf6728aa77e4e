"""The training loop: images on the device where they fit, one wait an epoch, resumable."""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from edgeke.data.answers import useless
from edgeke.data.augment import Augment
from edgeke.errors import InputError, escaped
from edgeke.learning import parallel
from edgeke.learning.images import Images
from edgeke.learning.objectives import Objective
from edgeke.learning.predict import evaluate, predict
from edgeke.learning.resume import (
    Progress,
    ResumeFile,
    Stopped,
    load_optimiser,
    optimiser_tensors,
    stop_signals,
)
from edgeke.learning.schedules import learning_rate
from edgeke.params import Optimisation, Plan

# One row an epoch: {"train/loss": ..., "validation/accuracy": ..., ...}
History = list[dict[str, float]]

Tensors = tuple[Tensor, ...] | list[Tensor]

# Called with the epoch, counted from 1, and its row.
OnEpoch = Callable[[int, dict[str, float]], None]


def fit(
    network: nn.Module,
    objective: Objective,
    images: Images,
    plan: Plan,
    *,
    description: str,
    on_epoch: OnEpoch,
    names: tuple[str, ...] | None = None,
    root: nn.Module | None = None,
    resume: ResumeFile | None = None,
    trunk: nn.Module | None = None,
) -> History:
    """Train `network` in place on the objective; the last epoch's weights (or their EMA) are kept.

    Parameters with `requires_grad=False` stay as they are. Validation is only reported. With
    `patience` it ends training early, and the epoch with the least loss is kept. `names`, one for
    each exit of the network, stand in the rows' keys. Parameters of `trunk`, a part that starts
    from good weights, learn at `trunk_rate`. With `resume`, the state of `root` (default:
    `network`) is written to its file every few epochs and on SIGTERM, and the same call goes on
    from it: on the CPU the result is bit-identical to an uninterrupted run. Errors: InputError when
    the batch exceeds the split or the loss diverges; Stopped on SIGTERM.
    """
    recipe, count, device = plan.recipe, len(images.train), images.device
    if recipe.batch_size > count:
        raise InputError(
            f"batch_size = {recipe.batch_size} exceeds the {count} training images; lower it in "
            "the profile's recipes"
        )
    parallel.start(recipe.batch_size)
    network.to(device)
    if plan.training.channels_last and _is_channels_last_safe(network, device):
        network.to(memory_format=torch.channels_last)
    training = _Training(network, root or network, objective, images, plan, names, trunk)
    saved = resume.load() if resume else None
    if resume and saved and not training.restore(*saved):
        resume.refuse("its tensors are not this network's")
    for epoch, row in enumerate(training.history, 1):
        on_epoch(epoch, row)
    done = training.epoch * training.steps + training.step
    total = recipe.epochs * training.steps
    bar = tqdm(
        total=total,
        initial=done,
        desc=description,
        unit="step",
        mininterval=1,
        disable=not parallel.first_process(),
    )
    with stop_signals() as signals, bar:
        while not training.finished():
            while training.step < training.steps:
                if _told_to_stop(signals, device):
                    if resume:
                        resume.save(training.progress(), training.state())
                    raise Stopped(f"{description} was told to stop; the same command goes on")
                training.train_step()
                bar.update()
            row = training.end_epoch()
            if not all(map(math.isfinite, row.values())):
                raise InputError(
                    f"the loss of {description} diverged in epoch {training.epoch}; lower "
                    f"learning_rate (now {recipe.learning_rate}) in the profile's recipes, or "
                    "kd.beta"
                )
            on_epoch(training.epoch, row)
            due = training.epoch % plan.training.checkpoint_every == 0
            if resume and (due or training.finished()):
                resume.save(training.progress(), training.state())
    training.keep()
    if parallel.first_process():
        for line in training.remarks(description):
            print(line, file=sys.stderr)
    return training.history


def kept_epoch(history: History, plan: Plan, names: tuple[str, ...] | None = None) -> int:
    """Whose weights a training keeps: the last epoch's, with `patience` those of the least loss.

    With several exits, the last one's loss decides.
    """
    if plan.optimisation.patience is None:
        return len(history)
    losses = [
        row[f"validation/{names[-1] if names else ''}/loss".replace("//", "/")] for row in history
    ]
    return 1 + losses.index(min(losses))


class _Training:
    """One training: the network and everything that changes from step to step."""

    def __init__(
        self,
        network: nn.Module,
        root: nn.Module,
        objective: Objective,
        images: Images,
        plan: Plan,
        names: tuple[str, ...] | None,
        trunk: nn.Module | None,
    ) -> None:
        self.network, self.root, self.objective = network.train(), root, objective
        self.images, self.plan, self.names = images, plan, names
        self.steps = len(images.train) // plan.recipe.batch_size
        self.epoch, self.step = 0, 0  # finished epochs, steps of the next
        self.history: History = []
        self.optimiser = make_optimiser(network, plan.optimisation, trunk)
        self.average = _moving_average(network, plan.optimisation.ema)
        self.best: dict[str, Tensor] = {}  # with patience, the weights of the epoch that is kept
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.order = torch.zeros(0, dtype=torch.int64)  # of the images in this epoch
        self.sums = torch.zeros(0)  # of the loss and of every exit's accuracy in this epoch
        self.augment = Augment(plan.augmentation, len(images.classes), images.normalise.mean)
        together = parallel.wrap(network)
        self.forward: Any = torch.compile(together) if plan.training.compile else together

    def train_step(self) -> None:
        """One batch: augment, forward, backward, update.

        Nothing here waits for the device, unless images have to be brought there.
        """
        batch, images, device = self.plan.recipe.batch_size, self.images, self.images.device
        if self.step == 0:
            order = self._order()
            self.order = order.to(images.train.device)
            self.sums = torch.zeros(1 + len(self.names or ("",)), device=device)
        chosen = self.order[self.step * batch :][:batch]
        inputs = images.train[chosen].to(device)
        labels = images.train_labels[chosen.to(device)]
        # Augmented as one global batch and then shared: any number of processes sees the same.
        inputs, targets = self.augment(inputs, labels, self.generator)
        inputs = images.normalise(parallel.share(inputs))
        targets, labels = parallel.share(targets), parallel.share(labels)
        mixed_precision = self.plan.training.precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
            outcome = self.objective(self.forward, inputs, targets)
        self.optimiser.zero_grad()
        outcome["loss"].backward()  # type: ignore[no-untyped-call]
        if self.plan.optimisation.clip is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.optimisation.clip)
        rate = learning_rate(self.plan, self.epoch * self.steps + self.step, self.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimiser.step()
        if self.average is not None:
            self.average.update_parameters(self.network)
        correct = (outcome["logits"].detach().argmax(-1) == labels).float().mean(-1)
        self.sums += torch.cat([outcome["loss"].detach()[None], correct])
        self.step += 1

    def _order(self) -> Tensor:
        """The images of an epoch: each once, or, balanced, every class equally often by chance."""
        count, generator = len(self.images.train), self.generator
        if self.plan.optimisation.sampling == "uniform":
            return torch.randperm(count, generator=generator)
        labels = self.images.train_labels.cpu()
        rarity = 1 / torch.bincount(labels, minlength=len(self.images.classes)).double()
        return torch.multinomial(rarity[labels], count, replacement=True, generator=generator)

    def end_epoch(self) -> dict[str, float]:
        """Count the epoch and return its row: training means, and metrics on validation."""
        loss, *accuracies = (parallel.mean(self.sums) / self.steps).tolist()
        names = [f"train/{name}/" for name in self.names] if self.names else ["train/"]
        row = {f"{names[0]}loss" if len(names) == 1 else "train/loss": loss}
        row |= {f"{name}accuracy": value for name, value in zip(names, accuracies, strict=True)}
        row |= evaluate(self._latest(), self.images, self.names)
        # The first process's row, so that all agree on when to stop.
        row = dict(json.loads(parallel.from_first(json.dumps(row).encode())))
        self.epoch, self.step = self.epoch + 1, 0
        self.history.append(row)
        if self.plan.optimisation.patience is not None and self._kept() == self.epoch:
            state = self._latest().state_dict()
            self.best = {name: tensor.detach().clone() for name, tensor in state.items()}
        return row

    def finished(self) -> bool:
        """Whether all epochs are done, or validation loss has not fallen for `patience` epochs.

        Those in which the rate rises do not count: the loss need not fall there.
        """
        recipe, patience = self.plan.recipe, self.plan.optimisation.patience
        if self.epoch == recipe.epochs:
            return True
        if patience is None or not self.epoch:
            return False
        risen = math.ceil(recipe.warmup * recipe.epochs)
        return self.epoch - max(self._kept(), risen) >= patience

    def keep(self) -> None:
        """Give the network the weights that are kept: the best, averaged or latest ones."""
        if self.best:
            self.network.load_state_dict(self.best)
        elif self.average is not None:
            self.network.load_state_dict(self.average.module.state_dict())

    def remarks(self, description: str) -> list[str]:
        """What a user should know of the training, which `description` names."""
        lines, kept, recipe = [], self._kept(), self.plan.recipe
        if self.epoch < recipe.epochs:
            lines.append(
                f"note: {description} ended early, after epoch {self.epoch} of {recipe.epochs}: "
                f"validation loss had not fallen for {self.plan.optimisation.patience} epochs; "
                f"epoch {kept} is kept"
            )
        elif kept < self.epoch:
            lines.append(
                f"note: of {description} epoch {kept} of {self.epoch} is kept, with the least loss"
            )
        images = self.images
        labels = images.validation_labels.cpu().numpy()
        answers = predict(self.network, images.validation, images.normalise).argmax(-1).cpu()
        for name, at_exit in zip(self.names or (description,), answers.numpy(), strict=True):
            if reason := useless(at_exit, labels, images.classes):
                lines.append(
                    f"warning: on validation {name} {escaped(reason)}; look at its curve in "
                    "results/, and at learning_rate, epochs and optimisation"
                )
        return lines

    def _kept(self) -> int:
        return kept_epoch(self.history, self.plan, self.names)

    def _latest(self) -> nn.Module:
        return self.average.module if self.average is not None else self.network

    def progress(self) -> Progress:
        return Progress(self.epoch, self.step, self.history)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as named tensors."""
        state = {f"root.{name}": tensor for name, tensor in self.root.state_dict().items()}
        state |= optimiser_tensors(self.optimiser)
        if self.average is not None:
            average = self.average.state_dict()
            state |= {f"average.{name}": tensor for name, tensor in average.items()}
        state |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        generator = self.generator.get_state()
        return state | {"generator": generator, "order": self.order, "sums": self.sums}

    def restore(self, progress: Progress, tensors: dict[str, Tensor]) -> bool:
        """Take over a saved state; false, and nothing changes, where it is of other weights."""

        def part(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}

        own = self.state()
        for prefix in ("root.", "average."):
            one, other = part(prefix, own), part(prefix, tensors)
            if {k: v.shape for k, v in one.items()} != {k: v.shape for k, v in other.items()}:
                return False
        self.root.load_state_dict(part("root.", tensors))
        load_optimiser(self.optimiser, tensors)
        if self.average is not None:
            self.average.load_state_dict(part("average.", tensors))
        self.best = part("best.", tensors)
        self.generator.set_state(tensors["generator"])
        self.order = tensors["order"].to(self.images.train.device)
        self.sums = tensors["sums"].to(self.images.device)
        self.epoch, self.step, self.history = progress.epoch, progress.step, progress.history
        return True


def make_optimiser(
    network: nn.Module, optimisation: Optimisation, trunk: nn.Module | None = None
) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW over all parameters that may learn.

    Without `decay_norms`, weight decay spares norms and biases (all one-dimensional parameters).
    Each group's `ratio` is of the learning rate: `trunk_rate` for parameters of `trunk`, else 1.
    """
    slow = {id(p) for p in trunk.parameters()} if trunk else set()
    parts: dict[tuple[float, float], list[nn.Parameter]] = {}  # by weight decay and ratio
    for p in network.parameters():
        if p.requires_grad:
            decays = p.dim() >= 2 or optimisation.decay_norms
            ratio = optimisation.trunk_rate if id(p) in slow else 1.0
            parts.setdefault((optimisation.weight_decay * decays, ratio), []).append(p)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "ratio": ratio}
        for (decay, ratio), parameters in parts.items()
    ]
    momentum = optimisation.momentum
    if optimisation.optimiser == "sgd":
        return torch.optim.SGD(groups, momentum=momentum, nesterov=optimisation.nesterov)
    kind = torch.optim.Adam if optimisation.optimiser == "adam" else torch.optim.AdamW
    return kind(groups, betas=(momentum, 0.999))


def _moving_average(network: nn.Module, decay: float) -> AveragedModel | None:
    if not decay:
        return None

    def average(means: Tensors, values: Tensors, count: Tensor | int) -> None:
        # Ten steps at first and more with time: else a training shorter than the decay's memory
        # would keep the weights of its beginning.
        share = 1 - torch.clamp(
            (1 + torch.as_tensor(count)) / (10 + torch.as_tensor(count)), max=decay
        )
        for mean, value in zip(means, values, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), share.to(mean))
            else:
                mean.copy_(value)

    return AveragedModel(network, multi_avg_fn=average, use_buffers=True)


def _is_channels_last_safe(network: nn.Module, device: torch.device) -> bool:
    """Whether PyTorch may be given this network with channels last.

    On the CPU, with several threads, channels that are no multiple of 16 and an odd batch, the
    backward pass of torch 2.15 corrupts memory and the process dies (docs/log.md).
    """
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    return device.type != "cpu" or all(m.out_channels % 16 == 0 for m in convolutions)


def _told_to_stop(signals: list[int], device: torch.device) -> bool:
    """Whether any process was: all must stop at the same step."""
    if parallel.world_size() == 1:
        return bool(signals)
    return bool(parallel.mean(torch.tensor([float(bool(signals))], device=device)) > 0)

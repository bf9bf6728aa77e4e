"""The training loop: data resident on the device, one sync an epoch, resumable at any step."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from edgeke.data.augment import Augment
from edgeke.errors import InputError
from edgeke.learning.images import Images, evaluate
from edgeke.learning.objectives import Objective
from edgeke.learning.parallel import current_parallel, world_size
from edgeke.learning.resume import (
    Progress,
    ResumeFile,
    Stopped,
    load_optimiser,
    optimiser_tensors,
    stop_signals,
)
from edgeke.learning.schedules import SCHEDULES
from edgeke.params import Plan

__all__ = ["History", "OnEpoch", "fit", "make_optimiser"]

# One row an epoch: {"train/loss": ..., "validation/accuracy": ..., ...}
History = list[dict[str, float]]

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
    exits: tuple[int, ...] | None = None,
    root: nn.Module | None = None,
    resume: ResumeFile | None = None,
) -> History:
    """Train `network` in place on the objective; the last epoch's weights (or their EMA) are kept.

    Parameters with `requires_grad=False` stay as they are. Nothing is selected: validation is only
    reported, and stops training early when `patience` asks for it. `exits` names the exits in the
    rows. With `resume`, the state of `root` (default: `network`) is saved every few epochs and on
    SIGTERM, and picked up again: on the CPU the result is bit-identical to an uninterrupted run.
    Errors: InputError when the batch exceeds the split or the loss diverges; Stopped on SIGTERM.
    """
    recipe, device = plan.recipe, images.train.device
    count = len(images.train)
    if recipe.batch_size > count:
        raise InputError(
            f"batch_size = {recipe.batch_size} exceeds the {count} training images; lower it in "
            "the profile's recipes"
        )
    network.to(device)
    if plan.training.channels_last and _lies_channels_last(network, device):
        network.to(memory_format=torch.channels_last)
    run = _Run(network, root or network, objective, images, plan, exits)
    saved = resume.load() if resume else None
    progress = run.restore(*saved) if saved else Progress(0, 0, [])
    for epoch, row in enumerate(progress.history, 1):
        on_epoch(epoch, row)
    bar = tqdm(
        total=recipe.epochs * run.steps,
        initial=progress.epoch * run.steps + progress.step,
        desc=description,
        unit="step",
        mininterval=1,
    )
    with stop_signals() as stopped, bar:
        while progress.epoch < recipe.epochs and not run.out_of_patience(progress.history):
            trained, step = run.epoch(progress, bar, stopped)
            if trained is None:
                progress = Progress(progress.epoch, step, progress.history)
                if resume:
                    resume.save(progress, run.state())
                raise Stopped(f"{description} was told to stop; the same command goes on")
            row = trained
            if not all(map(math.isfinite, row.values())):
                raise InputError(
                    f"the loss of {description} diverged in epoch {progress.epoch + 1}; lower "
                    f"learning_rate (now {recipe.learning_rate}) in the profile's recipes, or "
                    "kd.beta"
                )
            progress = Progress(progress.epoch + 1, 0, [*progress.history, row])
            on_epoch(progress.epoch, row)
            bar.set_postfix(loss=f"{row['train/loss']:.3f}")
            done = progress.epoch == recipe.epochs or run.out_of_patience(progress.history)
            if resume and (done or progress.epoch % plan.training.checkpoint_every == 0):
                resume.save(progress, run.state())
    run.finish()
    return progress.history


def _lies_channels_last(network: nn.Module, device: torch.device) -> bool:
    """Whether PyTorch may be given this network channels last.

    On the CPU, with several threads, channels that are no multiple of 16 and an odd batch, the
    backward pass of torch 2.15 writes where it must not and the process dies (docs/log.md).
    """
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    return device.type != "cpu" or all(m.out_channels % 16 == 0 for m in convolutions)


class _Run:
    """The mutable state of one training: network, optimiser, moving average, generator."""

    def __init__(
        self,
        network: nn.Module,
        root: nn.Module,
        objective: Objective,
        images: Images,
        plan: Plan,
        exits: tuple[int, ...] | None,
    ) -> None:
        self.network, self.root, self.images, self.plan = network, root, images, plan
        self.exits = exits
        self.steps = len(images.train) // plan.recipe.batch_size
        self.optimiser = make_optimiser(network, plan)
        decay = plan.optimisation.ema
        self.average = (
            AveragedModel(
                network,
                multi_avg_fn=get_ema_multi_avg_fn(decay),  # type: ignore[no-untyped-call]
                use_buffers=True,
            )
            if decay
            else None
        )
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.order = torch.zeros(0, dtype=torch.int64)
        self.sums = torch.zeros(0)
        self.augment = Augment(plan.augmentation, images.classes, images.normalise.mean)
        self.objective = objective
        self.parallel = current_parallel(plan.recipe.batch_size)
        together = self.parallel.wrap(network)
        self.answering: Any = torch.compile(together) if plan.training.compile else together

    def epoch(
        self, progress: Progress, bar: "tqdm[None]", stopped: list[int]
    ) -> tuple[dict[str, float] | None, int]:
        """Train one epoch from `progress.step` on; None, and the step, when told to stop."""
        recipe, settings = self.plan.recipe, self.plan.optimisation
        device = self.images.train.device
        mixed_precision = self.plan.training.precision == "bf16"
        self.network.train()
        if not len(self.order):  # empty between epochs; a stop at step 0 keeps what was drawn
            self.order = torch.randperm(len(self.images.train), generator=self.generator)
            self.sums = torch.zeros(1 + len(self.exits or (0,)), device=device)
        order = self.order.to(device)
        for step in range(progress.step, self.steps):
            if self._told_to_stop(stopped):
                return None, step
            self._set_rate(progress.epoch * self.steps + step)
            batch = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            labels = self.images.train_labels[batch]
            inputs, targets = self.augment(self.images.train[batch], labels, self.generator)
            # Augmented as one global batch, then shared: any number of processes sees the same.
            inputs, targets = self.parallel.share(inputs), self.parallel.share(targets)
            labels, inputs = self.parallel.share(labels), self.images.normalise(inputs)
            with torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision):
                outcome = self.objective(self.answering, inputs, targets)
            self.optimiser.zero_grad()
            outcome["loss"].backward()  # type: ignore[no-untyped-call]
            if settings.clip is not None:
                nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip)
            self.optimiser.step()
            if self.average is not None:
                self.average.update_parameters(self.network)
            right = (outcome["logits"].detach().argmax(-1) == labels).float().mean(-1)
            self.sums += torch.cat([outcome["loss"].detach()[None], right])
            bar.update()
        self.order = self.order[:0]
        loss, *accuracies = (self.parallel.mean(self.sums) / self.steps).tolist()
        row = {"train/loss": loss}
        names = [f"exit_{e}/" for e in self.exits] if self.exits else [""]
        row |= {f"train/{n}accuracy": a for n, a in zip(names, accuracies, strict=True)}
        kept = self.average.module if self.average is not None else self.network
        return row | evaluate(kept, self.images, self.exits), 0

    def out_of_patience(self, history: History) -> bool:
        """Whether validation loss has not fallen for `patience` epochs."""
        patience = self.plan.optimisation.patience
        if patience is None or len(history) <= patience:
            return False
        last = f"exit_{self.exits[-1]}/" if self.exits else ""
        losses = [row[f"validation/{last}loss"] for row in history]
        return min(losses[-patience:]) >= min(losses[:-patience])

    def finish(self) -> None:
        """Keep the moving average's weights where there is one."""
        if self.average is not None:
            self.network.load_state_dict(self.average.module.state_dict())

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as named tensors."""
        state = {f"root.{name}": tensor for name, tensor in self.root.state_dict().items()}
        state |= optimiser_tensors(self.optimiser)
        if self.average is not None:
            average = self.average.state_dict()
            state |= {f"average.{name}": tensor for name, tensor in average.items()}
        generator = self.generator.get_state()
        return state | {"generator": generator, "order": self.order, "sums": self.sums}

    def restore(self, progress: Progress, tensors: dict[str, Tensor]) -> Progress:
        """Put back a saved state; returns its progress."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.root.load_state_dict(part("root."))
        load_optimiser(self.optimiser, tensors)
        if self.average is not None:
            self.average.load_state_dict(part("average."))
        self.generator.set_state(tensors["generator"])
        self.order = tensors["order"]
        self.sums = tensors["sums"].to(self.images.train.device)
        return progress

    def _told_to_stop(self, stopped: list[int]) -> bool:
        """Whether any process was: all must stop at the same step."""
        if world_size() == 1:
            return bool(stopped)
        flag = torch.tensor([float(bool(stopped))], device=self.images.train.device)
        return bool(self.parallel.mean(flag) > 0)

    def _set_rate(self, step: int) -> None:
        recipe = self.plan.recipe
        share = step / max(1, recipe.epochs * self.steps - 1)
        factor = SCHEDULES[self.plan.optimisation.schedule](share, recipe.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = recipe.learning_rate * factor


def make_optimiser(network: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """SGD with momentum, Adam or AdamW over everything that may learn.

    Without `decay_norms`, weight decay spares norms and biases (all one-dimensional parameters).
    """
    settings = plan.optimisation
    learning = [p for p in network.parameters() if p.requires_grad]
    spared = [p for p in learning if p.dim() < 2 and not settings.decay_norms]
    decayed = [p for p in learning if p.dim() >= 2 or settings.decay_norms]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    rate = plan.recipe.learning_rate
    if settings.optimiser == "sgd":
        nesterov = settings.nesterov
        return torch.optim.SGD(groups, rate, settings.momentum, nesterov=nesterov)
    kind = torch.optim.Adam if settings.optimiser == "adam" else torch.optim.AdamW
    return kind(groups, lr=rate, betas=(settings.momentum, 0.999))

"""Trains the steps one after the other through the pipeline's own functions."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeke.campaign.pieces import write_network, write_pieces
from edgeke.campaign.record import Record
from edgeke.campaign.steps import Costs, Step, full_epochs, make_steps, schedule
from edgeke.data.augment import Normalise
from edgeke.data.dataset import Dataset, Split, load_dataset
from edgeke.device.scores import calibrated_probabilities, vote
from edgeke.distill import distill
from edgeke.learning.alone import Trained
from edgeke.learning.build import student_architecture
from edgeke.learning.checkpoints import Preprocessing, load_checkpoint, save_checkpoint
from edgeke.learning.fit import OnEpoch
from edgeke.learning.images import predict
from edgeke.learning.orders import ORDERS
from edgeke.learning.parallel import local_device
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.cost import exit_costs
from edgeke.params import KD, Params, Plan
from edgeke.policy.votes import fit_votes
from edgeke.train_branchynet import exit_metrics, train_branchynet
from edgeke.train_teacher import train_teacher

__all__ = ["Networks", "measure", "run_steps"]

_SAFETY = 0.95  # share of the budget that is planned with: the machine may get slower
_SAVE_EVERY = 30.0  # seconds of training that a killed run loses at most, about
_PROBED = {"cuda": 100, "cpu": 8}  # batches of an epoch that is measured
_READ_AFTERWARDS = ("validation", "calibration", "test")


@dataclass(frozen=True)
class Networks:
    """What a step needs to be trained: parameters, data, and the networks of steps before."""

    params: Params
    dataset: Dataset
    fetch: Callable[[str], BranchyNet]
    checkpoint_every: int

    def plan(self, step: Step, epochs: int) -> Plan:
        """The recipe of the step's stage with its own epochs and seed."""
        recipes = self.params.profile.recipes
        recipe = {
            "teacher": recipes.train_teacher,
            "branch": recipes.distill,
            "branchynet": recipes.train_branchynet,
        }[step.kind]
        training = dataclasses.replace(self.params.training, checkpoint_every=self.checkpoint_every)
        recipe = dataclasses.replace(recipe, epochs=epochs)
        seed = self.params.seed + step.seed
        return Plan(seed, training, self.params.profile.augmentation, recipe)

    def kd(self, step: Step) -> KD:
        """The parameters' distillation with the step's distance and source."""
        named = {"distance": step.distance, "source": step.source}
        changes: dict[str, Any] = {key: value for key, value in named.items() if value is not None}
        return dataclasses.replace(self.params.kd, **changes)

    def student(self, step: Step) -> Architecture:
        """The multi-exit network the step trains, or trains one branch of."""
        network = self.params.profile.student
        if step.backbone is not None:
            network = dataclasses.replace(network, network=step.backbone)  # type: ignore[arg-type]
        return student_architecture(network, step.layout, self.dataset)

    def train(self, step: Step, epochs: int, on_epoch: OnEpoch) -> Trained:
        """Train one step."""
        plan, kd, profile = self.plan(step, epochs), self.kd(step), self.params.profile
        if step.kind == "teacher":
            return train_teacher(self.dataset, profile.teacher, plan, on_epoch=on_epoch)
        student, teacher = self.student(step), None
        if kd.distance != "none":
            teacher = self.fetch(step.teacher)
        exit = step.exit % len(student.exits)
        if step.kind == "branch":
            return distill(self.dataset, student, exit, teacher, kd, plan, on_epoch=on_epoch)
        order = ORDERS[step.order](student.depths)
        starts = zip(order.starts, step.starts, strict=True)
        return train_branchynet(
            self.dataset,
            student,
            order,
            {number: self.fetch(name) for number, name in starts},
            teacher,
            kd,
            self.weights(len(student.exits)),
            plan,
            on_epoch=on_epoch,
        )

    def weights(self, exits: int) -> tuple[float, ...]:
        """The parameters' weights; for the paper's layout of three exits the paper's."""
        own = self.params.branchynet.weights
        return own if len(own) == exits else (0.2, 0.2, 0.6)


def measure(params: Params, dataset: Dataset, names: Sequence[str]) -> Costs:
    """Seconds of an epoch and of a start of the named steps: two short epochs of each."""
    device, steps = local_device(), {step.name: step for step in make_steps(params, None)}
    epoch: dict[str, float] = {}
    start: dict[str, float] = {}
    teacher = params.profile.teacher
    largest = max(getattr(params.profile.recipes, r).batch_size for r in _recipe_names())
    total = len(dataset["train"].labels)
    batches = _PROBED[device.type]
    if any(steps[name].cost == "class_aware" for name in names):
        batches = max(1, batches // 4)  # seconds a batch on a CPU
    count = min(total, batches * largest)
    few = {
        name: Split(dataset[name].images[:n], dataset[name].labels[:n])
        for name, n in (
            ("train", count),
            ("validation", max(1, len(dataset["validation"].labels) * count // total)),
        )
    }
    probe = dataclasses.replace(dataset, splits=few, sha256=f"probe-{dataset.sha256}")
    shape = (dataset.image_shape[0], len(dataset.classes))
    untrained = {"teacher": BranchyNet(Architecture.single(teacher.network, teacher.width, *shape))}
    networks = Networks(params, probe, untrained.__getitem__, 2)
    joint = steps["branchynet"]
    untrained["main"] = BranchyNet(networks.student(joint)).branch(-1)
    for name in names:
        ends = [time.monotonic()]
        done = networks.train(steps[name], 2, lambda *_, ends=ends: ends.append(time.monotonic()))
        done.forget_checkpoints()
        first, second = ends[1] - ends[0], ends[2] - ends[1]
        epoch[steps[name].cost] = second * total / count
        start[steps[name].cost] = max(0.0, first - second)
    return Costs(epoch, start)


def run_steps(
    params: Params, record: Record, data: Path, folder: Path, minutes: float, cap: int | None
) -> None:
    """Run every step that fits into the budget and is not done; `data` is the dataset file."""
    dataset = load_dataset(data, ("train", "validation"))
    costs = _measured(params, dataset, record, ("teacher", "main", "branchynet"))
    every = max(1, round(_SAVE_EVERY / costs.epoch["teacher"]))

    def fetch(name: str) -> BranchyNet:
        return load_checkpoint(folder / "checkpoints" / name, torch.device("cpu"))[0]

    networks = Networks(params, dataset, fetch, every)
    record.write(minutes=minutes, device=_device(), torch=torch.__version__)
    steps = make_steps(params, cap)
    for step in steps:
        if step.name in record.steps:
            continue
        left = _SAFETY * 60 * minutes - record.used
        if step.cost not in costs.epoch and left > 0:
            costs = _measured(params, dataset, record, (step.name,))
            left = _SAFETY * 60 * minutes - record.used
        running = (record.content["running"] or {}).get("step") == step.name
        reason = _decide(step, steps, record, costs, left) if not running else None
        if reason:
            record.leave_out([step.name], reason)
            continue
        if step.name in record.content["left_out"]:
            left_out = {k: v for k, v in record.content["left_out"].items() if k != step.name}
            record.write(left_out=left_out)
        print(f"{step.name}: {record.planned[step.name]} epochs", flush=True)
        asked = {"epochs_asked": full_epochs(steps)[step.name]}
        record.finish(step.name, {**_run(step, networks, record, data, folder), **asked})


def _measured(params: Params, dataset: Dataset, record: Record, names: Sequence[str]) -> Costs:
    """All costs on record, after those of the named steps were measured where they are missing."""
    known = record.costs or Costs({}, {})
    steps = {step.name: step for step in make_steps(params, None)}
    missing = [name for name in names if steps[name].cost not in known.epoch]
    if missing:
        print(f"measuring the seconds of an epoch: {', '.join(missing)}", flush=True)
        found = measure(params, dataset, missing)
        known = Costs({**known.epoch, **found.epoch}, {**known.start, **found.start})
        record.write(measured={"seconds_per_epoch": known.epoch, "seconds_to_start": known.start})
    return known


def _decide(
    step: Step, steps: tuple[Step, ...], record: Record, costs: Costs, left: float
) -> str | None:
    """Fix the step's epochs, and those of its group; or the reason why it is not run."""
    todo = [s for s in steps if s.group == step.group and s.name not in record.steps]
    if step.cost not in costs.epoch:
        return "no time was left"
    if step.group == "headline" or step.name not in record.planned:
        # The headline is planned again before each of its steps; the rest as whole groups.
        done = {name: epochs for name, epochs in record.planned.items() if name in record.steps}
        found = schedule(todo, done, costs, left)
        record.plan(found if step.group != "headline" else {step.name: found[step.name]})
    if step.name not in record.planned:
        return f"does not fit into the {max(0.0, left):.0f} s that were left"
    missing = [name for name in step.needs if name not in record.steps]
    if missing:
        return f"needs {', '.join(missing)}"
    needed = costs.seconds(step, record.planned[step.name])
    if step.group != "headline" and needed > left:
        return f"takes about {needed:.0f} s; {max(0.0, left):.0f} s were left"
    return None


def _run(
    step: Step, networks: Networks, record: Record, data: Path, folder: Path
) -> dict[str, Any]:
    """Train one step, write its weights and logits, and describe it."""
    epochs, dataset = record.planned[step.name], networks.dataset
    spent, begun = record.begin(step.name), time.monotonic()

    def on_epoch(epoch: int, row: dict[str, float]) -> None:
        record.progress(epoch, row, spent + time.monotonic() - begun)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trained = networks.train(step, epochs, on_epoch)
    seconds = spent + time.monotonic() - begun
    network, preprocessing = trained.network, Preprocessing.of(dataset)
    metrics = trained.history[-1]
    if step.kind == "branchynet":
        metrics = exit_metrics(network, dataset)
    plan, kd = networks.plan(step, epochs), networks.kd(step)
    described: dict[str, Any] = {"plan": plan}
    if step.kind != "teacher":
        described["kd"] = kd
    if step.kind == "branchynet":
        weights = networks.weights(len(network.exits))
        described["branchynet"] = {
            "layout": step.layout, "order": step.order, "weights": weights
        }  # fmt: skip
    save_checkpoint(
        network,
        folder / "checkpoints" / step.name,
        preprocessing=preprocessing,
        params=described,
        metrics=metrics,
    )
    plain = {k: dataclasses.asdict(v) if k != "branchynet" else v for k, v in described.items()}
    more = {"params": plain, "metrics": metrics, "history": trained.rows()}
    write_network(
        network, folder / "weights" / step.name, preprocessing=preprocessing, described=more
    )
    answered = _answers(network, data, folder / "logits" / step.name)
    trained.forget_checkpoints()
    phases = step.phases
    return {
        **answered,
        "epochs_run": epochs,
        "phases": phases,
        "seconds": round(seconds, 3),
        "images_per_second": round(phases * epochs * len(dataset["train"].labels) / seconds, 1),
        "peak_memory_mib": _peak_memory(),
        "device": _device(),
        "torch": torch.__version__,
        "seed": plan.seed,
        **plain,
        "architecture": network.architecture.to_json(),
        "macs": [cost.macs for cost in exit_costs(network, dataset.image_shape[-1])],
    }


def _answers(network: BranchyNet, data: Path, stem: Path) -> dict[str, Any]:
    """Logits of every exit on all splits but train, written in pieces; the accuracies.

    The first and only time that test is read, behind training. The vote's weights come from
    validation. Calibration gives one number, by which the summary picks a point to compare once
    the policy is frozen.
    """
    read = load_dataset(data, _READ_AFTERWARDS)
    device = local_device()
    normalise = Normalise(read.mean, read.std, device)
    network.to(device)
    logits: dict[str, NDArray[np.float32]] = {}
    tensors: dict[str, Tensor] = {}
    for split in _READ_AFTERWARDS:
        found = predict(network, torch.from_numpy(read[split].images).to(device), normalise)
        logits[split] = found.float().cpu().numpy()
        tensors |= {
            f"{split}.{exit}.logits": torch.from_numpy(at) for exit, at in enumerate(logits[split])
        }
        tensors[f"{split}.labels"] = torch.from_numpy(read[split].labels)
    files = write_pieces(tensors, stem)
    exits = len(logits["test"])
    probabilities = {s: calibrated_probabilities(of, [1.0] * exits) for s, of in logits.items()}
    votes = fit_votes(probabilities["validation"], read["validation"].labels)
    result: dict[str, Any] = {"logits": files}
    for split in ("validation", "test"):
        labels = read[split].labels
        result[split] = {
            "exits": [float((at.argmax(-1) == labels).mean()) for at in logits[split]],
            "vote": float((vote(probabilities[split], votes).argmax(-1) == labels).mean()),
            "images": len(labels),
        }
    certified = logits["calibration"][-1].argmax(-1) == read["calibration"].labels
    return result | {"votes": votes, "calibration_accuracy": float(certified.mean())}


def _device() -> str:
    device = local_device()
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


def _peak_memory() -> int | None:
    """Of the accelerator, in MiB; None on a CPU."""
    return torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None


def _recipe_names() -> tuple[str, ...]:
    return ("train_teacher", "distill", "train_branchynet")

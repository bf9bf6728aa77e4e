"""Does distillation help when labels are few?  python -m benchmarks.distances

Students see 200 labelled digits; the teacher, trained on all 900, supervises them. Every distance
is tried at several betas and temperatures, over several seeds that also draw the 200 images; per
distance the setting with the best mean validation accuracy is chosen, and only that one is read on
test. Then the same for the orders, under KL, at an equal budget: the epochs of the branches that an
order starts from and of its phases add up to three trainings of one branch. Prints both tables and,
last, one JSON line with the mean test accuracy in percent per distance.
"""

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from tqdm import tqdm

from edgeke import params
from edgeke.data.dataset import Dataset, Split
from edgeke.data.sources import read_source
from edgeke.distill import distill
from edgeke.download import download
from edgeke.learning.build import student_architecture
from edgeke.learning.images import Images, predict
from edgeke.learning.orders import ORDERS
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet
from edgeke.params import KD, Network, Plan
from edgeke.train_branchynet import train_branchynet
from edgeke.train_teacher import train_teacher

DISTANCES = ("none", "kl", "js", "wasserstein", "wasserstein_classes", "dkd")
STUDENT = Network("resnet18", 8)
EPOCHS = 20


@dataclass(frozen=True)
class Job:
    """One training: a distance (and setting) alone, or an order under a distance."""

    name: str
    kd: KD
    order: str | None
    seed: int


@dataclass(frozen=True)
class Bench:
    """What every job needs; sent to each worker once."""

    dataset: Dataset
    plan: Plan
    teacher: BranchyNet
    images: int


_bench: Bench


def settings() -> Iterator[tuple[str, KD]]:
    """Every distance at the betas and temperatures that are tried."""
    yield "none", KD("none", 0.0, 4.0, "teacher", False)
    for name, beta, temperature in itertools.product(DISTANCES[1:], (0.5, 0.9), (2.0, 4.0)):
        yield name, KD(name, beta, temperature, "teacher", False)  # type: ignore[arg-type]


def few(dataset: Dataset, count: int, seed: int) -> Dataset:
    """The dataset with `count` training images, drawn stratified."""
    from sklearn.model_selection import train_test_split

    train = dataset["train"]
    kept, _ = train_test_split(
        np.arange(len(train.labels)), train_size=count, stratify=train.labels, random_state=seed
    )
    part = Split(train.images[kept], train.labels[kept])
    return replace(dataset, splits={**dataset.splits, "train": part})


def run(job: Job) -> tuple[Job, list[float], Architecture, bytes]:
    """Train; returns the validation accuracy of every exit, and the network as bytes.

    Tensors sent between processes would each hold a file open.
    """
    dataset = few(_bench.dataset, _bench.images, job.seed)
    plan = replace(_bench.plan, seed=job.seed)
    student = student_architecture(STUDENT, "edgeke", dataset)
    supervisor = None if job.kd.distance == "none" else _bench.teacher

    def alone(branch: int) -> BranchyNet:
        return distill(
            dataset, student, branch, supervisor, job.kd, plan, on_epoch=lambda *_: None
        ).network

    if job.order is None:
        network = alone(2)
    else:
        order = ORDERS[job.order](student.depths)
        left = (len(student.depths) - len(order.starts)) * plan.recipe.epochs
        phase = replace(
            plan.recipe, learning_rate=0.05, epochs=max(1, left // max(1, len(order.phases)))
        )
        network = train_branchynet(
            dataset,
            replace(student, shared=order.shared),
            order,
            {branch: alone(branch) for branch in order.starts},
            supervisor,
            job.kd,
            (0.2, 0.2, 0.6),
            [replace(plan, recipe=phase)] * len(order.phases),
            on_epoch=lambda *_: None,
        ).network
    return (
        job,
        accuracies(network, dataset, "validation"),
        network.architecture,
        save({name: tensor.contiguous() for name, tensor in network.state_dict().items()}),
    )


def accuracies(network: BranchyNet, dataset: Dataset, split: str) -> list[float]:
    """Accuracy of every exit on a split, in percent."""
    images = Images.of(dataset, torch.device("cpu"))
    answers = predict(network, torch.from_numpy(dataset[split].images), images.normalise)
    right = answers.argmax(-1) == torch.from_numpy(dataset[split].labels)
    return [100 * float(share) for share in right.double().mean(-1)]


def start_worker(bench: Bench) -> None:
    """Set up one worker process: one thread each, no progress bars, no checkpoints."""
    global _bench
    import edgeke.learning.fit as fit_module
    import edgeke.learning.resume as resume_module

    torch.set_num_threads(1)
    _bench = bench
    fit_module.tqdm = lambda **options: tqdm(**{**options, "disable": True})  # type: ignore[assignment]
    resume_module.ResumeFile.save = lambda *_: None  # type: ignore[method-assign]
    resume_module.ResumeFile.load = lambda *_: None  # type: ignore[method-assign]


def prepare(images: int, epochs: int) -> Bench:
    """The digits, the few-label plan, and a teacher trained on all training images."""
    loaded = params.parse({**_yaml(), "profile": "digits"})
    source = loaded.profile.data
    dataset, _, _ = download(read_source(source, Path()), source, "digits", loaded.seed)
    recipes = loaded.profile.recipes
    plan = replace(loaded, seed=0, training=replace(loaded.training, checkpoint_every=10**6)).plan(
        recipes.distill
    )
    teacher = train_teacher(
        dataset,
        loaded.profile.teacher,
        replace(plan, recipe=loaded.plan(recipes.train_teacher).recipe),
        on_epoch=lambda *_: None,
    )
    teacher.forget_checkpoints()
    few_plan = replace(plan, recipe=replace(plan.recipe, epochs=epochs, batch_size=25))
    return Bench(dataset, few_plan, teacher.network.eval(), images)


def _yaml() -> dict[str, Any]:
    import yaml

    content: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    return content


def table(bench: Bench, jobs: list[Job], pool: Any, title: str) -> dict[str, float]:
    """Train all jobs; per name choose the setting on validation and read it once on test."""
    results = list(tqdm(pool.imap_unordered(run, jobs), total=len(jobs), desc=title))
    by_setting: dict[tuple[str, KD], list[tuple[list[float], BranchyNet]]] = {}
    for job, validation, architecture, weights in results:
        network = BranchyNet(architecture).eval()
        network.load_state_dict(load(weights))
        by_setting.setdefault((job.name, job.kd), []).append((validation, network))
    print(f"\n{title}\n| | beta | T | validation | test, per exit: mean (std over seeds) |")
    print("| --- | --- | --- | --- | --- |")
    chosen: dict[str, float] = {}
    for name in dict.fromkeys(job.name for job in jobs):
        tried = {
            kd: float(np.mean([v[-1] for v, _ in found]))
            for (other, kd), found in by_setting.items()
            if other == name
        }
        kd = max(tried, key=lambda setting: tried[setting])
        test = np.array([accuracies(n, bench.dataset, "test") for _, n in by_setting[name, kd]])
        spread = ", ".join(
            f"{m:.1f} ({s:.1f})" for m, s in zip(test.mean(0), test.std(0), strict=True)
        )
        beta = "" if kd.distance == "none" else f"{kd.beta:g} | {kd.temperature:g}"
        print(f"| {name} | {beta or ' | '} | {tried[kd]:.1f} | {spread} |")
        chosen[name] = round(float(test.mean(0)[-1]), 2)
    return chosen


def main() -> None:
    """Print both tables, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    bench = prepare(options.images, options.epochs)
    seeds = range(options.seeds)
    by_distance = [Job(name, kd, None, seed) for name, kd in settings() for seed in seeds]
    under = KD("kl", 0.9, 4.0, "teacher", False)
    by_order = [Job(order, under, order, seed) for order in ORDERS for seed in seeds]
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, start_worker, (bench,)) as pool:
        distances = table(bench, by_distance, pool, "Distances, main network alone")
        table(bench, by_order, pool, "Orders under KL, beta 0.9")
    print(json.dumps(distances))


if __name__ == "__main__":
    main()

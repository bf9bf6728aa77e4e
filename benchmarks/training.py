"""How long a training step takes.  python -m benchmarks.training

One distillation step, ours against the published loop's: both train the same ResNet18 under the
same ResNet34 on the same 32x32 images with the same batch. The published loop is written afresh
from its description: PIL transforms in a DataLoader, a teacher forward that records a graph, two
student forwards, and SciPy's distance sample by sample (which is why it has no gradient). It loads
in the main process, where the published one has three workers; a third row leaves loading out.
Then a step of every order's phases. Steps are interleaved in one process; peak memory is that of a
fresh process for each.

`--neighbour` measures our step alone and beside a busy process of another session, with and without
OMP_WAIT_POLICY=PASSIVE. `--profile` prints where the time of our step goes. `--memory` trains on
20,000 images of 224x224, which the dataset file holds and memory need not. The last line is JSON.
"""

import argparse
import contextlib
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.stats import entropy
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from edgeke import params
from edgeke.data.augment import Augment, Normalise
from edgeke.data.dataset import Dataset, Split, load_dataset, save_dataset
from edgeke.learning.fit import fit
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy, make_objective
from edgeke.learning.orders import ORDERS
from edgeke.learning.phases import phase_network
from edgeke.learning.predict import evaluate
from edgeke.learning.resume import Stopped
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import single_exit, with_layout
from edgeke.params import KD, Augmentation, Plan, Recipe

CLASSES = 100
KL = KD("kl", 0.1, 4.0, "teacher", False)
Step = Callable[[], None]


def networks(width: int, device: torch.device) -> tuple[BranchyNet, BranchyNet]:
    """A fresh student and teacher."""
    torch.manual_seed(0)
    student = BranchyNet(single_exit(Backbone("resnet18", 3, CLASSES, 32, width)))
    teacher = BranchyNet(single_exit(Backbone("resnet34", 3, CLASSES, 32, width)))
    return student.to(device).train(), teacher.to(device)


class _Pictures(TorchDataset[tuple[Tensor, int]]):
    """Images as PIL, each transformed when it is read."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.5,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def published(
    images: np.ndarray,
    labels: np.ndarray,
    width: int,
    batch: int,
    device: torch.device,
    loading: bool = True,
) -> Step:
    """The loop as it was published: no gradient through the distance, twice the forwards.

    Without `loading` it repeats two batches that are loaded beforehand.
    """
    student, teacher = networks(width, device)
    optimiser = torch.optim.SGD(student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    loader = DataLoader(_Pictures(images, labels), batch, shuffle=True, drop_last=True)

    def forever() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches = forever() if loading else itertools.cycle(list(itertools.islice(loader, 2)))

    def step() -> None:
        inputs, targets = (tensor.to(device) for tensor in next(batches))
        answer, guide = student(inputs)[0], teacher(inputs)[0]
        soft = (student(inputs)[0] / KL.temperature).softmax(-1).detach().cpu().numpy()
        soft_teacher = (guide / KL.temperature).softmax(-1).detach().cpu().numpy()
        each = [entropy(t, s) for s, t in zip(soft, soft_teacher, strict=True)]
        distance = float(np.mean(each)) * KL.temperature**2
        loss = (1 - KL.beta) * F.cross_entropy(answer, targets) + KL.beta * distance
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def ours(
    images: np.ndarray, labels: np.ndarray, width: int, batch: int, device: torch.device
) -> Step:
    """The fit loop's step: batched augmentation, a frozen teacher, one graph, channels last."""
    student, teacher = networks(width, device)
    student.to(memory_format=torch.channels_last)
    teacher.to(memory_format=torch.channels_last)
    objective = make_objective(KL, teacher)
    optimiser = torch.optim.SGD(
        student.parameters(), 0.01, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    resident = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).to(device)
    targets = torch.from_numpy(labels).to(device)
    normalise = Normalise((0.5,) * 3, (0.5,) * 3, device)
    augment = Augment(Augmentation(4, True, 0, 0.0, 0.0, False, 1), CLASSES, normalise.mean)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        chosen = torch.randint(len(resident), (batch,), generator=generator).to(device)
        inputs, answers = augment(resident[chosen], targets[chosen], generator)
        outcome = objective(student, normalise(inputs), answers)
        optimiser.zero_grad()
        outcome["loss"].backward()
        optimiser.step()

    return step


def order_steps(width: int, batch: int, device: torch.device) -> dict[str, Step]:
    """One joint or phase step of every order on the paper's layout, forward and backward."""
    images = torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch,), device=device)
    _, teacher = networks(width, device)
    steps: dict[str, Step] = {}
    for name, order in ORDERS.items():
        built = with_layout("edgeke", Backbone("resnet18", 3, CLASSES, 32, width))
        for phase in order(built.depths).phases:
            network = BranchyNet(built).to(device).train().to(memory_format=torch.channels_last)
            objective = make_objective(KL, teacher)
            view = phase_network(network, phase).train()

            def step(view: torch.nn.Module = view, objective: object = objective) -> None:
                objective(view, images, labels)["loss"].backward()  # type: ignore[operator]

            steps[f"{name}: exits {', '.join(map(str, phase.exits))}"] = step
    return steps


def interleave(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every step by name, after two warm-up rounds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def peak_memory(step: Step, device: torch.device) -> float:
    """MiB that this process holds at most over three steps: of the GPU, or above its start."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_of_training(path: Path, steps: int, batch: int) -> dict[str, float]:
    """Train on a dataset file on the CPU; returns the peaks of this process's memory in MiB.

    Fine-tunes a tf_efficientnet_lite0, evaluates it on validation, and then reads and augments
    every training image once, as an epoch does. `RssAnon` is what the process has allocated,
    `RssFile` what it maps of files, the dataset among them: the system drops those pages where
    memory is short. Both are sampled every 10 ms. `VmHWM` is the kernel's peak of their sum.
    """
    peaks: dict[str, float] = {}
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.01):
            for line in Path("/proc/self/status").read_text().splitlines():
                name, value = line.split(":", 1)
                if name in ("RssAnon", "RssFile", "VmHWM"):
                    peaks[name] = max(peaks.get(name, 0), int(value.split()[0]) / 1024)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    labels, count = CrossEntropy(), itertools.count()

    def objective(*inputs: object) -> dict[str, Tensor]:
        if next(count) == steps:
            raise Stopped
        return labels(*inputs)

    dataset, loaded = load_dataset(path, ("train", "validation")), params.load(Path("params.yaml"))
    recipe = Recipe(epochs=steps, batch_size=batch, learning_rate=0.01, warmup=0.0)
    plan = Plan(0, loaded.training, loaded.augmentation, loaded.optimisation, recipe)
    images = Images.of(dataset, torch.device("cpu"))
    torch.manual_seed(0)
    backbone = Backbone("timm/tf_efficientnet_lite0", 3, CLASSES, dataset.image_shape[1])
    network = BranchyNet(single_exit(backbone))
    with contextlib.suppress(Stopped):
        fit(network, objective, images, plan, description="training", on_epoch=lambda *_: None)
    evaluate(network, images)
    augment = Augment(plan.augmentation, CLASSES, images.normalise.mean)
    generator = torch.Generator().manual_seed(0)
    for chosen in torch.randperm(len(images.train), generator=generator).split(batch):
        inputs, _ = augment(images.train[chosen], images.train_labels[chosen], generator)
        images.normalise(inputs)
    ended.set()
    sampler.join()
    return peaks


def write_noise(folder: Path, sizes: dict[str, int], side: int) -> None:
    """Dataset files of so many random images, by name; the last 200 are for validation."""
    shape = (max(sizes.values()), 3, side, side)
    random = np.random.default_rng(0)
    noise = np.memmap(folder / "noise", np.uint8, "w+", shape=shape)
    for start in range(0, len(noise), 100):
        size = noise[start : start + 100].shape
        noise[start : start + 100] = random.integers(0, 256, size, dtype=np.uint8)
    labels = random.integers(0, CLASSES, len(noise))
    names = tuple(map(str, range(CLASSES)))
    for name, count in sizes.items():
        half, end = (0.5,) * 3, count - 200
        train = Split(noise[:end], labels[:end])
        validation = Split(noise[end:count], labels[end:count])
        splits = {"train": train, "validation": validation}
        dataset = Dataset("noise", names, shape[1:], half, half, "noise", 0, "", splits)
        save_dataset(dataset, folder / name)


def memory(count: int, side: int, again: list[str]) -> None:
    """Print the memory of training on `count` images, and on 264: what the network itself takes."""
    needed = 2 * count * 3 * side**2 + 2**30
    with tempfile.TemporaryDirectory(prefix="edgeke-") as folder:
        free = shutil.disk_usage(folder).free
        if free < needed:
            sys.exit(
                f"error: {folder} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} are "
                "needed for the images; free some, or point TMPDIR to another disk"
            )
        sizes = {"network alone": 264, f"{count} images": count}
        write_noise(Path(folder), sizes, side)
        peaks = {
            name: json.loads(
                subprocess.check_output([*again, "--train-on", f"{folder}/{name}"], text=True)
            )
            for name in sizes
        }
    print("| trained on | allocated, MiB | mapped from files, MiB | both, the kernel's peak, MiB |")
    print("| --- | --- | --- | --- |")
    for name, own in peaks.items():
        print(f"| {name} | {own['RssAnon']:.0f} | {own['RssFile']:.0f} | {own['VmHWM']:.0f} |")
    alone, trained = peaks.values()
    result = {
        "above_network_mib": round(trained["RssAnon"] - alone["RssAnon"]),
        "above_network_with_mapped_mib": round(trained["VmHWM"] - alone["VmHWM"]),
        "images_mib": round(count * 3 * side**2 / 2**20),
        "peaks_mib": {n: {k: round(mib) for k, mib in own.items()} for n, own in peaks.items()},
    }
    print(json.dumps(result))


def profile(step: Step, rounds: int) -> None:
    """Print the share of the CPU time of our step that each kind of operation takes."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    step()
    with torch.profiler.profile(activities=activities) as profiled:
        for _ in range(rounds):
            step()
    rows = sorted(profiled.key_averages(), key=lambda row: -row.self_cpu_time_total)
    total = sum(row.self_cpu_time_total for row in rows)
    print("| operation | share of CPU time | calls per step |\n| --- | --- | --- |")
    for row in rows[:12]:
        share = 100 * row.self_cpu_time_total / total
        print(f"| {row.key} | {share:.1f} % | {row.count / rounds:.0f} |")


def serve(step: Step) -> None:
    """Do a step for each line on the standard input and print its seconds."""
    for _ in sys.stdin:
        started = time.perf_counter()
        step()
        print(time.perf_counter() - started, flush=True)


def beside_a_neighbour(command: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds per step, waiting threads spinning or sleeping, alone and beside a busy process.

    The neighbour has a session of its own, as a process of another terminal has: Linux shares the
    CPUs between sessions first (`sched_autogroup_enabled`).
    """
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    policies = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "PASSIVE"}}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = {
        name: subprocess.Popen(command, env=environment | policy, **pipes)
        for name, policy in policies.items()
    }

    def seconds(worker: subprocess.Popen) -> float:
        worker.stdin.write("step\n")
        worker.stdin.flush()
        return float(worker.stdout.readline())

    times: dict[str, list[float]] = {}
    for place in ("alone", "beside a neighbour"):
        busy = None
        if place != "alone":
            endless = [sys.executable, "-c", "while True: pass"]
            busy = subprocess.Popen(endless, start_new_session=True)
        for number in range(rounds + 2):
            for name, worker in workers.items():
                value = seconds(worker)
                if number >= 2:
                    times.setdefault(f"{name}, {place}", []).append(value)
        if busy:
            busy.kill()
            busy.wait()
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    return times


def main() -> None:
    """Print the tables, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--neighbour", action="store_true", help="beside a busy process")
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes")
    parser.add_argument("--memory", action="store_true", help="of training on large images")
    parser.add_argument("--images", type=int, default=20_000, help="of --memory")
    parser.add_argument("--side", type=int, default=224, help="of --memory")
    parser.add_argument("--peak", choices=["ours", "published loop"], help=argparse.SUPPRESS)
    parser.add_argument("--train-on", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_on:
        print(json.dumps(memory_of_training(options.train_on, steps=24, batch=32)))
        return
    if options.memory:
        memory(options.images, options.side, [sys.executable, "-m", "benchmarks.training"])
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8)
    labels = random.integers(0, CLASSES, 2048)
    shared = (images, labels, options.width, options.batch, device)
    makers = {"ours": ours, "published loop": published}
    again = [sys.executable, "-m", "benchmarks.training", "--width", str(options.width)]
    again += ["--batch", str(options.batch)]
    if options.serve:
        serve(ours(*shared))
    elif options.peak:
        print(peak_memory(makers[options.peak](*shared), device))
    elif options.profile:
        profile(ours(*shared), options.rounds)
    elif options.neighbour:
        times = beside_a_neighbour([*again, "--serve"], options.rounds)
        print("| waiting threads | s per step, least | median |\n| --- | --- | --- |")
        for name, values in times.items():
            print(f"| {name} | {min(values):.2f} | {np.median(values):.2f} |")
        medians = {name: round(float(np.median(values)), 3) for name, values in times.items()}
        print(json.dumps({"median_s": medians, "width": options.width, "batch": options.batch}))
    else:
        peaks = {
            name: float(subprocess.check_output([*again, "--peak", name], text=True))
            for name in makers
        }
        steps = {name: make(*shared) for name, make in makers.items()}
        steps["published loop, without loading"] = published(*shared, loading=False)
        times = interleave(steps, options.rounds, device)
        by_order = interleave(
            order_steps(options.width, options.batch, device), options.rounds, device
        )
        report(times, by_order, peaks, options.batch)
        ratios = np.array(times["published loop"]) / np.array(times["ours"])
        result = {
            "kd_step_speedup": round(float(np.median(ratios)), 3),
            "kd_step_speedup_of_minima": round(
                min(times["published loop"]) / min(times["ours"]), 3
            ),
            "peak_memory_mib": {name: round(mib) for name, mib in peaks.items()},
            "device": device.type,
            "width": options.width,
            "batch": options.batch,
        }
        print(json.dumps(result))


def report(
    times: dict[str, list[float]],
    by_order: dict[str, list[float]],
    memory: dict[str, float],
    batch: int,
) -> None:
    """Print the two tables."""
    print("| KD step | images/s, best | images/s, median | peak memory MiB |")
    print("| --- | --- | --- | --- |")
    for name, values in times.items():
        rate, mib = batch / np.array(values), memory.get(name)
        peak = "" if mib is None else f"{mib:.0f}"
        print(f"| {name} | {rate.max():.0f} | {np.median(rate):.0f} | {peak} |")
    print("\n| order and phase | ms per step, best | median | minutes per epoch of 45,000 images |")
    print("| --- | --- | --- | --- |")
    for name, values in by_order.items():
        best, median = min(values), float(np.median(values))
        minutes = median * 45_000 / batch / 60
        print(f"| {name} | {1e3 * best:.0f} | {1e3 * median:.0f} | {minutes:.1f} |")


if __name__ == "__main__":
    main()

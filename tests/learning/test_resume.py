"""A training that is killed goes on to the weights it would have had."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from toys import ROOT, with_recipe

from edgeke.learning.alone import train_alone
from edgeke.learning.fit import make_optimiser
from edgeke.learning.images import Images
from edgeke.learning.objectives import CrossEntropy
from edgeke.learning.resume import (
    Progress,
    ResumeFile,
    fingerprint,
    load_optimiser,
    optimiser_tensors,
)
from edgeke.networks.architecture import Architecture


def test_another_parameter_is_another_file(plan):
    one = ResumeFile("distill/0", plan=plan)
    assert one.path != ResumeFile("distill/0", plan=with_recipe(plan, learning_rate=0.04)).path
    assert one.path != ResumeFile("distill/1", plan=plan).path
    assert one.path == ResumeFile("distill/0", plan=with_recipe(plan)).path


def test_round_trip_and_damage(plan):
    file = ResumeFile("x", plan=plan)
    assert file.load() is None
    progress = Progress(3, 7, [{"train/loss": 1 / 3}])
    file.save(progress, {"a": torch.tensor([1.5])})
    read, tensors = file.load()
    assert read == progress
    assert torch.equal(tensors["a"], torch.tensor([1.5]))
    file.path.write_bytes(file.path.read_bytes()[:-3])
    assert file.load() is None
    file.remove()
    file.remove()
    assert not file.path.exists()


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_the_optimisers_state_survives(network, plan, kind):
    plan = with_recipe(plan, optimiser=kind)
    images = torch.randn(4, 1, 8, 8)

    def step(optimiser):
        optimiser.zero_grad()
        network(images).square().sum().backward()
        optimiser.step()

    first = make_optimiser(network, plan)
    step(first)
    saved, weights = (
        optimiser_tensors(first),
        {k: v.clone() for k, v in network.state_dict().items()},
    )
    saved = {name: tensor.clone() for name, tensor in saved.items()}
    step(first)
    expected = fingerprint(network)
    network.load_state_dict(weights)
    second = make_optimiser(network, plan)
    load_optimiser(second, saved)
    step(second)
    assert fingerprint(network) == expected


class _KilledError(Exception):
    pass


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9, "optimiser": "adamw"}], ids=str)
def test_a_training_stopped_between_epochs_goes_on_alike(dataset, plan, changes):
    plan = with_recipe(plan, epochs=4, **changes)

    def train(slot: str, die_at: int | None = None):
        def on_epoch(epoch: int, row: dict[str, float]) -> None:
            if epoch == die_at:
                raise _KilledError

        return train_alone(
            Architecture.single("resnet10", 4, 1, 3),
            CrossEntropy(),
            Images.of(dataset, torch.device("cpu")),
            plan,
            description="toy",
            on_epoch=on_epoch,
            resume=ResumeFile(slot, plan=plan),
        )

    whole = train("whole")
    with pytest.raises(_KilledError):
        train("parts", die_at=3)  # the state of epoch 2 is on the disk
    assert ResumeFile("parts", plan=plan).load()[0].epoch == 2
    parts = train("parts")
    assert parts.history == whole.history
    assert fingerprint(parts.network) == fingerprint(whole.network)
    parts.forget_checkpoints()
    assert ResumeFile("parts", plan=plan).load() is None


@pytest.fixture
def workplace(dataset_file: Path) -> Path:
    """The toy dataset, and a teacher stage that takes some seconds."""
    root = dataset_file.parents[1]
    content = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"profile": "tiny"}
    content["tracking"]["enabled"] = False
    content["training"]["checkpoint_every"] = 1
    tiny = content["profiles"]["tiny"]
    tiny["teacher"] = {"network": "resnet18", "width": 8}
    tiny["recipes"]["batch_size"] = 16
    tiny["recipes"]["train_teacher"]["epochs"] = 40
    content["optimisation"]["ema"] = 0.9
    content["augmentation"] |= {"mixup": 0.2, "cutout": 3}
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    return root


def start(root: Path) -> subprocess.Popen:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "stages.train_teacher"],
        cwd=root,
        env={**inherited, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_checkpoint(root: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not list(root.glob(".edgeke/checkpoints/*.safetensors")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(root: Path) -> dict[str, torch.Tensor]:
    process = start(root)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert list(root.glob(".edgeke/checkpoints/*")) == []
    return load_file(root / "models" / "teacher.safetensors")


def test_a_killed_stage_goes_on_to_bit_identical_weights(workplace: Path):
    whole = finish(workplace)
    history = (workplace / "results" / "train_teacher" / "history.csv").read_text()
    (workplace / "models" / "teacher.safetensors").unlink()

    killed = start(workplace)
    wait_for_checkpoint(workplace, killed)
    time.sleep(random.uniform(0, 1))  # at a random moment
    killed.kill()
    killed.communicate()
    assert not (workplace / "models" / "teacher.safetensors").exists()

    stopped = start(workplace)
    time.sleep(4 + random.uniform(0, 1))
    stopped.send_signal(signal.SIGTERM)
    _, errors = stopped.communicate()
    # 0 where the signal came after the last step.
    assert stopped.returncode in (0, 130), errors
    assert "Traceback" not in errors

    again = finish(workplace)
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in whole)
    assert (workplace / "results" / "train_teacher" / "history.csv").read_text() == history

"""Folders in which training stages run as processes of their own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml
from toys import ROOT

INHERITED = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}


def write_params(root: Path, *, epochs: int, tracking: bool = False, seed: int = 0) -> None:
    """Profile `tiny` with smaller networks, fewer or more epochs, and a checkpoint after each."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content |= {"profile": "tiny", "seed": seed}
    content["tracking"]["enabled"] = tracking
    content["training"]["checkpoint_every"] = 1
    profile = content["profiles"]["tiny"]
    profile["teacher"] = profile["student"] = {"network": "resnet10", "width": 4}
    recipes = profile["recipes"]
    recipes["batch_size"] = 16
    for stage in ("train_teacher", "distill", "train_branchynet"):
        recipes[stage]["epochs"] = epochs
    (root / "params.yaml").write_text(yaml.safe_dump(content))


def start(root: Path, *command: str, processes: int = 1, **environment: str) -> subprocess.Popen:
    """Start `python COMMAND` in `root`, under torchrun where there are several processes."""
    front = [sys.executable]
    if processes > 1:
        front += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    path = f"{ROOT}:{ROOT / 'tests'}"
    return subprocess.Popen(
        [*front, *command],
        cwd=root,
        env={**INHERITED, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Wait for a process and return its output."""
    output, _ = process.communicate(timeout=180)
    assert process.returncode == status, output[-3000:]
    return output


def wait_until(condition: Callable[[], object], process: subprocess.Popen) -> None:
    """Wait while the process runs and the condition does not hold."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)

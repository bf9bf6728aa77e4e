"""Two processes on the CPU against one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from toys import ROOT

from edgeke.errors import InputError
from edgeke.learning.parallel import current_parallel

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}

# Every step's gradient and loss, with batch norm in evaluation mode.
PROBE = """
import json, sys
import torch
from torch.nn import functional as F
from toys import make_split, randomise
from edgeke.learning.parallel import current_parallel
from edgeke.networks.architecture import Architecture
from edgeke.networks.branchynet import BranchyNet

torch.manual_seed(0)
network = randomise(BranchyNet(Architecture.with_layout("edgeke", "resnet10", 4, 1, 3)))
parallel = current_parallel(12)
answering = parallel.wrap(network).eval()
split = make_split(12, 0)
images = parallel.share(torch.from_numpy(split.images).float() / 255)
labels = parallel.share(torch.from_numpy(split.labels))
loss = sum(F.cross_entropy(at_exit, labels) for at_exit in answering(images))
loss.backward()
gradients = [float(p.grad.double().square().sum()) for p in network.parameters()]
first = [float(p.grad.flatten()[0]) for p in network.parameters()]
if int(__import__("os").environ.get("RANK", "0")) == 0:
    loss = parallel.mean(loss.detach())
    open(sys.argv[1], "w").write(json.dumps([float(loss), gradients, first]))
else:
    parallel.mean(loss.detach())
"""


def launch(*command: str, cwd: Path, processes: int = 2, **options: object) -> subprocess.Popen:
    front = [sys.executable]
    if processes > 1:
        front += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.Popen(
        [*front, *command],
        cwd=cwd,
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output[-3000:]
    return output


def test_losses_and_gradients_equal_those_of_one_process(tmp_path: Path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        finish(launch(str(probe), str(out), cwd=tmp_path, processes=processes))
        results.append(json.loads(out.read_text()))
    (loss, gradients, first), (loss2, gradients2, first2) = results
    assert loss2 == pytest.approx(loss, rel=1e-4)
    assert gradients2 == pytest.approx(gradients, rel=1e-4, abs=1e-10)
    assert first2 == pytest.approx(first, rel=1e-4, abs=1e-6)


@pytest.fixture
def workplace(dataset_file: Path) -> Path:
    root = dataset_file.parents[1]
    content = yaml.safe_load((ROOT / "params.yaml").read_text()) | {"profile": "tiny"}
    content["training"]["checkpoint_every"] = 1
    tiny = content["profiles"]["tiny"]
    tiny["teacher"] = {"network": "resnet10", "width": 4}
    tiny["recipes"]["batch_size"] = 16
    tiny["recipes"]["train_teacher"]["epochs"] = 30
    (root / "params.yaml").write_text(yaml.safe_dump(content))
    return root


def test_a_killed_worker_ends_the_job_and_the_job_resumes(workplace: Path):
    job = launch("-m", "stages.train_teacher", cwd=workplace, start_new_session=True)
    deadline = time.monotonic() + 90
    while not list(workplace.glob(".edgeke/checkpoints/*.safetensors")):
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    listed = subprocess.check_output(["ps", "-o", "pid,args", "--ppid", str(job.pid)], text=True)
    workers = [int(x.split()[0]) for x in listed.splitlines() if "stages.train_teacher" in x]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "Signal 9" in output
    assert not (workplace / "models" / "teacher.safetensors").exists()

    finish(launch("-m", "stages.train_teacher", cwd=workplace))
    history = (workplace / "results" / "train_teacher" / "history.csv").read_text()
    assert len(history.splitlines()) == 31
    assert load_file(workplace / "models" / "teacher.safetensors")
    assert list(workplace.glob(".edgeke/checkpoints/*")) == []
    assert not list(workplace.glob("**/.*.tmp"))


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size = 16 cannot be shared evenly by 3 processes"):
        current_parallel(16)

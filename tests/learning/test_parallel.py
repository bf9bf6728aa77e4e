"""Two processes on the CPU against one."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from workplaces import finish, start, wait_until, write_params

from edgeke.errors import InputError
from edgeke.learning import parallel

# One step's gradient and loss, with batch norm in evaluation mode.
PROBE = """
import json, sys
from pathlib import Path
import torch
from torch.nn import functional as F
from toys import make_split, randomise
from edgeke.learning import parallel
from edgeke.networks.architecture import Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import with_layout

torch.manual_seed(0)
network = randomise(BranchyNet(with_layout("edgeke", Backbone("resnet10", 1, 3, 8, 4))))
parallel.start(12)
together = parallel.wrap(network).eval()
split = make_split(12, 0)
images = parallel.share(torch.from_numpy(split.images).float() / 255)
labels = parallel.share(torch.from_numpy(split.labels))
loss = sum(F.cross_entropy(at_exit, labels) for at_exit in together(images))
loss.backward()
gradients = [float(p.grad.double().square().sum()) for p in network.parameters()]
first = [float(p.grad.flatten()[0]) for p in network.parameters()]
loss = float(parallel.mean(loss.detach()))
if parallel.first_process():
    Path(sys.argv[1]).write_text(json.dumps([loss, gradients, first]))
"""


def test_losses_and_gradients_equal_those_of_one_process(tmp_path: Path):
    probe = tmp_path / "probe.py"
    probe.write_text(PROBE)
    results = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.json"
        finish(start(tmp_path, str(probe), str(out), processes=processes))
        results.append(json.loads(out.read_text()))
    (loss, gradients, first), (loss2, gradients2, first2) = results
    assert loss2 == pytest.approx(loss, rel=1e-4)
    assert gradients2 == pytest.approx(gradients, rel=1e-4, abs=1e-10)
    assert first2 == pytest.approx(first, rel=1e-4, abs=1e-6)


# Machines without a shared disk: every process has a folder of its own.
APART = """
import os, runpy
os.chdir(f"machine_{os.environ['RANK']}")
runpy.run_module("stages.train_teacher", run_name="__main__")
"""


@pytest.fixture
def machines(dataset_file: Path) -> Path:
    root = dataset_file.parents[1]
    (root / "apart.py").write_text(APART)
    for number in range(2):
        machine = root / f"machine_{number}"
        (machine / "data").mkdir(parents=True)
        (machine / "data" / dataset_file.name).symlink_to(dataset_file)
        write_params(machine, epochs=12)
    return root


def test_a_killed_worker_ends_the_job_and_the_job_goes_on(machines: Path):
    """The second machine has no checkpoint, and takes the first one's."""
    job = start(machines, "apart.py", processes=2)
    wait_until(lambda: list(machines.glob("machine_0/.edgeke/checkpoints/*.safetensors")), job)
    listed = subprocess.check_output(["ps", "-o", "pid,args", "--ppid", str(job.pid)], text=True)
    workers = [int(line.split()[0]) for line in listed.splitlines() if "apart.py" in line]
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "Signal 9" in output
    assert not list(machines.glob("*/models/teacher.safetensors"))

    finish(start(machines, "apart.py", processes=2))
    history = (machines / "machine_0/results/train_teacher/history.csv").read_text()
    assert len(history.splitlines()) == 13
    assert load_file(machines / "machine_0/models/teacher.safetensors")
    assert not list(machines.glob("machine_1/models/*"))
    assert not list(machines.glob("*/.edgeke/checkpoints/*"))
    assert not list(machines.glob("**/.*.tmp"))


def test_machines_that_would_train_something_else_are_refused(machines: Path):
    write_params(machines / "machine_1", epochs=12, seed=1)
    output, _ = start(machines, "apart.py", processes=2).communicate(timeout=120)
    assert "error: process 1 has other parameters, code, data or models for train_teacher" in output
    assert not list(machines.glob("*/models/*"))


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(InputError, match="batch_size = 16 cannot be shared evenly by 3 processes"):
        parallel.start(16)

"""Fixtures: a toy dataset, a short recipe, the paper's layout on the smallest backbone."""

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pipelines import STAGES, clone_tree, ran, run
from toys import CLASSES, ROOT, SIZE, make_split, randomise, replace

from edgeke.data.dataset import Dataset, channel_statistics, save_dataset
from edgeke.networks.architecture import Architecture, Backbone
from edgeke.networks.branchynet import BranchyNet
from edgeke.networks.layouts import with_layout
from edgeke.params import Plan, Recipe, load


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    splits = {
        name: make_split(count, seed)
        for seed, (name, count) in enumerate(
            {"train": 96, "validation": 60, "calibration": 90, "test": 45}.items()
        )
    }
    mean, std = channel_statistics(splits["train"].images)
    return Dataset("toy", CLASSES, (1, SIZE, SIZE), mean, std, "toy", 0, "", splits)


@pytest.fixture
def dataset_file(dataset: Dataset, tmp_path: Path) -> Path:
    path = tmp_path / "data" / "dataset.safetensors"
    save_dataset(dataset, path)
    return path


@pytest.fixture(scope="session")
def plan() -> Plan:
    """Two short epochs; what is not said here is params.yaml's."""
    loaded = load(ROOT / "params.yaml")
    training = replace(loaded.training, checkpoint_every=1)
    augmentation = replace(loaded.augmentation, copies=2)
    return Plan(0, training, augmentation, loaded.optimisation, Recipe(2, 0.05, 16, 0.3))


@pytest.fixture(autouse=True)
def _own_files_go_to_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeke.files.SCRATCH", tmp_path / ".edgeke")
    monkeypatch.setattr("edgeke.learning.resume.FOLDER", tmp_path / "checkpoints")


@pytest.fixture(scope="session")
def architecture() -> Architecture:
    """The paper's layout on the smallest backbone."""
    return with_layout("edgeke", Backbone("resnet10", 1, len(CLASSES), SIZE, 4))


@pytest.fixture
def network(architecture: Architecture) -> BranchyNet:
    """Random weights and batch-norm statistics, in evaluation mode."""
    return randomise(BranchyNet(architecture))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's SQLite file, tables and nothing in them, to copy: making one takes seconds."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session")
def store(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's root with a store, shared by tests that name experiments of their own."""
    root = tmp_path_factory.mktemp("repository")
    (root / "mlflow").mkdir()
    shutil.copy(empty_store, root / "mlflow")
    return root


@pytest.fixture
def here(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own working folder (as DVC gives queued runs) on the shared store."""
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME", "DVC_STAGE", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DVC_ROOT", str(store))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone that has run profile `tiny` once, as experiment `first`. Work in copies of it."""
    root = clone_tree(tmp_path_factory.mktemp("tiny") / "edgeke")
    output = run(root, "dvc", "exp", "run", "--name", "first", "-S", "profile=tiny")
    assert ran(output) == STAGES
    return root


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an ssh server that this user's new key may enter, and that greets.

    The home there is a temporary folder with an interpreter `~/a venv/python`.
    """
    sshd = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin")
    if sshd is None or os.geteuid() != 0:
        pytest.skip("needs sshd (Debian: openssh-server) and root")
    home = tmp_path / "ssh"
    home.mkdir(mode=0o700)
    for name in ("host", "user"):
        key = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(key, check=True)
    shutil.copy(home / "user.pub", home / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    Path("/run/sshd").mkdir(exist_ok=True)
    config = home / "sshd_config"
    config.write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nPidFile none\n"
        f"AuthorizedKeysFile {home}/authorized_keys\nPasswordAuthentication no\n"
        "StrictModes no\nUsePAM no\n"
        f"SetEnv HOME={home}\n"
    )
    (home / ".bashrc").write_text("echo Welcome to this board\n")
    (home / "a venv").mkdir()
    (home / "a venv" / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (home / "a venv" / "python").chmod(0o755)
    client = home / "client"
    client.write_text(
        f"#!/bin/sh\nexec {shutil.which('ssh')} -F none -i {home}/user -o IdentitiesOnly=yes "
        f'-o StrictHostKeyChecking=no -o UserKnownHostsFile={home}/known "$@"\n'
    )
    client.chmod(0o755)
    (home / "bin").mkdir()
    (home / "bin" / "ssh").symlink_to(client)
    monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
    process = subprocess.Popen(
        [sshd, "-D", "-e", "-f", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.05)
    yield f"ssh://{getpass.getuser()}@127.0.0.1:{port}"
    process.terminate()
    process.wait()

"""Sharing, for real: what one clone built, another gets through git and a DVC remote."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
import yaml
from pipelines import STAGES, children, metrics, parents, ran, run

pytestmark = [
    pytest.mark.xdist_group("pipeline"),
    pytest.mark.pipeline,
    pytest.mark.filterwarnings("ignore:::mlflow"),
]

BUILT = ("data/dataset.safetensors", "models/teacher.safetensors", "models/edgeke.onnx")


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[str]:
    """An S3's address."""
    with servers.s3(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture
def mine(tiny: Path, tmp_path: Path) -> Path:
    """A clone that has committed a finished `tiny`; its `origin` is a bare repository."""
    root = Path(shutil.copytree(tiny, tmp_path / "mine", symlinks=True))
    run(root, "git", "add", "-A")
    run(root, "git", "commit", "--quiet", "-m", "tiny")
    run(root, "git", "clone", "--quiet", "--bare", str(root), str(tmp_path / "team.git"))
    run(root, "git", "remote", "set-url", "origin", str(tmp_path / "team.git"))
    return root


def commit_remote(root: Path) -> None:
    """Commit and publish the remote that was just added."""
    run(root, "git", "commit", "--quiet", "--all", "-m", "a DVC remote")
    run(root, "git", "push", "--quiet", "origin", "HEAD")


def fresh_clone(mine: Path) -> Path:
    """What a colleague has after `git clone`: no data, no models."""
    theirs = mine.parent / "theirs"
    run(mine, "git", "clone", "--quiet", str(mine.parent / "team.git"), str(theirs))
    assert not any((theirs / name).exists() for name in BUILT)
    return theirs


def check_nothing_is_trained(mine: Path, theirs: Path, **environment: str) -> None:
    output = run(theirs, "dvc", "repro", **environment)
    assert ran(output) == []
    assert "up to date" in output
    assert run(theirs, "git", "status", "--porcelain", "--", "dvc.lock", "results") == ""
    for name in BUILT:
        assert (theirs / name).read_bytes() == (mine / name).read_bytes()


def test_a_folder_brings_everything_to_a_fresh_clone(mine, tmp_path):
    run(mine, "dvc", "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    commit_remote(mine)
    run(mine, "dvc", "push")
    theirs = fresh_clone(mine)
    run(theirs, "dvc", "pull")
    check_nothing_is_trained(mine, theirs)
    assert run(theirs, "scripts/lock-check") == ""
    # And MLflow: a store of their own shows the same runs.
    run(theirs, "python", "-m", "edgeke.tracking")
    (own,), (theirs_too,) = parents(mine), parents(theirs)
    assert theirs_too.data.metrics == own.data.metrics
    assert theirs_too.data.params == own.data.params
    assert theirs_too.data.tags["edgeke.model"] == own.data.tags["edgeke.model"]
    assert set(children(theirs, theirs_too.info.run_id)) == set(STAGES)


def test_a_store_that_speaks_s3_brings_everything_to_a_fresh_clone(mine, s3):
    run(mine, "dvc", "remote", "add", "--default", "storage", f"s3://{servers.BUCKET}/dvc")
    run(mine, "dvc", "remote", "modify", "storage", "endpointurl", s3)
    commit_remote(mine)
    run(mine, "dvc", "push", **servers.KEYS)
    assert [name for name in servers.object_names(s3) if name.startswith("dvc/files/md5/")]
    theirs = fresh_clone(mine)
    # Keys may also stand in .dvc/config.local, which git ignores.
    for option, key in (
        ("access_key_id", "ACCESS_KEY_ID"),
        ("secret_access_key", "SECRET_ACCESS_KEY"),
    ):
        value = servers.KEYS[f"AWS_{key}"]
        run(theirs, "dvc", "remote", "modify", "--local", "storage", option, value)
    run(theirs, "dvc", "pull")
    check_nothing_is_trained(mine, theirs)
    assert servers.KEYS["AWS_SECRET_ACCESS_KEY"] not in run(theirs, "git", "diff", "HEAD")


@pytest.mark.slow
def test_an_experiment_travels_through_git_and_the_remote(mine, tmp_path):
    run(mine, "dvc", "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    commit_remote(mine)
    run(mine, "dvc", "push")
    output = run(mine, "dvc", "exp", "run", "--name", "bolder", "-S", "calibrate.delta=0.2")
    assert ran(output) == ["calibrate", "evaluate"]
    run(mine, "dvc", "exp", "push", "origin", "bolder")

    theirs = fresh_clone(mine)
    assert "bolder" in run(theirs, "dvc", "exp", "list", "origin")
    run(theirs, "dvc", "exp", "pull", "origin", "bolder")
    run(theirs, "dvc", "exp", "apply", "bolder")
    assert yaml.safe_load((theirs / "params.yaml").read_text())["calibrate"]["delta"] == 0.2
    assert metrics(theirs, "evaluate") == metrics(mine, "evaluate")
    output = run(theirs, "dvc", "repro")
    assert ran(output) == []
    assert (theirs / "models/edgeke.onnx").read_bytes() == (
        mine / "models/edgeke.onnx"
    ).read_bytes()

"""The run of a stage while it works."""

import os
import platform
import signal
import subprocess
import sys
import time
from types import ModuleType

import pytest
from servers import fork
from toys import ROOT, replace

from edgeke.errors import InputError
from edgeke.files import read_json
from edgeke.tracking import state
from edgeke.tracking import store as stores
from edgeke.tracking.__main__ import main
from edgeke.tracking.runs import stage_run

from .conftest import ROWS, check_curves, run_pipeline, run_stage, write_params

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


def test_one_parent_and_one_child_per_stage_and_resending_adds_nothing(
    repository, loaded, experiment, monkeypatch
):
    monkeypatch.setenv("DVC_EXP_NAME", "brave-otter")
    run_pipeline(loaded)
    (parent,) = experiment.parents
    assert parent.data.params == state.flatten(loaded)
    assert parent.info.run_name == "digits-kl-asynchronous-b0.5-brave-otter"
    children = experiment.children
    assert set(children) == {"distill", "calibrate", "evaluate"}
    assert {c.data.tags["mlflow.parentRunId"] for c in children.values()} == {parent.info.run_id}
    assert all(run.info.status == "FINISHED" for run in experiment.runs)
    check_curves(experiment)
    assert experiment.curve("distill", "validation/branch_0/accuracy") == [(3, 0.5)]
    for run in experiment.runs:
        assert run.data.tags["DVC_EXP_NAME"] == "brave-otter"
        assert run.data.tags["edgeke.machine"].startswith(platform.node())
        assert run.data.tags["edgeke.content"] == state.content(loaded)
    before = experiment.everything()
    assert main() == 0
    assert experiment.everything() == before


def test_settings_for_other_programs_misdirect_nothing(here, loaded, experiment, monkeypatch):
    run_stage("export", loaded)
    first = experiment.children["export"].info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", first)
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    monkeypatch.setenv("RANK", "1")
    run_stage("distill", loaded, {"classes/nuts & bolts (M3)": 4.0}, ROWS)
    assert experiment.client.get_run(first).data.metrics == {"m": 1.0}
    check_curves(experiment)
    assert experiment.client.get_experiment_by_name("elsewhere") is None
    with stores.connected() as client:
        client.search_registered_models()
        # Not in the background, whose last words a process that ends takes along.
        assert client.set_tag(first, "a", "b", synchronous=None) is None
    # Names of classes may hold what MLflow refuses.
    assert "classes/nuts -u26- bolts -u28-M3-u29-" in experiment.children["distill"].data.metrics


def test_parameters_code_and_the_experiments_name_make_another_parent(
    here, loaded, experiment, monkeypatch
):
    code = here / "edgeke" / "fit.py"
    code.parent.mkdir()
    code.write_text("lr = 1")
    other = replace(loaded, kd=replace(loaded.kd, beta=0.3))
    for params in (loaded, other, loaded):
        run_stage("export", params)
    assert sorted(run.data.params["kd.beta"] for run in experiment.parents) == ["0.3", "0.5"]
    code.write_text("lr = 2")
    run_stage("export", loaded)
    assert len(experiment.parents) == 3
    monkeypatch.setenv("DVC_EXP_NAME", "brave-otter")
    run_stage("export", loaded)
    assert len(experiment.parents) == 4


@pytest.mark.parametrize(
    ("error", "status"), [(InputError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_stage_that_ends_early_is_marked(here, loaded, experiment, error, status):
    with pytest.raises(type(error)), stage_run("export", loaded):
        raise error
    assert {run.info.status for run in experiment.runs} == {status}
    assert not (here / "results" / "export" / "run.json").exists()
    run_stage("export", loaded)
    assert {run.info.status for run in experiment.parents} == {"FINISHED"}


def test_without_tracking_only_the_record_is_written(here, loaded, experiment, monkeypatch):
    run_stage("export", replace(loaded, tracking=replace(loaded.tracking, enabled=False)))
    with monkeypatch.context() as without:
        folder = ModuleType("mlflow")  # what Python makes of our folder mlflow/ without MLflow
        folder.__file__ = None
        without.setitem(sys.modules, "mlflow", folder)
        run_stage("calibrate", loaded)
    for stage in ("export", "calibrate"):
        assert read_json(here / "results" / stage / "run.json")["stage"] == stage
    assert experiment.runs == []


def test_an_experiment_deleted_in_the_ui_comes_back(here, loaded, experiment):
    for _ in range(2):
        run_stage("export", loaded)
        stored = experiment.client.get_experiment_by_name(experiment.name)
        assert stored.lifecycle_stage == "active"
        experiment.client.delete_experiment(stored.experiment_id)


def test_stages_that_train_carry_the_machines_load(here, loaded, experiment, monkeypatch):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    for stage in ("train_teacher", "export"):
        with stage_run(stage, loaded):
            time.sleep(1)
    load = experiment.children["train_teacher"].data.metrics
    assert 0 <= load["system/cpu_utilization_percentage"] <= 100
    assert experiment.children["export"].data.metrics == {}


CRASH = """
import os, signal
from edgeke import params
from edgeke.tracking.runs import stage_run
with stage_run("distill", params.load()) as run:
    run.epoch(1, {"train/loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_by_force_is_marked_by_the_next_stage(repository, loaded, experiment):
    died = subprocess.run(
        [sys.executable, "-c", CRASH], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert {run.info.status for run in experiment.runs} == {"RUNNING"}
    dead = experiment.children["distill"].info.run_id
    with stage_run("distill", loaded), stage_run("export", loaded):  # these are alive
        killed = experiment.client.get_run(dead)
        living = [run.info.status for run in experiment.runs if run.info.run_id != dead]
    assert killed.info.status == "KILLED"
    assert killed.data.tags["edgeke.killed"] == "its process was gone"
    assert killed.data.metrics["train/loss"] == 1.0
    assert living == ["RUNNING"] * 3
    assert [run.info.status for run in experiment.parents] == ["FINISHED"]


LIVE = """
from edgeke import params
from edgeke.tracking.runs import stage_run
with stage_run("distill", params.load()):
    print("lives", flush=True)
    input()
"""


def test_a_living_run_of_another_container_is_left_alone(repository, loaded, experiment):
    """Containers may share the host's name and not its process numbers."""
    container = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*container, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to make a process namespace")
    with subprocess.Popen(
        [*container, sys.executable, "-c", LIVE],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "lives\n"
        run_stage("export", loaded)
        assert experiment.children["distill"].info.status == "RUNNING"
        other.communicate("\n")
    assert experiment.children["distill"].info.status == "FINISHED"
    assert list((stores.repository() / ".edgeke" / "running").iterdir()) == []


def test_two_machines_on_one_commit_have_a_parent_each(here, loaded, experiment, monkeypatch):
    for desk, latency in (("desk-a", 1.0), ("desk-b", 2.0), ("desk-b", 3.0)):
        monkeypatch.setattr(platform, "node", lambda desk=desk: desk)
        headline = {"test/default/latency_ms_mean": latency}
        run_stage("evaluate", loaded, {"m": latency}, headline=headline)
    values = {
        run.data.tags["edgeke.machine"].split(",")[0]: run.data.metrics
        for run in experiment.parents
    }
    assert values == {
        "desk-a": {"test/default/latency_ms_mean": 1.0},
        "desk-b": {"test/default/latency_ms_mean": 3.0},
    }


def test_the_commit_is_that_of_the_project_or_it_is_said(here, loaded, monkeypatch, capsys):
    git = ("git", "-c", "user.name=a", "-c", "user.email=a@b.c")
    for folder in (here, here / "other"):
        folder.mkdir(exist_ok=True)
        for command in (("init", "-q"), ("commit", "-q", "--allow-empty", "-m", folder.name)):
            subprocess.run([*git, *command], cwd=folder, check=True)
    commit = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    monkeypatch.setenv("GIT_DIR", str(here / "other" / ".git"))  # as a hook of another one sets it
    record = state.Record.start("export", loaded)
    assert record.tags["mlflow.source.git.commit"] == commit
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own way to try that
    record = state.Record.start("export", loaded)
    assert "mlflow.source.git.commit" not in record.tags
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "without their commit" in said
    assert f"git config --global --add safe.directory {here}" in said


def test_processes_that_start_together_share_one_parent_on_a_fresh_store(
    tmp_path, experiment, monkeypatch
):
    """Two writers on a fresh SQLite file would collide in its migration."""
    write_params(tmp_path, experiment.name)
    workers = [fork(tmp_path, {}, stage, 1, 0.0) for stage in ("distill", "export")]
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert len(experiment.parents) == 1
    assert set(experiment.children) == {"distill", "export"}

import os
import platform
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from toys import ROOT, replace

from edgeke import params
from edgeke.errors import InputError
from edgeke.files import read_json, write_json
from edgeke.tracking import state
from edgeke.tracking import store as stores
from edgeke.tracking.runs import stage_run

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


def client():
    from mlflow import MlflowClient

    return MlflowClient(stores.store_uri(stores.project_root()))


def runs(loaded: params.Params) -> list:
    experiment = client().get_experiment_by_name(loaded.tracking.experiment)
    return client().search_runs([experiment.experiment_id])


def metrics_of(loaded: params.Params, slot: str) -> dict[str, float]:
    (found,) = [run for run in runs(loaded) if run.data.tags.get(state.SLOT) == slot]
    return found.data.metrics


def test_one_parent_and_one_child_per_stage(here, loaded, monkeypatch):
    for stage in ("download", "distill/0"):
        monkeypatch.setenv("DVC_STAGE", stage.replace("/", "@"))
        with stage_run(stage, loaded) as run:
            for epoch in (1, 2):
                run.epoch(epoch, {"train/loss": 1 / epoch})
            run.metrics({"validation/accuracy": 0.5, "train/loss": 0.5})
    found = runs(loaded)
    parents = [r for r in found if "mlflow.parentRunId" not in r.data.tags]
    children = [r for r in found if "mlflow.parentRunId" in r.data.tags]
    assert len(parents) == 1
    assert parents[0].data.params == {k: str(v) for k, v in state.flatten(loaded).items()}
    assert parents[0].info.run_name == "digits-kl-asynchronous-b0.5"
    assert {c.info.run_name for c in children} == {"download", "distill@0"}
    assert {c.data.tags["DVC_STAGE"] for c in children} == {"download", "distill@0"}
    assert {c.data.tags["mlflow.parentRunId"] for c in children} == {parents[0].info.run_id}
    assert all(r.info.status == "FINISHED" for r in found)
    curve = client().get_metric_history(children[0].info.run_id, "train/loss")
    assert {(m.step, m.value) for m in curve} == {(1, 1.0), (2, 0.5)}
    note = read_json(here / "results" / "distill" / "0" / "run.json")
    assert note["parent_run_id"] == parents[0].info.run_id


def test_a_run_id_in_the_environment_hijacks_no_child(here, loaded, monkeypatch):
    with stage_run("download", loaded) as run:
        first = run.outbox.address.child
    monkeypatch.setenv("MLFLOW_RUN_ID", first)
    with stage_run("export", loaded) as run:
        run.metrics({"m": 1.0})
        assert run.outbox.address.child != first
    assert client().get_run(first).data.metrics == {}


def test_class_names_that_mlflow_refuses_are_still_logged(here, loaded):
    with stage_run("download", loaded) as run:
        run.metrics({"train/images_of/nuts & bolts (M3)": 4})
    child = next(r for r in runs(loaded) if "mlflow.parentRunId" in r.data.tags)
    assert child.data.metrics == {"train/images_of/nuts -u26- bolts -u28-M3-u29-": 4}


def test_another_parameter_is_another_parent(here, loaded):
    other = replace(loaded, kd=replace(loaded.kd, beta=0.3))
    for one in (loaded, other, loaded):
        with stage_run("download", one):
            pass
    parents = [r for r in runs(loaded) if "mlflow.parentRunId" not in r.data.tags]
    assert sorted(p.data.params["kd.beta"] for p in parents) == ["0.3", "0.5"]


def test_the_experiments_name_is_part_of_the_state(here, loaded, monkeypatch):
    before = state.state(loaded)
    monkeypatch.setenv("DVC_EXP_NAME", "brave-otter")
    assert state.state(loaded) != before
    with stage_run("download", loaded):
        pass
    parent = next(r for r in runs(loaded) if "mlflow.parentRunId" not in r.data.tags)
    assert parent.info.run_name.endswith("-brave-otter")
    assert parent.data.tags["DVC_EXP_NAME"] == "brave-otter"


def test_listed_code_is_part_of_the_state(here, loaded):
    (here / "edgeke").mkdir()
    code = here / "edgeke" / "fit.py"
    code.write_text("lr = 1")
    (here / "dvc.yaml").write_text("stages: {a: {cmd: x, deps: [edgeke/fit.py, data]}}")
    before = state.state(loaded)
    code.write_text("lr = 2")
    assert state.state(loaded) != before


def test_the_headline_lands_on_the_parent_and_restored_stages_are_linked(here, loaded):
    write_json(
        here / "results" / "distill" / "1" / "run.json",
        {"run_id": "abc", "parent_run_id": "elsewhere"},
    )
    with stage_run("download", loaded):
        pass
    with stage_run("evaluate", loaded) as run:
        run.headline({"test/default/accuracy": 0.75})
    parent = next(r for r in runs(loaded) if "mlflow.parentRunId" not in r.data.tags)
    assert parent.data.metrics == {"test/default/accuracy": 0.75}
    assert parent.data.tags["edgeke.restored.distill/1"] == "abc"
    assert "edgeke.restored.download" not in parent.data.tags


@pytest.mark.parametrize(
    ("error", "status"), [(InputError("bad"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_stage_that_ends_early_is_marked(here, loaded, error, status):
    def fail() -> None:
        with stage_run("download", loaded):
            raise error

    with pytest.raises(type(error)):
        fail()
    assert {r.info.status for r in runs(loaded)} == {status}
    assert not (here / "results" / "download" / "run.json").exists()


def test_tracking_off_does_nothing(here, loaded):
    off = replace(loaded, tracking=replace(loaded.tracking, enabled=False))
    with stage_run("download", off) as run:
        run.epoch(1, {"train/loss": 1.0})
        run.metrics({})
        run.headline({})
    assert read_json(here / "results" / "download" / "run.json") == {
        "run_id": None,
        "parent_run_id": None,
    }
    assert client().get_experiment_by_name(loaded.tracking.experiment) is None


def test_without_mlflow_the_repository_s_own_folder_is_not_taken_for_it(here, loaded, monkeypatch):
    folder = ModuleType("mlflow")  # what Python makes of a folder without __init__.py
    folder.__file__ = None
    monkeypatch.setitem(sys.modules, "mlflow", folder)
    with stage_run("download", loaded) as run:
        run.metrics({"m": 1.0})
    assert read_json(here / "results" / "download" / "run.json")["run_id"] is None


def test_an_unusable_store_says_what_to_do(here, loaded, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")

    def start() -> None:
        with stage_run("download", loaded):
            pass

    with pytest.raises(InputError, match=r"gopher://nowhere does not answer.*tracking\.enabled"):
        start()


def test_a_corrupt_store_is_told_in_one_line(tmp_path, loaded, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(b"not a database at all" * 100)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))

    def start() -> None:
        with stage_run("download", loaded):
            pass

    with pytest.raises(InputError, match="does not answer") as caught:
        start()
    assert "\n" not in str(caught.value)


def test_an_experiment_deleted_in_the_ui_comes_back(here, loaded):
    for _ in range(2):
        with stage_run("download", loaded):
            pass
        found = client().get_experiment_by_name(loaded.tracking.experiment)
        assert found.lifecycle_stage == "active"
        client().delete_experiment(found.experiment_id)


def test_a_store_of_another_mlflow_says_which_way_to_go(tmp_path, empty_store, loaded, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    file = tmp_path / "mlflow" / "mlflow.db"
    shutil.copy(empty_store, file)
    with sqlite3.connect(file) as newer:
        newer.execute("update alembic_version set version_num = 'ffffffffffff'")
    newer.close()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    with pytest.raises(InputError, match=r"mlflow db upgrade.*install.*newer") as caught:
        stage_run("download", loaded).__enter__()
    assert "\n" not in str(caught.value)


def test_training_stages_carry_the_machines_load(here, loaded):
    with stage_run("train_teacher", loaded):
        pass
    with stage_run("export", loaded):
        pass
    teacher, export = (metrics_of(loaded, slot) for slot in ("train_teacher", "export"))
    assert 0 <= teacher["system/cpu_utilization_percentage"] <= 100
    assert teacher["system/system_memory_usage_megabytes"] > 0
    assert export == {}


def test_a_run_says_whose_it_is(here, loaded):
    with stage_run("download", loaded):
        pass
    for run in runs(loaded):
        assert run.data.tags["edgeke.machine"].startswith(platform.node())
        assert run.data.tags["edgeke.content"] == state.content(loaded)
        assert run.data.tags["edgeke.process"].split()[1] == str(os.getpid())


CRASH = """
import os, signal, sys
from edgeke import params
from edgeke.tracking.runs import stage_run
with stage_run("distill/0", params.load()) as run:
    run.epoch(1, {"train/loss": 1.0})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_killed_by_force_is_marked_by_the_next_which_goes_on_from_it(here, loaded):
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["tracking"]["experiment"] = loaded.tracking.experiment
    (here / "params.yaml").write_text(yaml.safe_dump(content))
    died = subprocess.run(
        [sys.executable, "-c", CRASH], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False
    )
    assert died.returncode == -signal.SIGKILL
    assert {run.info.status for run in runs(loaded)} == {"RUNNING"}
    with stage_run("distill/0", loaded) as run:
        mine = run.outbox.address.child
    found = {r.info.run_id: r for r in runs(loaded) if "mlflow.parentRunId" in r.data.tags}
    (dead,) = [r for r in found.values() if r.info.run_id != mine]
    assert dead.info.status == "KILLED"
    assert dead.data.tags["edgeke.killed"] == "its process was gone"
    assert dead.data.metrics["train/loss"] == 1.0
    assert found[mine].data.tags["edgeke.resumes"] == dead.info.run_id
    assert found[mine].info.status == "FINISHED"
    parents = [r for r in runs(loaded) if "mlflow.parentRunId" not in r.data.tags]
    assert [p.info.status for p in parents] == ["FINISHED"]


def test_a_parent_that_lost_its_parameters_gets_them(here, loaded, monkeypatch):
    """The store went away between the making of the parent and its parameters."""
    from mlflow import MlflowClient

    with monkeypatch.context() as away:
        away.setattr(MlflowClient, "log_batch", lambda *_, **__: 1 / 0)
        with pytest.raises(InputError, match="does not answer"):
            stage_run("download", loaded).__enter__()
    assert [run.data.params for run in runs(loaded)] == [{}]
    with stage_run("download", loaded):
        pass
    (parent,) = [r for r in runs(loaded) if "mlflow.parentRunId" not in r.data.tags]
    assert parent.data.params == {k: str(v) for k, v in state.flatten(loaded).items()}


def test_a_stage_that_finished_is_not_resumed(here, loaded):
    for _ in range(2):
        with stage_run("distill/0", loaded):
            pass
    assert not any("edgeke.resumes" in run.data.tags for run in runs(loaded))


def test_processes_that_start_together_share_one_parent_on_a_fresh_store(tmp_path: Path):
    """Two writers on a fresh SQLite file would collide in its migration."""
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    code = (
        "import sys\n"
        "from edgeke import params\n"
        "from edgeke.tracking.runs import stage_run\n"
        "with stage_run(sys.argv[1], params.load()) as run: run.metrics({'m': 1.0})"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_"))}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, slot],
            cwd=tmp_path,
            env={**environment, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for slot in ("distill/0", "distill/1")
    ]
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    notes = [read_json(tmp_path / "results" / "distill" / n / "run.json") for n in "01"]
    assert notes[0]["parent_run_id"] == notes[1]["parent_run_id"]
    assert notes[0]["run_id"] != notes[1]["run_id"]

"""`make resend`: what results/ hold reaches MLflow once, whatever happened to the store."""

import json
import os
import subprocess
import sys

import pytest
from toys import ROOT, replace

from edgeke.files import read_json
from edgeke.tracking import runs
from edgeke.tracking.__main__ import main
from edgeke.tracking.runs import stage_run

from .conftest import EVALUATED, HEADLINE, ROWS, run_pipeline, run_stage

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")

AWAY = "http://127.0.0.1:9"


class Away:
    """A client whose server is gone, and which counts what it was asked for."""

    calls = 0

    def __getattr__(self, name: str):
        def fail(*args: object, **kwargs: object) -> None:
            self.calls += 1
            raise ConnectionError("connection refused\nand a traceback")

        return fail


@pytest.fixture
def lenient(loaded):
    return replace(loaded, tracking=replace(loaded.tracking, on_failure="warn"))


def test_resending_after_a_live_run_adds_nothing(repository, loaded, experiment):
    run_pipeline(loaded)
    before = experiment.everything()
    assert main() == 0
    assert experiment.everything() == before


def test_a_pipeline_without_a_store_is_logged_in_full_once_it_is_back(
    repository, lenient, experiment, capsys, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", AWAY)
    run_pipeline(lenient)
    told = [line for line in capsys.readouterr().err.splitlines() if "View" not in line]
    assert len(told) == 3, told  # one line for each stage
    assert all("127.0.0.1:9 does not answer" in line and "make resend" in line for line in told)
    assert main() == 1
    assert "error: the tracking store" in capsys.readouterr().err

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main() == 0
    (parent,) = experiment.parents
    assert parent.data.metrics == HEADLINE
    assert {run.info.status for run in experiment.runs} == {"FINISHED"}
    for branch in (0, 1):
        expected = [(row["epoch"], row["train/loss"]) for row in ROWS if row["branch"] == branch]
        assert experiment.curve("distill", f"train/branch_{branch}/loss") == expected
    assert experiment.children["evaluate"].data.metrics == EVALUATED
    distill = experiment.children["distill"].info.run_id
    assert [table.path for table in experiment.client.list_artifacts(distill)] == ["history.csv"]
    record = read_json(repository / "results" / "distill" / "run.json")
    assert experiment.children["distill"].info.start_time == record["started"]

    before = experiment.everything()
    assert main() == 0
    assert experiment.everything() == before


def test_a_store_that_goes_away_costs_a_warning_and_resend_completes_the_run(
    repository, loaded, experiment, capsys, monkeypatch
):
    away = Away()
    with monkeypatch.context() as patched:
        patched.setattr(runs, "log_stage", lambda *_: 1 / 0)
        with stage_run("distill", loaded) as run:
            run.epoch(1, {"train/branch_0/loss": 1.0})
            run.client = away
            for row in ROWS[1:]:
                run.epoch(row["epoch"], {"train/loss": row["train/loss"]})
            (repository / "results" / "distill").mkdir(parents=True)
            table = "\n".join(",".join(map(str, row.values())) for row in ROWS)
            (repository / "results" / "distill" / "history.csv").write_text(
                f"{','.join(ROWS[0])}\n{table}\n"
            )
    told = capsys.readouterr().err
    assert told.count("warning:") == 1
    assert "does not answer (connection refused)" in told
    assert away.calls == 1  # it is left alone for a while
    assert experiment.curve("distill", "train/branch_0/loss") == [(1, 1.0)]
    assert main() == 0
    assert experiment.curve("distill", "train/branch_0/loss") == [(1, 1.0), (2, 1 / 2), (3, 1 / 3)]
    assert experiment.curve("distill", "train/branch_1/loss") == [
        (1, 2.0),
        (2, 1.5),
        (3, 1 + 1 / 3),
    ]
    assert len(experiment.runs) == 2


def test_a_store_that_comes_back_gets_everything_in_the_same_stage(
    repository, loaded, experiment, capsys, monkeypatch
):
    with stage_run("export", loaded) as run:
        client = run.client
        run.client = Away()
        run.epoch(1, {"train/loss": 1.0})
        run.client = client
        run.epoch(2, {"train/loss": 0.5})
        monkeypatch.setattr(run, "_pause_until", 0.0)
        run.epoch(3, {"train/loss": 0.25})
        (repository / "results" / "export").mkdir(parents=True)
        (repository / "results" / "export" / "history.csv").write_text(
            "epoch,train/loss\n1,1.0\n2,0.5\n3,0.25\n"
        )
    assert "answers again" in capsys.readouterr().err
    assert sorted(experiment.curve("export", "train/loss")) == [(1, 1.0), (2, 0.5), (3, 0.25)]


def test_restored_stages_are_linked_also_in_another_store(
    repository, loaded, experiment, empty_store, tmp_path, monkeypatch
):
    run_stage("distill", loaded)
    other = replace(loaded, kd=replace(loaded.kd, beta=0.3))
    run_stage("calibrate", other)
    run_stage("evaluate", other, EVALUATED, headline=HEADLINE)

    def check() -> None:
        (parent,) = [run for run in experiment.parents if run.data.params["kd.beta"] == "0.3"]
        links = {k: v for k, v in parent.data.tags.items() if k.startswith("edgeke.restored.")}
        assert links == {"edgeke.restored.distill": experiment.children["distill"].info.run_id}
        assert len(experiment.runs) == 5

    check()
    second = tmp_path / "second"
    second.mkdir()
    (second / "mlflow").mkdir()
    (second / "mlflow" / "mlflow.db").write_bytes(empty_store.read_bytes())
    monkeypatch.setenv("DVC_ROOT", str(second))
    assert main() == 0
    check()


def test_a_run_deleted_in_the_ui_stays_deleted(repository, loaded, experiment):
    run_pipeline(loaded)
    experiment.client.delete_run(experiment.children["distill"].info.run_id)
    before = experiment.everything()
    assert main() == 0
    assert experiment.everything() == before
    experiment.client.delete_run(experiment.parents[0].info.run_id)
    assert main() == 0
    assert experiment.parents == []


def test_a_record_that_is_missing_or_damaged_is_said(repository, loaded, capsys):
    run_stage("export", loaded)
    file = repository / "results" / "export" / "run.json"
    file.write_text(json.dumps({"run_id": "abc", "parent_run_id": "def"}))  # an earlier version's
    assert main() == 1
    assert "no stage left a record in results/; run one" in capsys.readouterr().err
    file.write_text("[1]")
    assert main() == 1
    assert "results/export/run.json is no record" in capsys.readouterr().err


FILL = """
import sys
from pathlib import Path
from edgeke import params
from edgeke.tracking.runs import stage_run
def fill(disk):
    try:
        with (Path(disk) / "big").open("wb", buffering=0) as file:
            while file.write(bytes(1024)) == 1024:
                pass
    except OSError:
        pass
with stage_run("distill", params.load()) as run:
    run.epoch(1, {"train/loss": 1.0})
    fill(sys.argv[1])
    for epoch in range(2, 400):
        run.epoch(epoch, {f"train/loss_{i}": 1.0 for i in range(20)})
print("trained to the end")
"""


def test_a_full_disk_stops_no_training(repository, store, tmp_path):
    """A real one: a file system of a few MB, where this machine lets us mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        (disk / "mlflow").mkdir()
        (disk / "mlflow" / "mlflow.db").write_bytes((store / "mlflow" / "mlflow.db").read_bytes())
        done = subprocess.run(
            [sys.executable, "-c", FILL, str(disk)],
            env={**os.environ, "DVC_ROOT": str(disk), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    assert done.returncode == 0, done.stderr
    assert "trained to the end" in done.stdout
    assert done.stderr.count("warning:") == 1, done.stderr
    assert (
        "free space on its disk. The stage goes on; `make resend` logs its results then"
        in done.stderr
    )
    assert "Traceback" not in done.stderr

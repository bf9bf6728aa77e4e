"""The store: secrets in its address, its lock, stores that do not answer."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import servers
from toys import ROOT, replace

from edgeke.errors import InputError
from edgeke.tracking import store as stores
from edgeke.tracking.runs import stage_run
from edgeke.tracking.store import open_experiment, without_secrets

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")

PORT = "127.0.0.1:1"  # nobody listens
SECRET = [  # an address, what may be shown of it, what may not
    (f"postgresql+psycopg2://ada_l:se/cr@et@{PORT}/db", f"postgresql+psycopg2://{PORT}/db"),
    (f"postgresql://ada_l:hunter2@{PORT}/db", f"postgresql://{PORT}/db"),
    (f"postgresql://{PORT}/db?user=ada_l&password=hunter2", f"postgresql://{PORT}/db"),
    (f"postgresql://{PORT}/db?password=p@ss", "postgresql://***"),
    (f"http://ada_l:hunter2@{PORT}", f"http://{PORT}"),
    (f"http://ada_l:p@ss@{PORT}", f"http://{PORT}"),
    (f"http://ada_l:se?cr#et@{PORT}", "http://***"),
    (f"http://ghp_TOKEN@{PORT}", f"http://{PORT}"),
    (f"http://:hunter2@{PORT}", f"http://{PORT}"),
    (f"http://ada_l:hunter2%40@{PORT}/?token=ghp_TOKEN", f"http://{PORT}/"),
]
WORDS = ("ada_l", "se/cr", "cr@et", "et@", "se?cr", "hunter2", "p@ss", "ss@", "ghp_TOKEN")


@pytest.mark.parametrize(("uri", "place"), SECRET)
def test_no_form_of_address_gives_its_secrets_away(
    tmp_path, loaded, monkeypatch, capfd, uri, place
):
    """In the refusal, in the warning, in MLflow's own output, in any file."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not answer") as refused:
        stage_run("export", loaded).__enter__()
    tracking = replace(loaded.tracking, on_failure="warn", experiment="edgeke")
    with stage_run("export", replace(loaded, tracking=tracking)) as run:
        run.epoch(1, {"train/loss": 1.0})
    printed = capfd.readouterr()
    assert "warning: the tracking store" in printed.err
    text = str(refused.value) + printed.out + printed.err
    assert f"the tracking store {place} does not answer" in text
    files = [path.read_bytes().decode(errors="replace") for path in tmp_path.rglob("*.*")
             if path.is_file()]  # fmt: skip
    for word in WORDS:
        assert word not in text, text
        assert not [content for content in files if word in content], word


def test_pieces_of_an_address_in_an_error_are_blanked():
    uri = "postgresql://ada_l:se/cr@et@host/db"
    text = 'could not translate host name "et@host" (user "ada_l"), see http://x:y@z/?q=1'
    assert without_secrets(text, uri) == (
        'could not translate host name "***@host" (user "***"), see http://z/'
    )
    assert without_secrets("no such table: ada_l", "sqlite:////home/ada_l/mlflow.db") == (
        "no such table: ada_l"
    )


def start_in(root: Path, loaded, monkeypatch) -> str:
    """The refusal of a stage in a repository, within seconds."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("DVC_ROOT", str(root))
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        stage_run("export", loaded).__enter__()
    assert time.monotonic() - began < 20
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_no_store_are_refused_at_once(tmp_path, empty_store, loaded, monkeypatch):
    (tmp_path / "mlflow").mkdir()
    file = tmp_path / "mlflow" / "mlflow.db"
    file.mkdir()
    assert "unable to open database file" in start_in(tmp_path, loaded, monkeypatch)
    file.rmdir()
    file.write_bytes(b"not a database at all" * 100)
    assert "not a database" in start_in(tmp_path, loaded, monkeypatch)
    shutil.copy(empty_store, file)
    with sqlite3.connect(file) as newer:
        newer.execute("update alembic_version set version_num = 'ffffffffffff'")
    newer.close()
    refusal = start_in(tmp_path, loaded, monkeypatch)
    assert "mlflow db upgrade" in refusal
    assert "install" in refusal


@pytest.mark.parametrize("scheme", ["postgresql", "http", "gopher"])
def test_a_server_that_is_not_there_is_refused_soon(here, loaded, monkeypatch, scheme):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://127.0.0.1:{servers.free_port()}")
    began = time.monotonic()
    with pytest.raises(InputError, match=r"does not answer.*tracking\.enabled=false"):
        stage_run("export", loaded).__enter__()
    assert time.monotonic() - began < 20


HOLD = """
import sys, time
from pathlib import Path
from edgeke.tracking.store import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_process_that_holds_the_lock_is_named(here, store, loaded, monkeypatch, capsys):
    monkeypatch.setattr(stores, "_SAY_AFTER", 0.2)
    monkeypatch.setattr(stores, "_GIVE_UP_AFTER", 1.0)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(store)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(InputError, match=f"process {holder.pid} on .* has held"):
                stage_run("export", loaded).__enter__()
        finally:
            holder.kill()
    assert f"waiting for process {holder.pid} on " in capsys.readouterr().err
    with stage_run("export", loaded):  # it is gone, and so is its lock
        pass


def test_two_machines_may_make_the_experiment_together():
    """A lock ends at its repository, so both may find that there is no such experiment."""

    class Late:
        answers: ClassVar = [None, SimpleNamespace(experiment_id="7", lifecycle_stage="active")]

        def get_experiment_by_name(self, name):
            return self.answers.pop(0)

        def create_experiment(self, name, artifact_location):
            raise RuntimeError("RESOURCE_ALREADY_EXISTS")

    assert open_experiment(Late(), "edgeke", Path()) == "7"

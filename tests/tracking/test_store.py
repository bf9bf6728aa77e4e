"""The store: secrets in its address, its lock, stores that do not answer."""

import os
import shutil
import sqlite3
import subprocess
import sys
import time

import pytest
import servers
from toys import ROOT, replace

from edgeke.errors import InputError
from edgeke.tracking import store as stores
from edgeke.tracking.runs import stage_run

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")

PORT = "127.0.0.1:1"  # nobody listens
SECRET = [  # an address, what may be shown of it
    (f"postgresql+psycopg2://ada_l:se/cr@et@{PORT}/db", f"postgresql+psycopg2://{PORT}/db"),
    (f"postgresql://ada_l:hunter2@{PORT}/db", f"postgresql://{PORT}/db"),
    (f"postgresql://{PORT}/db?user=ada_l&password=hunter2", f"postgresql://{PORT}/db"),
    (f"postgresql://{PORT}/db?password=p@ss", "***"),
    (f"http://ada_l:hunter2@{PORT}", f"http://{PORT}"),
    (f"http://ada_l:p@ss@{PORT}", f"http://{PORT}"),
    (f"http://ada_l:se?cr#et@{PORT}", "***"),
    (f"http://ghp_TOKEN@{PORT}", f"http://{PORT}"),
    (f"http://:hunter2@{PORT}", f"http://{PORT}"),
    (f"http://ada_l:hunter2%40@{PORT}/?token=ghp_TOKEN", f"http://{PORT}/"),
]
WORDS = ("ada_l", "se/cr", "cr@et", "et@", "se?cr", "hunter2", "p@ss", "ss@", "ghp_TOKEN")


def refused(loaded) -> str:
    """The refusal of a stage that starts: one line, within seconds."""
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        stage_run("export", loaded).__enter__()
    assert time.monotonic() - began < 20
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("uri", "place"), SECRET)
def test_no_form_of_address_gives_its_secrets_away(here, loaded, monkeypatch, capfd, uri, place):
    """In the refusal, in the warning, in MLflow's own output, in any file."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    (here / "params.yaml").unlink()  # it holds the test's name, which holds the address
    refusal = refused(loaded)
    tracking = replace(loaded.tracking, on_failure="warn", experiment="edgeke")
    with stage_run("export", replace(loaded, tracking=tracking)) as run:
        run.epoch(1, {"train/loss": 1.0})
    printed = capfd.readouterr()
    assert "warning: the tracking store" in printed.err
    text = refusal + printed.out + printed.err
    assert f"the tracking store {place} does not answer" in text
    files = [path for path in here.rglob("*.*") if path.is_file()]
    content = "".join(path.read_bytes().decode(errors="replace") for path in files)
    for word in WORDS:
        assert word not in text + content, word


def test_addresses_in_an_error_lose_their_secrets_too(here):
    error = ConnectionError("no route to http://x:y@proxy/?q=1 (File /home/ada/a)")
    assert "(no route to http://proxy/ (File /home/ada/a))" in str(stores.refusal(error))


def test_files_that_are_no_store_are_refused_at_once(tmp_path, empty_store, loaded, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mlflow" / "mlflow.db"
    file.mkdir(parents=True)
    assert "unable to open database file" in refused(loaded)
    file.rmdir()
    file.write_bytes(b"not a database at all" * 100)
    assert "not a database" in refused(loaded)
    shutil.copy(empty_store, file)
    with sqlite3.connect(file) as newer:
        newer.execute("update alembic_version set version_num = 'ffffffffffff'")
    newer.close()
    refusal = refused(loaded)
    assert "mlflow db upgrade" in refusal
    assert "install" in refusal


@pytest.mark.parametrize("scheme", ["postgresql", "http", "gopher"])
def test_a_server_that_is_not_there_is_refused_soon(here, loaded, monkeypatch, scheme):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}://127.0.0.1:{servers.free_port()}")
    assert "tracking.enabled=false" in refused(loaded).partition("does not answer")[2]


@pytest.mark.parametrize("scheme", ["sqlite", "sqlite+pysqlite"])
def test_a_relative_store_is_one_of_the_repository(tmp_path, monkeypatch, scheme):
    """Not of the copy in which DVC runs an experiment: it is deleted at the end."""
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "tmpx"
    (copy / ".dvc").mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{scheme}:///runs.db")
    assert stores.store_uri() == f"{scheme}:///{tmp_path}/runs.db"
    for uri in (f"{scheme}:////abs/runs.db", "sqlite:///C:/runs.db", "http://host", "databricks"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        assert stores.store_uri() == uri


def test_another_user_of_the_group_may_write_where_the_umask_says_so(tmp_path, loaded, monkeypatch):
    """SQLite itself makes files that nobody else may write."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o002)
    try:
        with stage_run("export", loaded):
            modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "mlflow").glob("*")}
    finally:
        os.umask(before)
    assert modes == {"mlflow.db": 0o664, ".lock": 0o664, ".lock-owner": 0o664}


HOLD = """
import time
from edgeke.tracking.store import locked
with locked():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_process_that_holds_the_lock_is_named(here, loaded, monkeypatch, capsys):
    monkeypatch.setattr(stores, "_WAITS", (0.2, 1.0))
    with subprocess.Popen(
        [sys.executable, "-c", HOLD],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            assert f"process {holder.pid} on " in refused(loaded)
        finally:
            holder.kill()
    assert f"waiting for process {holder.pid} on " in capsys.readouterr().err
    with stage_run("export", loaded):  # it is gone, and so is its lock
        pass

"""A store that goes away and comes back: nothing is lost, and nothing stops."""

import json
import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from toys import ROOT, replace

from edgeke.errors import InputError
from edgeke.tracking import outbox, processes
from edgeke.tracking import store as stores
from edgeke.tracking.__main__ import main
from edgeke.tracking.runs import stage_run

pytestmark = pytest.mark.filterwarnings("ignore:::mlflow")


class Away:
    """A client whose server is gone, and which counts what it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __getattr__(self, name: str):
        def fail(*args: object, **kwargs: object) -> None:
            self.asked += 1
            raise ConnectionError("connection refused\nand a traceback")

        return fail


def kept(store: Path) -> list[Path]:
    return sorted((store / "mlflow" / "outbox").glob("*.jsonl"))


def curve(run: str, key: str = "train/loss") -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(stores.store_uri(stores.project_root()))
    return [(m.step, m.value) for m in client.get_metric_history(run, key)]


def status(run: str) -> str:
    from mlflow import MlflowClient

    return MlflowClient(stores.store_uri(stores.project_root())).get_run(run).info.status


@pytest.fixture(autouse=True)
def _nothing_kept(store):
    yield
    for path in (store / "mlflow" / "outbox").glob("*"):
        path.unlink()


def test_what_a_stage_could_not_send_is_sent_by_the_next(here, store, loaded, capsys, monkeypatch):
    with stage_run("download", loaded) as run:
        run.epoch(1, {"train/loss": 1.0})
        away = Away()
        monkeypatch.setattr(run.outbox, "client", away)
        for epoch in (2, 3, 4):
            run.epoch(epoch, {"train/loss": 1.0 / epoch})
        mine = run.outbox.address.child
    told = capsys.readouterr().err
    assert told.count("the tracking store stopped answering (connection refused)") == 1
    assert "5 messages to the tracking store are kept" in told  # three epochs, two ends
    assert away.asked <= 2  # once when it went away, once at the end
    assert len(kept(store)) == 1
    assert curve(mine) == [(1, 1.0)]
    assert status(mine) == "RUNNING"
    monkeypatch.setattr(processes, "lives", lambda process: False)  # that stage's has ended
    with stage_run("export", loaded):
        pass
    assert kept(store) == []
    assert curve(mine) == [(1, 1.0), (2, 1 / 2), (3, 1 / 3), (4, 1 / 4)]
    assert status(mine) == "FINISHED"


def test_a_store_that_comes_back_gets_everything_in_the_same_stage(
    here, store, loaded, capsys, monkeypatch
):
    with stage_run("download", loaded) as run:
        client = run.outbox.client
        monkeypatch.setattr(run.outbox, "client", Away())
        run.epoch(1, {"train/loss": 1.0})
        monkeypatch.setattr(run.outbox, "client", client)
        run.epoch(2, {"train/loss": 0.5})
        mine = run.outbox.address.child
        assert curve(mine) == []  # not asked again at once
        monkeypatch.setattr(outbox, "_RETRY_SECONDS", 0.0)
        run.epoch(3, {"train/loss": 0.25})
        assert curve(mine) == [(1, 1.0), (2, 0.5), (3, 0.25)]
        run.epoch(4, {"train/loss": 0.1})
    assert kept(store) == []
    assert curve(mine)[-1] == (4, 0.1)
    assert "are kept in" not in capsys.readouterr().err.split("\n", 1)[1]


def test_sending_twice_changes_nothing(here, store, loaded, monkeypatch):
    with stage_run("download", loaded) as run:
        monkeypatch.setattr(run.outbox, "client", Away())
        run.epoch(1, {"train/loss": 1.0})
        mine = run.outbox.address.child
    text = kept(store)[0].read_text()
    monkeypatch.setattr(processes, "lives", lambda process: False)
    for _ in range(2):
        (store / "mlflow" / "outbox" / "again.jsonl").write_text(text)
        for path in kept(store)[1:]:
            path.unlink()
        with stage_run("export", loaded):
            pass
    assert curve(mine) == [(1, 1.0)]


def test_a_file_of_a_process_that_runs_is_left_to_it(here, store, loaded, monkeypatch):
    with stage_run("download", loaded) as run:
        monkeypatch.setattr(run.outbox, "client", Away())
        run.epoch(1, {"train/loss": 1.0})
    with stage_run("export", loaded):
        pass
    assert len(kept(store)) == 1  # this process still runs


def test_a_store_away_at_the_start_is_refused_or_made_up_for(
    here, store, loaded, capsys, monkeypatch
):
    monkeypatch.setattr(processes, "lives", lambda process: False)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.monotonic()
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9 does not answer.*on_failure=warn"):
        stage_run("download", loaded).__enter__()
    assert time.monotonic() - started < 30
    lenient = replace(loaded, tracking=replace(loaded.tracking, on_failure="warn"))
    with stage_run("download", lenient) as run:
        run.epoch(1, {"train/loss": 1.0})
        run.metrics({"train/images": 3})
    assert "does not answer" in capsys.readouterr().err
    (file,) = kept(store)
    # The store is back, under the name it was asked for.
    file.write_text(file.read_text().replace("http://127.0.0.1:9", local(store)))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with stage_run("export", loaded) as run:
        parent = run.outbox.address.parent
    assert kept(store) == []
    from mlflow import MlflowClient

    client = MlflowClient(local(store))
    experiment = client.get_experiment_by_name(loaded.tracking.experiment).experiment_id
    found = {r.info.run_name: r for r in client.search_runs([experiment])}
    assert found["download"].data.metrics == {"train/loss": 1.0, "train/images": 3.0}
    assert found["download"].data.tags["mlflow.parentRunId"] == parent
    assert found["download"].info.status == "FINISHED"
    assert found["download"].info.start_time <= found["export"].info.start_time


def local(store: Path) -> str:
    return f"sqlite:///{(store / 'mlflow' / 'mlflow.db').resolve()}"


def test_a_long_absence_is_made_up_for_in_few_calls(here, store, loaded, monkeypatch):
    (here / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with stage_run("download", loaded) as run:
        monkeypatch.setattr(run.outbox, "client", Away())
        for epoch in range(1, 801):
            run.epoch(epoch, {"train/loss": 1.0 / epoch, "validation/loss": 2.0 / epoch})
        mine = run.outbox.address.child
    calls = []
    deliver = outbox._deliver
    monkeypatch.setattr(
        outbox, "_deliver", lambda *given: calls.append(given[2]) or deliver(*given)
    )
    monkeypatch.setattr(processes, "lives", lambda process: False)
    assert main() == 0
    assert kept(store) == []
    assert len(calls) == 4  # 1,600 metrics in two batches, two ends
    assert len(curve(mine)) == len(curve(mine, "validation/loss")) == 800
    assert curve(mine)[-1] == (800, 1 / 800)
    assert status(mine) == "FINISHED"


def test_a_password_in_the_address_is_not_kept(here, store, loaded, capsys, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:secret-word@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lenient = replace(loaded, tracking=replace(loaded.tracking, on_failure="warn"))
    with stage_run("download", lenient) as run:
        run.epoch(1, {"train/loss": 1.0})
    (file,) = kept(store)
    assert json.loads(file.read_text().splitlines()[0])["uri"] == "http://ada:***@127.0.0.1:9"
    assert "secret-word" not in file.read_text() + capsys.readouterr().err
    # It is still known as that store's.
    monkeypatch.setattr(processes, "lives", lambda process: False)
    sent = []
    monkeypatch.setattr(outbox, "_send_file", lambda *given: sent.append(given[2]))
    outbox.resend(None, "http://ada:secret-word@127.0.0.1:9", store, lambda *_: None)
    assert sent == [file]


def test_a_message_that_is_refused_for_good_is_set_aside_and_said(
    here, store, loaded, capsys, monkeypatch
):
    from mlflow import MlflowClient

    with stage_run("download", loaded) as run:
        monkeypatch.setattr(run.outbox, "client", Away())
        run.epoch(1, {"train/loss": 1.0})
        mine = run.outbox.address.child
    MlflowClient(local(store)).delete_run(mine)  # in the user interface, say
    with kept(store)[0].open("a") as file:
        file.write('{"to": "child", "metr')  # and the machine lost power
    monkeypatch.setattr(processes, "lives", lambda process: False)
    with stage_run("export", loaded):
        pass
    assert kept(store) == []
    (refused,) = (store / "mlflow" / "outbox").glob("*.refused")
    lines = refused.read_text().splitlines()
    assert json.loads(lines[0])["metrics"][0][:2] == ["train/loss", 1.0]
    assert lines[-1] == '{"to": "child", "metr'
    told = capsys.readouterr().err
    assert "is refused" in told
    assert "is cut off" in told


def test_what_can_be_neither_sent_nor_kept_is_counted_aloud(
    here, store, loaded, capsys, monkeypatch
):
    with stage_run("download", loaded) as run:
        monkeypatch.setattr(run.outbox, "client", Away())
        monkeypatch.setattr(run.outbox, "path", Path("/dev/full/no.jsonl"))
        for epoch in (1, 2):
            run.epoch(epoch, {"train/loss": 1.0})
    told = capsys.readouterr().err
    assert told.count("cannot be written") == 2  # when it began, and at the end
    assert "4 messages to the tracking store were lost" in told


FILL = """
import sys
from pathlib import Path
from edgeke import params
from edgeke.tracking.runs import stage_run
disk, rest = Path(sys.argv[1]), sys.argv[2] == "start"
def fill():
    with (disk / "big").open("wb", buffering=0) as file:
        while file.write(bytes(1024)) == 1024:
            pass
def full():
    try:
        fill()
    except OSError:
        pass
if rest:
    full()
with stage_run("distill/0", params.load()) as run:
    run.epoch(1, {"train/loss": 1.0})
    full()
    for epoch in range(2, 400):
        run.epoch(epoch, {f"train/loss_{i}": 1.0 for i in range(20)})
print("trained to the end")
"""


@pytest.mark.parametrize("when", ["start", "later"])
def test_a_full_disk_is_told_and_training_goes_on(here, store, loaded, when, tmp_path):
    """A real one: a file system of a few MB, where this machine lets us mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        (disk / "mlflow").mkdir()
        (disk / "mlflow" / "mlflow.db").write_bytes((store / "mlflow" / "mlflow.db").read_bytes())
        (here / "params.yaml").write_text((ROOT / "params.yaml").read_text())
        done = subprocess.run(
            ["python", "-c", FILL, str(disk), when],
            env={**os.environ, "DVC_ROOT": str(disk), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)
    if when == "start":
        assert done.returncode == 1
        assert "free space on its disk" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert "trained to the end" in done.stdout
        assert "stopped answering" in done.stderr
        assert "messages to the tracking store were lost" in done.stderr


def test_messages_of_several_threads_all_arrive(here, loaded):
    with stage_run("download", loaded) as run:

        def log(thread: int) -> None:
            for step in range(10):
                run.log("child", {f"thread_{thread}": step}, step)

        threads = [threading.Thread(target=log, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        mine = run.outbox.address.child
    for number in range(4):
        assert curve(mine, f"thread_{number}") == [(step, float(step)) for step in range(10)]


def test_the_command_sends_what_is_left(here, store, loaded, capsys, monkeypatch):
    (here / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    with stage_run("download", loaded) as run:
        monkeypatch.setattr(run.outbox, "client", Away())
        run.epoch(1, {"train/loss": 1.0})
        mine = run.outbox.address.child
    monkeypatch.setattr(processes, "lives", lambda process: False)
    assert main() == 0
    assert "1 stages' messages sent, 0 kept" in capsys.readouterr().out
    assert curve(mine) == [(1, 1.0)]

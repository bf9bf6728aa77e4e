"""A shared server, for real: PostgreSQL, users, files in S3; and what happens while it is away."""

import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
import yaml
from servers import COMPOSE, Mlflow, fork
from toys import ROOT

from edgeke import params
from edgeke.errors import InputError
from edgeke.tracking.__main__ import main
from edgeke.tracking.runs import stage_run

from .conftest import run_pipeline, write_params

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.filterwarnings("ignore:::mlflow")]

STAGES = ("download", "train_teacher", "distill", "train_branchynet")


@pytest.fixture(scope="module")
def s3(tmp_path_factory) -> Iterator[str]:
    """An S3's address."""
    with servers.s3(tmp_path_factory.mktemp("s3")) as url:
        yield url


@pytest.fixture(scope="module")
def started(s3: str, tmp_path_factory) -> Iterator[Mlflow]:
    """One server for all tests: it takes half a minute to start."""
    with servers.postgres() as database:
        server = Mlflow(database, s3, tmp_path_factory.mktemp("mlflow"))
        server.start()
        try:
            yield server
        finally:
            server.kill()


@pytest.fixture
def shared(started: Mlflow, monkeypatch, tmp_path: Path) -> Mlflow:
    """The server, with this process signed in and standing in an empty repository."""
    for name in [key for key in os.environ if key.startswith(("AWS_", "DVC_", "MLFLOW_TRACKING"))]:
        monkeypatch.delenv(name)
    for name, value in started.variables().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return started


def epochs(count: int, factor: float = 1) -> list[tuple[int, float]]:
    """What `servers.work` logs."""
    return [(epoch, factor / epoch) for epoch in range(1, count + 1)]


def test_the_compose_file_pins_versions_and_holds_no_secret():
    text = COMPOSE.read_text()
    compose = yaml.safe_load(text)
    services = compose["services"].values()
    for service in services:
        assert re.search(r":\d+\.\d+", service["image"]), service["image"]
    pins = re.findall(r'"([^"]+==[^"]+)"', compose["x-mlflow"]["build"]["dockerfile_inline"])
    required = "".join(
        (ROOT / name).read_text() for name in ("requirements.txt", "requirements-team.txt")
    )
    assert f"mlflow[auth]=={compose['x-mlflow']['image'].split(':')[1]}" in pins
    for pin in pins:
        assert f"\n{pin} " in required, f"another version of {pin} is required"
    settings = [item for service in services for item in service.get("environment", {}).items()]
    secret = [value for key, value in settings if re.search("PASSWORD|SECRET|ACCESS_KEY", key)]
    assert len(secret) == 10
    for value in secret:
        assert re.fullmatch(r"\$\{[A-Z0-9_]+:\?set .+\}", value), value
    assert not re.search(r"://[^/\s@]+:[^/\s@]+@", text)
    ports = [service["ports"] for service in services if "ports" in service]
    assert ports == [["${MLFLOW_ADDRESS:-127.0.0.1}:${MLFLOW_PORT:-5000}:5000"]]


def test_two_pipelines_of_four_workers_lose_nothing(shared, experiment, tmp_path):
    count = 12
    workers, texts = [], []
    for name in ("calm-crane", "brave-otter"):
        folder = write_params(tmp_path / name, experiment.name)
        variables = shared.variables(DVC_EXP_NAME=name)
        workers += [fork(folder, variables, stage, count, 0.0) for stage in STAGES]
        texts += [folder / f"{stage}.txt" for stage in STAGES]
    for worker in workers:
        worker.join()
    said = re.sub(r"epoch \d+\n", "", "".join(map(Path.read_text, texts)))
    assert [worker.exitcode for worker in workers] == [0] * 8, said
    assert said == ""
    runs = experiment.runs
    names = sorted(parent.data.tags["DVC_EXP_NAME"] for parent in experiment.parents)
    assert names == ["brave-otter", "calm-crane"]
    for parent in experiment.parents:
        own = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
        assert sorted(child.data.tags["edgeke.stage"] for child in own) == sorted(STAGES)
        assert {c.data.tags["DVC_EXP_NAME"] for c in own} == {parent.data.tags["DVC_EXP_NAME"]}
        for child in own:
            assert experiment.history(child) == epochs(count)
            assert experiment.history(child, "validation/loss") == epochs(count, 2)
            assert child.data.metrics["validation/accuracy"] == 0.5
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_a_colleague_logs_into_the_same_experiment(shared, experiment, tmp_path):
    """With another password, which stands in the address and reaches no output and no file."""
    from mlflow.server import get_app_client

    folder = write_params(tmp_path, experiment.name)
    users = get_app_client("basic-auth", tracking_uri=shared.uri)
    users.create_user("colleague", "a-long-password-too")
    address = shared.uri.replace("://", "://colleague:a-long-password-too@")
    theirs = {"MLFLOW_TRACKING_URI": address}
    for stage, variables in (("download", shared.variables()), ("export", theirs)):
        worker = fork(folder, variables, stage, 1, 0.0)
        worker.join()
        assert worker.exitcode == 0, (folder / f"{stage}.txt").read_text()
    assert {run.info.status for run in experiment.runs} == {"FINISHED"}
    assert set(experiment.children) == {"download", "export"}
    assert len(experiment.parents) == 1
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert b"a-long-password-too" not in file.read_bytes(), file


def test_a_model_reaches_the_bucket_through_the_server(
    shared, loaded, experiment, models, s3, tmp_path
):
    from mlflow.artifacts import download_artifacts

    assert not [name for name in os.environ if name.startswith("AWS_")]
    shutil.copytree(models, tmp_path / "models")
    run_pipeline(loaded)
    name = experiment.parents[0].data.tags["edgeke.model"].partition("/")[0]
    version = experiment.client.get_model_version(name, "1")
    assert version.tags["edgeke.objections"] == ""
    stored = [key for key in servers.object_names(s3) if version.source.split("/")[-2] in key]
    assert [key for key in stored if key.endswith("/edgeke.int8.onnx")]
    fetched = Path(download_artifacts(f"models:/{name}/1")) / "artifacts" / "edgeke.int8.onnx"
    assert fetched.read_bytes() == (models / "edgeke.int8.onnx").read_bytes()


def test_a_wrong_password_is_refused_or_made_up_for_with_the_right_one(
    shared, experiment, tmp_path, monkeypatch, capfd
):
    names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    write_params(tmp_path, experiment.name)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
    with pytest.raises(InputError, match=names) as refused:
        stage_run("download", params.load()).__enter__()
    assert "\n" not in str(refused.value)

    write_params(tmp_path, experiment.name, "warn")
    variables = shared.variables(MLFLOW_TRACKING_PASSWORD="not-the-password")
    worker = fork(tmp_path, variables, "download", 3, 0.0)
    worker.join()
    said = (tmp_path / "download.txt").read_text()
    assert worker.exitcode == 0, said
    assert said.count("warning:") == said.count(names) == 1
    assert main() == 1
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", shared.password)
    assert main() == 0
    printed = capfd.readouterr()
    assert "not-the-password" not in str(refused.value) + said + printed.out + printed.err
    assert experiment.curve("download") == epochs(3)
    assert [run.info.status for run in experiment.runs] == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_a_killed_server_stops_no_training_and_gets_everything_later(shared, experiment, tmp_path):
    """Killed while requests are on their way; a second stage starts while it is away."""
    folder = write_params(tmp_path, experiment.name, "warn")
    during = fork(folder, shared.variables(), "distill", 60, 0.05)
    said = folder / "distill.txt"
    while not (said.exists() and "epoch 5\n" in said.read_text()):
        assert during.is_alive()
        time.sleep(0.01)
    shared.kill()
    during.join()
    assert during.exitcode == 0, said.read_text()
    assert "epoch 60\n" in said.read_text()
    assert said.read_text().count("warning:") == 1
    after = fork(folder, shared.variables(), "train_branchynet", 4, 0.0)
    after.join()
    assert after.exitcode == 0

    shared.start()
    assert main() == 0
    assert len(experiment.parents) == 1
    assert experiment.curve("distill") == epochs(60)
    assert experiment.curve("train_branchynet") == epochs(4)
    assert {run.info.status for run in experiment.runs} == {"FINISHED"}

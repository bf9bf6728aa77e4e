"""A shared server, for real: PostgreSQL, users, files in S3; and what happens while it is away."""

import os
import re
import shutil
import subprocess
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

pytestmark = [pytest.mark.xdist_group("server"), pytest.mark.filterwarnings("ignore:::mlflow")]

SLOTS = ("download", "train_teacher", "distill", "train_branchynet")


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


@pytest.fixture
def experiment(request) -> str:
    return request.node.name


def repository(folder: Path, experiment: str, on_failure: str = "fail") -> Path:
    """A folder whose runs land in an experiment of their own."""
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["tracking"].update(experiment=experiment, on_failure=on_failure)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    return folder


def client():
    from mlflow import MlflowClient

    return MlflowClient()


def runs(experiment: str) -> tuple[list, list]:
    """Parents and children."""
    found = client().search_runs([client().get_experiment_by_name(experiment).experiment_id])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    return parents, [run for run in found if run not in parents]


def curve(run: str, key: str = "train/loss") -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client().get_metric_history(run, key)]


def epochs(count: int, factor: float = 1) -> list[tuple[int, float]]:
    """What `servers.work` logs."""
    return [(epoch, factor / epoch) for epoch in range(1, count + 1)]


@pytest.fixture
def compose() -> dict:
    return yaml.safe_load(COMPOSE.read_text())


def test_every_service_has_a_health_check_a_volume_and_a_pinned_image(compose):
    services = compose["services"]
    jobs = {name for name, service in services.items() if service.get("restart") == "no"}
    assert jobs == {"bucket"}
    volumes = []
    for name, service in services.items():
        assert re.search(r":\d+\.\d+", service["image"]), service["image"]
        if name not in jobs:
            assert service["healthcheck"]["test"]
            volumes += [volume.split(":")[0] for volume in service["volumes"]]
    assert sorted(volumes) == sorted(compose["volumes"])
    pins = re.findall(r'"([^"]+==[^"]+)"', compose["x-mlflow"]["build"]["dockerfile_inline"])
    required = "".join(
        (ROOT / name).read_text() for name in ("requirements.txt", "requirements-team.txt")
    )
    assert len(pins) == 3
    for pin in pins:
        assert f"\n{pin} " in required, f"another version of {pin} is required"
    assert f"mlflow[auth]=={compose['x-mlflow']['image'].split(':')[1]}" in pins


def test_no_password_is_written_down_and_the_port_is_this_machines(compose):
    settings = [
        (key, value)
        for service in compose["services"].values()
        for key, value in service.get("environment", {}).items()
    ]
    secret = [value for key, value in settings if re.search("PASSWORD|SECRET|ACCESS_KEY", key)]
    assert len(secret) == 9 + 1
    for value in secret:
        assert re.fullmatch(r"\$\{[A-Z0-9_]+:\?set .+\}", value), value
    assert not re.search(r"://[^/\s@]+:[^/\s@]+@", COMPOSE.read_text())
    ports = [service["ports"] for service in compose["services"].values() if "ports" in service]
    assert ports == [["${MLFLOW_ADDRESS:-127.0.0.1}:${MLFLOW_PORT:-5000}:5000"]]


def test_docker_compose_takes_the_file_and_misses_every_secret(compose):
    docker = shutil.which("docker")
    plugin = docker and subprocess.run([docker, "compose", "version"], capture_output=True)
    if not plugin or plugin.returncode:
        pytest.skip("needs docker with its plugin compose")
    secrets = sorted(set(re.findall(r"\$\{([A-Z0-9_]+):\?", COMPOSE.read_text())))

    def config(variables: list[str]) -> "subprocess.CompletedProcess[str]":
        command = [docker, "compose", "-f", str(COMPOSE), "--env-file", "/dev/null", "config"]
        kept = {key: value for key, value in os.environ.items() if key not in secrets}
        given = {**kept, **dict.fromkeys(variables, "x" * 20)}
        return subprocess.run([*command, "-q"], env=given, capture_output=True, text=True)

    assert len(secrets) == 5
    assert config(secrets).returncode == 0, config(secrets).stderr
    for name in secrets:
        refused = config([other for other in secrets if other != name])
        assert refused.returncode != 0
        assert f"set {name}" in refused.stderr


def test_two_pipelines_of_four_workers_lose_nothing(shared, experiment, tmp_path):
    count = 12
    workers, texts = [], []
    for name in ("calm-crane", "brave-otter"):
        folder = repository(tmp_path / name, experiment)
        variables = shared.variables(DVC_EXP_NAME=name)
        workers += [fork(folder, variables, slot, count, 0.0) for slot in SLOTS]
        texts += [folder / f"{slot}.txt" for slot in SLOTS]
    for worker in workers:
        worker.join()
    said = re.sub(r"epoch \d+\n", "", "".join(map(Path.read_text, texts)))
    assert [worker.exitcode for worker in workers] == [0] * 8, said
    assert said == ""
    parents, children = runs(experiment)
    names = sorted(parent.data.tags["DVC_EXP_NAME"] for parent in parents)
    assert names == ["brave-otter", "calm-crane"]
    assert len(children) == 8
    for parent in parents:
        own = [c for c in children if c.data.tags["mlflow.parentRunId"] == parent.info.run_id]
        assert {child.data.tags["edgeke.slot"] for child in own} == set(SLOTS)
        assert {c.data.tags["DVC_EXP_NAME"] for c in own} == {parent.data.tags["DVC_EXP_NAME"]}
    for child in children:
        assert curve(child.info.run_id) == epochs(count)
        assert curve(child.info.run_id, "validation/loss") == epochs(count, 2)
        assert child.data.metrics["validation/accuracy"] == 0.5
    everyone = [*parents, *children]
    assert {run.info.status for run in everyone} == {"FINISHED"}
    assert not [run for run in everyone if "edgeke.killed" in run.data.tags]


def test_a_colleague_logs_into_the_same_experiment(shared, experiment, tmp_path):
    """With another password, which stands in the address and reaches no output and no file."""
    from mlflow.server import get_app_client

    folder = repository(tmp_path, experiment)
    users = get_app_client("basic-auth", tracking_uri=shared.uri)
    users.create_user("colleague", "a-long-password-too")
    address = shared.uri.replace("://", "://colleague:a-long-password-too@")
    theirs = {"MLFLOW_TRACKING_URI": address}
    for slot, variables in (("download", shared.variables()), ("export", theirs)):
        worker = fork(folder, variables, slot, 1, 0.0)
        worker.join()
        assert worker.exitcode == 0, (folder / f"{slot}.txt").read_text()
    (parent,), children = runs(experiment)
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}
    assert {child.data.tags["edgeke.slot"] for child in children} == {"download", "export"}
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert b"a-long-password-too" not in file.read_bytes(), file


def test_files_reach_the_bucket_through_the_server(shared, experiment, s3, tmp_path):
    assert not [name for name in os.environ if name.startswith("AWS_")]
    run = client().create_run(client().create_experiment(experiment)).info
    (tmp_path / "model.onnx").write_bytes(b"\0model" * 1000)
    client().log_artifact(run.run_id, str(tmp_path / "model.onnx"))
    assert run.artifact_uri.startswith("mlflow-artifacts:")
    stored = [name for name in servers.object_names(s3) if run.run_id in name]
    assert [Path(name).name for name in stored] == ["model.onnx"]
    fetched = client().download_artifacts(run.run_id, "model.onnx", str(tmp_path / "again"))
    assert Path(fetched).read_bytes() == b"\0model" * 1000


def test_a_wrong_password_is_refused_or_made_up_for_with_the_right_one(
    shared, experiment, tmp_path, monkeypatch, capfd
):
    names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    repository(tmp_path, experiment)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "not-the-password")
    with pytest.raises(InputError, match=names) as refused:
        stage_run("download", params.load()).__enter__()
    assert "\n" not in str(refused.value)

    repository(tmp_path, experiment, on_failure="warn")
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
    (parent,), (child,) = runs(experiment)
    assert curve(child.info.run_id) == epochs(3)
    assert {parent.info.status, child.info.status} == {"FINISHED"}


@pytest.mark.slow
def test_a_killed_server_stops_no_training_and_gets_everything_later(shared, experiment, tmp_path):
    """Killed while requests are on their way; a second stage starts while it is away."""
    folder = repository(tmp_path, experiment, on_failure="warn")
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
    (parent,), children = runs(experiment)
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    lengths = {"distill": 60, "train_branchynet": 4}
    assert {child.data.tags["edgeke.slot"] for child in children} == set(lengths)
    for child in children:
        assert curve(child.info.run_id) == epochs(lengths[child.data.tags["edgeke.slot"]])
        assert child.data.metrics["validation/accuracy"] == 0.5
    assert {run.info.status for run in [parent, *children]} == {"FINISHED"}

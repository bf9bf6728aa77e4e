"""Servers to test against, started from packages: PostgreSQL, an S3, MLflow with users.

Each is a context manager that ends what it started. `work` is a stage in a process of its own.
"""

import contextlib
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from toys import ROOT

COMPOSE = ROOT / "mlflow" / "compose.yaml"
BUCKET = "edgeke"
KEYS = {
    "AWS_ACCESS_KEY_ID": "tester",
    "AWS_SECRET_ACCESS_KEY": "tester-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}
_AWAY = ("AWS_", "DVC_", "MLFLOW_", "PG")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(more: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what it says about stores, and with `more`."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(_AWAY)}
    return {**kept, "MLFLOW_DISABLE_TELEMETRY": "true", **more}


def answers(url: str) -> bool:
    """Whether a web address answers, be it with an error."""
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except urllib.error.HTTPError as error:
        error.close()
        return error.code < 500
    except OSError:
        return False


@dataclass
class _Child:
    """A process with its children, which go when it goes; what it says is in `log`."""

    command: list[str]
    environment: Mapping[str, str]
    url: str
    log: Path
    process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=environment(self.environment),
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = time.monotonic()
        while not answers(self.url):
            ended = self.process.poll() is not None
            if ended or time.monotonic() - started > 180:
                self.kill()
                pytest.fail(f"{self.command[0]} did not start:\n{self.log.read_text()[-6000:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """SIGKILL, for it and all its children."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextlib.contextmanager
def postgres() -> Iterator[dict[str, str]]:
    """PostgreSQL with an empty database `mlflow`: its address and password as libpq reads them."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("needs PostgreSQL's programs (Debian: postgresql)")
    user: list[str] = []
    if os.geteuid() == 0:  # which PostgreSQL refuses to run as
        try:
            owner = pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("needs the user postgres, since root may not run PostgreSQL")
        user = ["runuser", "-u", "postgres", "--"]
    # Not below tmp_path: only its owner may enter that, and sockets want short names.
    folder = Path(tempfile.mkdtemp(prefix="edgeke-pg-"))
    try:
        (folder / "password").write_text("pg-secret")
        for path in (folder, folder / "password"):
            if user:
                os.chown(path, owner.pw_uid, owner.pw_gid)
        programs, data, port = found[-1].parent, folder / "data", free_port()

        def call(program: str, *arguments: object) -> None:
            command = [*user, str(programs / program), *map(str, arguments)]
            done = subprocess.run(
                command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                env=environment({"PGPASSWORD": "pg-secret"}), check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout

        call(
            "initdb", "--pgdata", data, "--username", "mlflow", "--auth", "scram-sha-256",
            "--pwfile", folder / "password", "--encoding", "UTF8", "--no-sync",
        )  # fmt: skip
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        log = folder / "log"
        call("pg_ctl", "start", "-w", "-D", data, "-l", log, "-o", options)
        try:
            address = ("-h", "127.0.0.1", "-p", port, "-U", "mlflow")
            call("createdb", *address, "mlflow")
            uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/mlflow"
            yield {"uri": uri, "PGPASSWORD": "pg-secret"}
        finally:
            call("pg_ctl", "stop", "-m", "immediate", "-D", data)
    finally:
        shutil.rmtree(folder)


@contextlib.contextmanager
def s3(folder: Path) -> Iterator[str]:
    """The address of a server that speaks S3, with one bucket; it keeps its objects in memory."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = _Child(command, KEYS, url, folder / "s3.log")
    try:
        server.start()
        _client(url).create_bucket(Bucket=BUCKET)
        yield url
    finally:
        server.kill()


def object_names(url: str) -> list[str]:
    """What lies in the bucket."""
    pages = _client(url).get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return [found["Key"] for page in pages for found in page.get("Contents", ())]


def _client(url: str):
    import boto3

    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name=KEYS["AWS_DEFAULT_REGION"],
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )


class Mlflow(_Child):
    """The tracking server of mlflow/compose.yaml: its command, its variables, its users' file."""

    user, password = "admin", "a-long-admin-password"

    def __init__(self, database: Mapping[str, str], store: str, folder: Path) -> None:
        compose = yaml.safe_load(COMPOSE.read_text())
        service, port = compose["services"]["mlflow"], free_port()
        addresses = {
            "postgresql+psycopg2://mlflow@postgres/mlflow": database["uri"],
            "s3://mlflow": f"s3://{BUCKET}/mlflow",
            "0.0.0.0": "127.0.0.1",
            "--port=5000": f"--port={port}",
            "${MLFLOW_WORKERS:-4}": "2",
            "${MLFLOW_HOSTS:-localhost:*,127.0.0.1:*}": "localhost:*,127.0.0.1:*",
        }

        def here(text: str) -> str:
            for there, replaced in addresses.items():
                text = text.replace(there, replaced)
            return text

        users = folder / "users.ini"
        users.write_text(here(compose["configs"]["users"]["content"]))
        values = {
            **KEYS,
            "PGPASSWORD": database["PGPASSWORD"],
            "MLFLOW_S3_ENDPOINT_URL": store,
            "MLFLOW_AUTH_CONFIG_PATH": str(users),
            "MLFLOW_AUTH_ADMIN_USERNAME": self.user,
            "MLFLOW_AUTH_ADMIN_PASSWORD": self.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "the-same-for-all-workers",
        }
        variables = {key: values.get(key, value) for key, value in service["environment"].items()}
        command = [sys.executable, "-m", *map(here, service["command"])]
        left = [text for text in [*command, *variables.values()] if "${" in text]
        assert not left, f"variables of mlflow/compose.yaml that the tests do not set: {left}"
        self.uri = f"http://127.0.0.1:{port}"
        super().__init__(command, variables, f"{self.uri}/health", folder / "mlflow.log")

    def variables(self, **more: str) -> dict[str, str]:
        """What a user of the server sets."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": self.user,
            "MLFLOW_TRACKING_PASSWORD": self.password,
            **more,
        }


def work(folder: Path, variables: Mapping[str, str], stage: str, epochs: int, pause: float) -> None:
    """One stage of `params.yaml` in `folder`: its epochs, then its files. Prints to `<stage>.txt`.

    Runs in a process of its own, which `fork` starts.
    """
    for key in [key for key in os.environ if key.startswith(_AWAY)]:
        del os.environ[key]
    os.environ.update(environment(variables))
    os.chdir(folder)
    said = os.open(f"{stage}.txt", os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(said, stream.fileno())
    from edgeke import params
    from edgeke.files import write_json, write_table
    from edgeke.tracking.runs import stage_run

    rows = [
        {"epoch": epoch, "train/loss": 1 / epoch, "validation/loss": 2 / epoch}
        for epoch in range(1, epochs + 1)
    ]
    with stage_run(stage, params.load()) as run:
        for row in rows:
            epoch = int(row["epoch"])
            run.epoch(epoch, {key: value for key, value in row.items() if key != "epoch"})
            print(f"epoch {epoch}", flush=True)
            time.sleep(pause)
        write_table(Path("results") / stage / "history.csv", rows)
        write_json(Path("results") / stage / "metrics.json", {"validation/accuracy": 0.5})


def fork(*arguments: object) -> "multiprocessing.process.BaseProcess":
    """`work` in a new process; MLflow, which takes seconds to import, is imported once for all."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mlflow", "edgeke.tracking.runs"])
    started = context.Process(target=work, args=arguments)
    started.start()
    return started

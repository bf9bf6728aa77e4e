"""The MLflow store: its lock, one short attempt to reach it, errors without secrets."""

import contextlib
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgeke.errors import InputError
from edgeke.files import repository

if TYPE_CHECKING:
    from mlflow import MlflowClient

# Set whatever the user did: what is logged in the background is lost with the process.
_SETTINGS = {"MLFLOW_ENABLE_ASYNC_LOGGING": "false"}
# Set unless the user did. A server that hangs costs two attempts of ten seconds; MLflow's own
# defaults are eight of two minutes.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the address may hold a password
    "PGCONNECT_TIMEOUT": "10",
}
_PLACES = (  # where MLflow's tables hold addresses of files
    "experiments.artifact_location",
    "runs.artifact_uri",
    "logged_models.artifact_location",
    "model_versions.source",
    "model_versions.storage_location",
)
_WAITS = (10, 50)  # seconds of waiting for the lock: until its holder is named, and then
_REMEDIES = {  # by what stands in the error; the first that fits
    "database schema": "its tables are another MLflow's: back it up, then `mlflow db upgrade` it "
    "where it is older, or `pip install` the MLflow that wrote it where it is newer",
    r"\b(401|403)\b|not authenticated|[Pp]ermission denied": "set MLFLOW_TRACKING_USERNAME and "
    "MLFLOW_TRACKING_PASSWORD to a user who may write there",
    "disk is full|No space left": "free space on its disk",
    "": "start or repair it, or point MLFLOW_TRACKING_URI to another",
}


def folder() -> Path:
    """The folder of the store's file and its lock: `mlflow/` in the repository."""
    return repository() / "mlflow"


def store_uri() -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the SQLite file in the repository.

    A relative file is one of the repository's, not of the copies that experiments run in.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder() / 'mlflow.db'}"
    relative = re.fullmatch(r"(sqlite[\w+]*:///)(?!/|\w:|:memory:|file:)(.+)", uri)
    return f"{relative[1]}{repository() / relative[2]}" if relative else uri


def is_installed() -> bool:
    """Whether MLflow is there; imports it, with defaults that suit a stage."""
    os.environ.update(_SETTINGS)
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for logger in ("mlflow.store", "mlflow.system_metrics", "mlflow.pyfunc"):
        # They print tracebacks, with addresses in full; we say the same in one line.
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    try:
        import mlflow
    except ModuleNotFoundError as error:
        if error.name != "mlflow":
            raise
        return False
    return mlflow.__file__ is not None  # the repository's folder mlflow/ looks like a package


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One process at a time on the repository's store; says who it waits for after ten seconds.

    Errors: InputError that names the process when the lock is not free after a minute.
    """
    from filelock import FileLock, Timeout

    folder().mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder() / ".lock"), folder() / ".lock-owner"
    for seconds in _WAITS:
        with contextlib.suppress(Timeout):
            lock.acquire(timeout=seconds)
            break
        holder = owner.read_text() if owner.is_file() else "another process"
        print(f"waiting for {holder}, which holds {lock.lock_file}", file=sys.stderr)
    else:
        raise InputError(f"{holder} still holds {lock.lock_file}; end that process if it hangs")
    try:
        with contextlib.suppress(OSError):  # a full disk
            owner.write_text(f"process {os.getpid()} on {platform.node()} ({sys.argv[0]})")
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def connected() -> Iterator["MlflowClient"]:
    """A client of the store, which has answered once; what the store raises says what to do.

    A store that does not answer is noticed within about 20 seconds. Errors: InputError.
    """
    is_installed()
    try:
        from mlflow import MlflowClient

        # The first process on a fresh SQLite file creates its tables; a second one would collide.
        with locked():
            _try_database(store_uri())
            # Both named: MLFLOW_REGISTRY_URI may be another project's.
            client = MlflowClient(store_uri(), store_uri())
            client.search_experiments(max_results=1)
            if store_uri() == f"sqlite:///{folder() / 'mlflow.db'}":
                _follow_project()
        yield client
    except Exception as error:  # MLflow passes on whatever its store raises
        raise refusal(error) from error


def _try_database(uri: str) -> None:
    """Open a database once; MLflow would try for 110 seconds. Raises what SQLAlchemy raises."""
    file = re.match(r"sqlite[\w+]*:///(/[^?]+)", uri)
    if file and not Path(file[1]).exists():
        with contextlib.suppress(OSError):  # SQLite says why
            Path(file[1]).touch(0o666)  # follows the umask; what SQLite makes, no group may write
    if re.match(r"(sqlite|postgresql|mysql|mssql)\b", uri):
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        sqlalchemy.inspect(engine).get_table_names()


def _follow_project() -> None:
    """Where the project was moved or copied, let the store name its files where they are now.

    MLflow keeps absolute addresses and has no command that changes them.
    """
    import sqlite3

    now = (folder() / "artifacts").as_uri()
    with contextlib.closing(sqlite3.connect(folder() / "mlflow.db")) as database, database:
        found = database.execute("select distinct artifact_location from experiments").fetchall()
        for (before,) in found:
            if before == now or not re.match("file:///.*/mlflow/artifacts$", before or ""):
                continue
            for place in _PLACES:
                table, column = place.split(".")
                database.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) "
                    f"where {column} = ? or substr({column}, 1, ?) = ?",
                    (now, len(before) + 1, before, len(before) + 1, f"{before}/"),
                )
            print(f"the project moved: its files in MLflow are now those below {now}", flush=True)


def open_experiment(client: "MlflowClient", name: str) -> str:
    """The id of an experiment, made when absent; one that was deleted in the UI is restored."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = store_uri().startswith("sqlite")  # files not in the copy, which DVC deletes
        location = (folder() / "artifacts").as_uri() if local else None
        try:
            return str(client.create_experiment(name, artifact_location=location))
        except Exception:
            # Another machine may just have made it: our lock ends at this repository.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        print(f"the experiment {name} had been deleted in MLflow; it is restored", flush=True)
    return str(experiment.experiment_id)


def refusal(error: Exception) -> InputError:
    """What to do about a store that fails, in one line without secrets; an InputError stays.

    Libraries cite addresses in pieces. So where the store's holds a secret, the error's type is
    all that is shown of it.
    """
    if isinstance(error, InputError):
        return error
    uri, message = store_uri(), str(error).strip() or type(error).__name__
    remedy = next(text for words, text in _REMEDIES.items() if re.search(words, message))
    place, cause = public(uri), message.splitlines()[0]
    if place != uri:
        cause = type(error).__name__
    cause = re.sub(r"[\w.+-]+://[^\s'\"<>]+", lambda address: public(address[0]), cause)
    return InputError(f"the tracking store {place} does not answer ({cause}); {remedy}")


def public(uri: str) -> str:
    """What of an address may be shown: not the user, which can be a token, password and query.

    Parsers disagree about passwords that hold `/`, `@` or `?`. So the last `@` ends the password,
    and where it comes after a question mark nothing is shown.
    """
    parts = re.fullmatch(r"([\w.+-]+://)?(?:[^?#]*@)?([^?#@]*)(?:[?#][^@]*)?", uri)
    return (parts[1] or "") + parts[2] if parts else "***"

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
from urllib.parse import unquote

from edgeke.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

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
_SECRETS = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "PGPASSWORD")
_SAY_AFTER, _GIVE_UP_AFTER = 10.0, 60.0  # seconds of waiting for the lock


def project_root() -> Path:
    """The repository the store belongs to: DVC's root while DVC runs us, else the working folder.

    Queued and `--temp` experiments run in a copy; `DVC_ROOT` still names the real repository.
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def folder(root: Path) -> Path:
    """The folder of the store's file and its lock."""
    return (root / "mlflow").resolve()


def store_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the SQLite file in the repository."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder(root) / 'mlflow.db'}"


def is_installed() -> bool:
    """Whether MLflow is there; imports it, with defaults that suit a stage."""
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
def locked(root: Path) -> Iterator[None]:
    """One process at a time on the store of `root`; says who it waits for after ten seconds.

    Errors: InputError that names the process when the lock is not free after a minute.
    """
    from filelock import FileLock, Timeout

    folder(root).mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder(root) / ".lock"), folder(root) / ".lock-owner"

    def holder() -> str:
        return owner.read_text() if owner.is_file() else "another process"

    try:
        lock.acquire(timeout=_SAY_AFTER)
    except Timeout:
        print(f"waiting for {holder()}, which holds {lock.lock_file}", file=sys.stderr)
        try:
            lock.acquire(timeout=_GIVE_UP_AFTER - _SAY_AFTER)
        except Timeout:
            waited = f"{holder()} has held {lock.lock_file} for {_GIVE_UP_AFTER:.0f} s"
            raise InputError(f"{waited}; end that process if it hangs") from None
    try:
        with contextlib.suppress(OSError):  # a full disk
            owner.write_text(f"process {os.getpid()} on {platform.node()} ({sys.argv[0]})")
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def connected(root: Path) -> Iterator["MlflowClient"]:
    """A client of the store, which has answered once; what the store raises says what to do.

    A store that does not answer is noticed within about 20 seconds. Errors: InputError.
    """
    is_installed()
    try:
        from mlflow import MlflowClient

        # The first process on a fresh SQLite file creates its tables; a second one would collide.
        with locked(root):
            _try_database(store_uri(root))
            client = MlflowClient(store_uri(root))
            client.search_experiments(max_results=1)
        yield client
    except InputError:
        raise
    except Exception as error:  # MLflow passes on whatever its store raises
        raise refusal(root, error) from error


def _try_database(uri: str) -> None:
    """Open a database once; MLflow would try for 110 seconds. Raises what SQLAlchemy raises."""
    if re.match(r"(sqlite|postgresql|mysql|mssql)\b", uri):
        import sqlalchemy

        engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool)
        sqlalchemy.inspect(engine).get_table_names()


def open_experiment(client: "MlflowClient", name: str, root: Path) -> str:
    """The id of an experiment, made when absent; one that was deleted in the UI is restored."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        local = store_uri(root).startswith("sqlite")  # also from a copy that DVC deletes
        location = (folder(root) / "artifacts").as_uri() if local else None
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


def refusal(root: Path, error: Exception) -> InputError:
    """What to do about a store that fails, in one line without secrets."""
    uri, message = store_uri(root), str(error).strip() or type(error).__name__
    if "database schema" in message:
        remedy = (
            "its tables are another MLflow's: back it up, then `mlflow db upgrade` it where it is "
            "older, or `pip install` the MLflow that wrote it where it is newer"
        )
    elif re.search(r"\b(401|403)\b|not authenticated|[Pp]ermission denied", message):
        names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        remedy = f"set {names} to a user who may write there"
    elif "disk is full" in message or "No space left" in message:
        remedy = "free space on its disk"
    else:
        remedy = "start or repair it, or point MLFLOW_TRACKING_URI to another"
    cause = without_secrets(message.splitlines()[0], uri)
    place = "".join(_parts(uri)[:2])
    return InputError(f"the tracking store {place} does not answer ({cause}); {remedy}")


def without_secrets(text: str, uri: str) -> str:
    """A text without what may be secret in the store's address `uri` or in any other address.

    User names count as secrets, since a token can stand there, and so does the query. Libraries
    cite addresses in pieces, so each word of what is secret is blanked wherever it stands.
    """
    for address in (re.escape(uri), r"[\w.+-]+://[^\s'\"<>]+"):
        text = re.sub(address, lambda match: "".join(_parts(match[0])[:2]), text)
    removed = " ".join(_parts(uri)[2:])
    words = set(re.split(r"[\s:/@?&=#,;]+", f"{removed} {unquote(removed)}"))
    words |= {os.environ.get(name, "") for name in _SECRETS}
    for word in sorted(words - {""}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "***", text)
    return text


def _parts(uri: str) -> tuple[str, str, str, str]:
    """An address as scheme, place, user with password, query.

    Parsers disagree about passwords that hold `/`, `@` or `?`, so the last `@` ends the password,
    and where it comes after a question mark all of the address counts as secret.
    """
    scheme, separator, rest = uri.partition("://") if "://" in uri else ("", "", uri)
    before = re.split(r"[?#]", rest, maxsplit=1)[0]
    query = rest[len(before) :]
    if rest.startswith("/"):  # a file: nobody signs in
        return scheme + separator, before, "", query
    if "@" in query:
        return scheme + separator, "***", before, query
    user, _, place = before.rpartition("@")
    return scheme + separator, place, user, query

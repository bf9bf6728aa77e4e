"""The store that runs land in: found, opened by one process at a time, refused in one line."""

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from edgeke.errors import InputError

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "connect",
    "folder",
    "locked",
    "open_experiment",
    "project_root",
    "reason",
    "redacted",
    "refusal",
    "store_uri",
]

# A server that went away must not hold up training for minutes; both can be set from outside.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}


def project_root() -> Path:
    """The repository the store belongs to: DVC's root while DVC runs us, else the folder we are in.

    Queued and `--temp` experiments run in a copy; `DVC_ROOT` still names the real repository.
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def folder(root: Path) -> Path:
    """Where the store's file, its lock and unsent messages lie."""
    return (root / "mlflow").resolve()


def store_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the SQLite file in the repository."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{folder(root) / 'mlflow.db'}"


def locked(root: Path) -> AbstractContextManager[object]:
    """One process at a time on the store of `root`; the thread that holds it may ask again."""
    from filelock import FileLock

    folder(root).mkdir(parents=True, exist_ok=True)
    return FileLock(folder(root) / ".lock", timeout=120, is_singleton=True)


def connect(root: Path) -> "MlflowClient":
    """A client of the store, which has answered once.

    Errors: InputError saying what is wrong with the store and what to do.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    uri = store_uri(root)
    try:
        # The first process on a fresh SQLite file creates its tables; a second one would collide.
        with locked(root):
            client = MlflowClient(uri)
            client.search_experiments(max_results=1)
        return client
    except Exception as error:  # MLflow passes on whatever its store raises
        raise refusal(root, error) from error


def open_experiment(client: "MlflowClient", name: str, root: Path) -> str:
    """The id of an experiment, made when absent; one that was deleted in the UI is restored."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
            print(f"the experiment {name} had been deleted in MLflow; it is restored", flush=True)
        return str(found.experiment_id)
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    location = (folder(root) / "artifacts").as_uri() if local else None
    try:
        return str(client.create_experiment(name, artifact_location=location))
    except Exception:
        # Another machine may just have made it: our lock ends at this repository.
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)


def refusal(root: Path, error: Exception) -> InputError:
    """What to do about a store that does not do what it is asked to, in one line."""
    return InputError(
        f"the tracking store {redacted(store_uri(root))} does not answer ({reason(error)}); "
        f"{_remedy(str(error))}, or run with -S tracking.on_failure=warn (sent later) or "
        "-S tracking.enabled=false (not at all)"
    )


def reason(error: Exception) -> str:
    """An error's first line, without what SQLAlchemy and passwords in addresses add to it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redacted(lines[0])


def redacted(text: str) -> str:
    """A text without the passwords in its addresses: for logs, and for files that stay."""
    return re.sub(r"(://[^:/@\s]+):[^@/\s]+@", r"\1:***@", text)


def _remedy(message: str) -> str:
    if "database schema" in message:
        return (
            "its tables are another MLflow's: back it up, then `mlflow db upgrade` it where it is "
            "older, or `pip install` the MLflow that wrote it where it is newer"
        )
    if re.search(r"\b(401|403)\b|not authenticated|[Pp]ermission denied", message):
        names = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        return f"set {names} to a user who may write there"
    if "disk is full" in message or "No space left" in message:
        return "free space on its disk"
    return "mend it, or point MLFLOW_TRACKING_URI elsewhere"

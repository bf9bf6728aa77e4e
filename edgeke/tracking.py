"""MLflow: one parent run per pipeline state, one child per stage; and a twin that does nothing.

The parent is found, not passed: its tag `edgeke.state` is a hash of the parameters, the code that
dvc.yaml lists and the DVC experiment's name, so that every stage of one pipeline state, whichever
process runs it, meets at the same parent.
"""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeke.errors import InputError
from edgeke.files import read_json, write_json
from edgeke.params import Params

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Run", "flatten", "pipeline_state", "project_root", "stage_run", "store_uri"]

_STATE = "edgeke.state"
_DVC_TAGS = ("DVC_STAGE", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV")


class Run(Protocol):
    """Where a stage reports to."""

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        """One row of a training curve."""

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """The stage's final metrics."""

    def headline(self, metrics: Mapping[str, float]) -> None:
        """The pipeline's metrics, on the parent run; completes it."""


class _NoRun:
    """Tracking off."""

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        return

    def metrics(self, metrics: Mapping[str, float]) -> None:
        return

    def headline(self, metrics: Mapping[str, float]) -> None:
        return


class _MlflowRun:
    """One child run; every call names its run, nothing global is touched."""

    def __init__(self, client: "MlflowClient", parent: str, child: str, slot: str) -> None:
        self.client, self.parent, self.child, self.slot = client, parent, child, slot
        self.lost = False

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        self._log(self.child, row, epoch)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self._log(self.child, metrics, 0)

    def headline(self, metrics: Mapping[str, float]) -> None:
        self._log(self.parent, metrics, 0)
        for file in sorted(Path("results").glob("**/run.json")):
            known, slot = read_json(file), file.parent.relative_to("results").as_posix()
            other = known["run_id"] and known["parent_run_id"] != self.parent
            if other and slot != self.slot:  # our own note is still that of the run before
                tag = (self.parent, f"edgeke.restored.{slot}", known["run_id"])
                self._send(partial(self.client.set_tag, *tag))

    def _log(self, run: str, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [
            Metric(_metric_name(key), float(value), now, step) for key, value in values.items()
        ]
        for start in range(0, len(metrics), 1000):  # MLflow's limit for one batch
            self._send(partial(self.client.log_batch, run, metrics[start : start + 1000]))

    def end(self, status: str) -> None:
        """End child and parent: which stage is the last one is DVC's to decide."""
        for run_id in (self.child, self.parent):
            self._send(partial(self.client.set_terminated, run_id, status))

    def _send(self, call: Callable[[], object]) -> None:
        """A store that stops answering must not cost a training: say so once, and go on."""
        if self.lost:
            return
        try:
            call()
        except Exception as error:  # MLflow passes on whatever its store raises
            self.lost = True
            reason = str(error).splitlines()[0]
            print(
                f"warning: the tracking store stopped answering ({reason}); the stage goes on, "
                "the rest of its run is not logged",
                file=sys.stderr,
            )


def project_root() -> Path:
    """The repository the store belongs to: DVC's root while DVC runs us, else the folder we are in.

    Queued and `--temp` experiments run in a copy; `DVC_ROOT` still names the real repository.
    """
    return Path(os.environ.get("DVC_ROOT") or Path.cwd())


def store_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` where it is set, else the SQLite file in the repository."""
    given = os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{(root / 'mlflow' / 'mlflow.db').resolve()}"


def pipeline_state(params: Params) -> str:
    """A hash that is the same for all stages of one pipeline state."""
    digest = hashlib.sha256(json.dumps(flatten(params), sort_keys=True).encode())
    digest.update(os.environ.get("DVC_EXP_NAME", "").encode())
    if params.profile.data.source == "image_folder":
        for file in sorted(Path(params.data.path).rglob("*")):
            facts = file.stat()
            digest.update(f"{file} {facts.st_size} {facts.st_mtime_ns}".encode())
    for file in _listed_code(Path("dvc.yaml")):
        digest.update(str(file).encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def flatten(params: Params) -> dict[str, str | int | float | bool]:
    """One flat dictionary, as MLflow shows parameters: `kd.beta`, `student.width`, ..."""
    flat: dict[str, str | int | float | bool] = {}

    def add(value: Any, key: str) -> None:
        if hasattr(value, "__dataclass_fields__"):
            for field in fields(value):
                name = "" if field.name == "profile" else field.name
                add(getattr(value, field.name), f"{key}.{name}".strip("."))
        elif value is None:
            flat[key] = "null"
        elif isinstance(value, tuple):
            flat[key] = ", ".join(map(str, value))
        else:
            flat[key] = value

    add(params, "")
    flat["profile"] = flat.pop("profile_name")
    return flat


@contextlib.contextmanager
def stage_run(slot: str, params: Params) -> Iterator[Run]:
    """The run of one stage: `slot` is its results folder, such as `distill/0`.

    Writes `results/<slot>/run.json`. Yields a twin that does nothing when `tracking.enabled` is
    false or MLflow is not installed. Errors: InputError when the store cannot be reached.
    """
    note = Path("results") / slot / "run.json"
    first = not int(os.environ.get("RANK", "0"))  # of the processes that train together
    client = _connect(params, project_root()) if params.tracking.enabled and first else None
    if client is None:
        yield _NoRun()
        write_json(note, {"run_id": None, "parent_run_id": None})
        return
    name = slot.replace("/", "@")
    experiment, parent = _find_parent(client, params, project_root())
    tags = {"mlflow.parentRunId": parent, "mlflow.runName": name, **_tags(params)}
    child = client.create_run(experiment, tags=tags).info.run_id
    run, status = _MlflowRun(client, parent, child, slot), "FAILED"
    try:
        yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.end(status)
    write_json(note, {"run_id": child, "parent_run_id": parent})


def _metric_name(key: str) -> str:
    """The key with what MLflow refuses spelt as code points: classes are named by users."""
    return re.sub(r"[^\w\-. :/]", lambda found: f"-u{ord(found[0]):x}-", key)[:250]


def _connect(params: Params, root: Path) -> "MlflowClient | None":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        from mlflow import MlflowClient
    except ModuleNotFoundError as error:
        if error.name != "mlflow":
            raise
        return None
    uri = store_uri(root)
    try:
        # The first process on a fresh SQLite file creates its tables; a second one would collide.
        with _store_lock(root):
            client = MlflowClient(uri)
            found = client.get_experiment_by_name(params.tracking.experiment)
            if found is not None and found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
        return client
    except Exception as error:  # MLflow passes on whatever its store raises
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the tracking store {uri} does not answer ({reason}); mend it, point "
            "MLFLOW_TRACKING_URI elsewhere, or run with -S tracking.enabled=false"
        ) from error


def _find_parent(client: "MlflowClient", params: Params, root: Path) -> tuple[str, str]:
    """The ids of the experiment and of this pipeline state's parent run, made when absent."""
    name, state = params.tracking.experiment, pipeline_state(params)
    with _store_lock(root):
        found = client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else _create_experiment(client, name, root)
        runs = client.search_runs([experiment], f"tags.`{_STATE}` = '{state}'", max_results=1)
        if runs:
            parent = str(runs[0].info.run_id)
            client.update_run(parent, status="RUNNING")
            return experiment, parent
        tags = {**_tags(params), _STATE: state, "mlflow.runName": _parent_name(params)}
        del tags["DVC_STAGE"]
        parent = str(client.create_run(experiment, tags=tags).info.run_id)
        from mlflow.entities import Param

        values = [Param(key, str(value)) for key, value in flatten(params).items()]
        client.log_batch(parent, params=values)
    return experiment, parent


def _create_experiment(client: "MlflowClient", name: str, root: Path) -> str:
    local = not os.environ.get("MLFLOW_TRACKING_URI")
    location = (root / "mlflow" / "artifacts").resolve().as_uri() if local else None
    return str(client.create_experiment(name, artifact_location=location))


def _parent_name(params: Params) -> str:
    kd = params.kd
    parts = [params.profile_name, kd.distance, params.branchynet.order, f"b{kd.beta:g}"]
    return "-".join([*parts, *filter(None, [os.environ.get("DVC_EXP_NAME")])])


def _tags(params: Params) -> dict[str, str]:
    tags = {key: os.environ.get(key, "") for key in _DVC_TAGS}
    tags["profile"] = params.profile_name
    commit = _git("rev-parse", "HEAD")
    if commit:
        tags["mlflow.source.git.commit"] = commit
        # DVC itself changes params.yaml, dvc.lock and results/: only code says something.
        changed = _git("status", "--porcelain", "--", "edgeke", "stages", "dvc.yaml")
        tags["edgeke.dirty"] = str(bool(changed)).lower()
    return {key: value for key, value in tags.items() if value or key == "DVC_STAGE"}


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _store_lock(root: Path) -> Any:
    from filelock import FileLock

    (root / "mlflow").mkdir(exist_ok=True)
    return FileLock(root / "mlflow" / ".lock", timeout=120)


def _listed_code(dvc_yaml: Path) -> list[Path]:
    """The project's own code among the deps in dvc.yaml; none where there is no dvc.yaml."""
    import yaml

    if not dvc_yaml.is_file():
        return []
    stages = yaml.safe_load(dvc_yaml.read_text())["stages"].values()
    listed = {dep for stage in stages for dep in stage.get("do", stage).get("deps", [])}
    found: set[Path] = set()
    for path in map(Path, listed):
        if path.parts[0] in ("edgeke", "stages"):
            found |= set(path.rglob("*.py")) if path.is_dir() else {path}
    return sorted(found)

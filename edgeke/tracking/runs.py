"""One parent run per pipeline state, one child per stage; and a twin that does nothing.

The parent is found, not passed: its tag `edgeke.state` is a hash of the parameters, the code that
dvc.yaml lists and the DVC experiment's name, so that every stage of one pipeline state, whichever
process runs it, meets at the same parent.
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeke.errors import InputError
from edgeke.files import read_json, write_json
from edgeke.params import Params
from edgeke.tracking import processes, state
from edgeke.tracking.outbox import Address, Outbox, resend
from edgeke.tracking.store import (
    connect,
    locked,
    open_experiment,
    project_root,
    reason,
    refusal,
    store_uri,
)
from edgeke.tracking.system import watched

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Run", "create_runs", "end_dead_runs", "stage_run"]

_ENDED_EARLY = ("KILLED", "FAILED")


class Run(Protocol):
    """Where a stage reports to."""

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        """One row of a training curve."""

    def metrics(self, metrics: Mapping[str, float]) -> None:
        """The stage's final metrics."""

    def headline(self, metrics: Mapping[str, float]) -> None:
        """The pipeline's metrics, on the parent run; completes it."""

    def model(self, models: Path) -> None:
        """The one-file model in a folder of models, as what MLflow serves and registers."""


class _NoRun:
    """Tracking off."""

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        return

    def metrics(self, metrics: Mapping[str, float]) -> None:
        return

    def headline(self, metrics: Mapping[str, float]) -> None:
        return

    def model(self, models: Path) -> None:
        return


class _MlflowRun:
    """One child run; every message names its run, nothing global is touched."""

    def __init__(self, outbox: Outbox, slot: str, params: Params) -> None:
        self.outbox, self.slot, self.params = outbox, slot, params
        self.last = 0  # epoch: the final metrics belong to it, not to a point before the curve

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        self.last = epoch
        self.log("child", row, epoch)

    def metrics(self, metrics: Mapping[str, float]) -> None:
        self.log("child", metrics, self.last)

    def headline(self, metrics: Mapping[str, float]) -> None:
        self.log("parent", metrics, 0)
        tags = {}
        for file in sorted(Path("results").glob("**/run.json")):
            known, slot = read_json(file), file.parent.relative_to("results").as_posix()
            other = known["run_id"] and known["parent_run_id"] != self.outbox.address.parent
            if other and slot != self.slot:  # our own note is still that of the run before
                tags[f"edgeke.restored.{slot}"] = known["run_id"]
        if tags:
            self.outbox.post({"to": "parent", "tags": tags})

    def model(self, models: Path) -> None:
        from edgeke.tracking.models import log_model

        try:
            if self.outbox.client is None or self.outbox.kept:
                raise InputError("the tracking store is away")
            log_model(self.outbox.address, models, self.params)
        except Exception as error:  # MLflow passes on whatever its store raises
            print(
                f"warning: the model was not logged ({reason(error)}); `dvc repro --single-item "
                "--force evaluate` logs it",
                file=sys.stderr,
            )

    def log(self, to: str, values: Mapping[str, float], step: int) -> None:
        """Metrics of one moment."""
        now = int(time.time() * 1000)
        rows = [[_metric_name(key), float(value), now, step] for key, value in values.items()]
        self.outbox.post({"to": to, "metrics": rows})

    def end(self, status: str) -> None:
        """End child and parent: which stage is the last one is DVC's to decide."""
        for to in ("child", "parent"):
            self.outbox.post({"to": to, "end": status, "at": int(time.time() * 1000)})
        self.outbox.close()


@contextlib.contextmanager
def stage_run(slot: str, params: Params) -> Iterator[Run]:
    """The run of one stage: `slot` is its results folder, such as `distill/0`.

    Writes `results/<slot>/run.json`. CPU, memory and GPU use are sampled where the stage trains.
    Yields a twin that does nothing when `tracking.enabled` is false or MLflow is not installed.
    Errors: InputError when the store cannot be reached and `tracking.on_failure` is `fail`.
    """
    note = Path("results") / slot / "run.json"
    first = not int(os.environ.get("RANK", "0"))  # of the processes that train together
    if not (params.tracking.enabled and first and _installed()):
        yield _NoRun()
        write_json(note, {"run_id": None, "parent_run_id": None})
        return
    outbox = _open(slot, params, project_root())
    run, status = _MlflowRun(outbox, slot, params), "FAILED"
    trains = hasattr(params.profile.recipes, slot.split("/")[0])
    try:
        log = partial(run.log, "child")
        with watched(outbox.address.uri, log) if trains else contextlib.nullcontext():
            yield run
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        run.end(status)
    write_json(note, {"run_id": outbox.address.child, "parent_run_id": outbox.address.parent})


def create_runs(root: Path, client: "MlflowClient", address: Address) -> None:
    """Make the child that an address wants, below its state's parent, found or made; note both."""
    wanted = address.wanted
    with locked(root):
        experiment = open_experiment(client, wanted["experiment"], root)
        end_dead_runs(client, experiment)
        parent = _find_parent(client, experiment, address)
        tags = {**wanted["tags"], state.PARENT: parent, state.SLOT: wanted["slot"]}
        before = _cut_short(client, experiment, tags)
        if before:
            tags["edgeke.resumes"] = before
        name = wanted["slot"].replace("/", "@")
        child = client.create_run(experiment, wanted["start"], tags, run_name=name)
        address.parent, address.child = parent, str(child.info.run_id)


def _find_parent(client: "MlflowClient", experiment: str, address: Address) -> str:
    """The id of the state's run, which is in progress now; made when absent."""
    from mlflow.entities import Param

    wanted = address.wanted
    same = f"tags.`{state.STATE}` = '{wanted['state']}'"
    found = client.search_runs([experiment], same, max_results=1)
    if found:
        parent = found[0]
        # In this order: running without a living process, another machine's stage would end it.
        client.set_tag(parent.info.run_id, processes.PROCESS, address.process)
        client.update_run(parent.info.run_id, status="RUNNING")
    else:
        tags = {**wanted["tags"], state.STATE: wanted["state"]}
        del tags["DVC_STAGE"]
        parent = client.create_run(experiment, wanted["start"], tags, run_name=wanted["name"])
    if not parent.data.params:  # new, or the store went away between its making and this
        values = [Param(key, value) for key, value in wanted["params"].items()]
        client.log_batch(parent.info.run_id, params=values)
    return str(parent.info.run_id)


def end_dead_runs(client: "MlflowClient", experiment: str) -> int:
    """Mark runs in progress whose process is gone (kill -9, power cut) as killed; returns how many.

    Only runs of this host can be told.
    """
    ended = 0
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        process = run.data.tags.get(processes.PROCESS)
        if process and not processes.lives(process):
            client.set_tag(run.info.run_id, "edgeke.killed", "its process was gone")
            client.set_terminated(run.info.run_id, "KILLED")
            ended += 1
    return ended


def _installed() -> bool:
    """Whether MLflow is; the repository's folder `mlflow/` looks like a package without code."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        import mlflow
    except ModuleNotFoundError as error:
        if error.name != "mlflow":
            raise
        return False
    return mlflow.__file__ is not None


def _open(slot: str, params: Params, root: Path) -> Outbox:
    """The stage's outbox; its runs are there, or kept to be made where `on_failure` is `warn`."""
    process = processes.own()
    tags = {**state.tags(params), processes.PROCESS: process}
    wanted: dict[str, Any] = {
        "experiment": params.tracking.experiment,
        "state": state.state(params),
        "name": state.run_name(params),
        "params": {key: str(value) for key, value in state.flatten(params).items()},
        "tags": tags,
        "slot": slot,
        "start": int(time.time() * 1000),
    }
    address = Address(store_uri(root), process, None, None, wanted)
    create = partial(create_runs, root)
    try:
        client = connect(root)
        try:
            create(client, address)
        except InputError:
            raise
        except Exception as error:  # MLflow passes on whatever its store raises
            raise refusal(root, error) from error
    except InputError as error:
        if params.tracking.on_failure == "fail":
            raise
        print(f"warning: {error}. The stage goes on, its run is kept for later", file=sys.stderr)
        return Outbox(None, address, root, create)
    resend(client, address.uri, root, create)
    return Outbox(client, address, root, create)


def _cut_short(client: "MlflowClient", experiment: str, tags: Mapping[str, str]) -> str | None:
    """The last run of the same stage and content, if it was ended early: this one goes on."""
    same = [f"tags.`{key}` = '{tags[key]}'" for key in (state.CONTENT, state.SLOT)]
    order = ["attributes.start_time DESC"]
    last = client.search_runs([experiment], " and ".join(same), max_results=1, order_by=order)
    early = last and last[0].info.status in _ENDED_EARLY
    return str(last[0].info.run_id) if early else None


def _metric_name(key: str) -> str:
    """The key with what MLflow refuses spelt as code points: classes are named by users."""
    return re.sub(r"[^\w\-. :/]", lambda found: f"-u{ord(found[0]):x}-", key)[:250]

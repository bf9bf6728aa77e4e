"""Logs what results/ hold: one parent run per pipeline state, one child per executed stage.

The parent carries the tag `edgeke.state`, a child the id of its record in `edgeke.execution`: so
whichever process logs a stage, and however often, it finds what is there and adds what is missing.
"""

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgeke.errors import InputError
from edgeke.files import read_json
from edgeke.tracking.state import PARENT, PROCESS, Record
from edgeke.tracking.store import locked, open_experiment

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mlflow import MlflowClient

RESULTS = Path("results")
STATE = "edgeke.state"  # tag of a parent: a hash of the content and the DVC experiment's name
EXECUTION = "edgeke.execution"  # tag of a child: the id of its record

Curve = dict[tuple[str, int], float]  # by metric and step


def log_results(client: "MlflowClient") -> None:
    """Log every stage whose record is in results/, and complete the parent of the last one.

    Only the last stage's record has a headline. Errors: InputError when there is no record;
    whatever MLflow raises.
    """
    records = [_read_record(path) for path in RESULTS.glob("*/run.json")]
    if not records:
        raise InputError(f"no stage left a record in {RESULTS}/; run one, or `dvc pull` them")
    children: dict[str, Run] = {}
    for record in sorted(records, key=lambda record: record.started):
        children[record.stage] = log_stage(client, record)
        if record.headline:
            _complete_parent(client, record, children)


def log_stage(client: "MlflowClient", record: Record) -> "Run":
    """A stage's run, complete with what is in `results/<stage>/`; a deleted one stays deleted."""
    experiment = open_experiment(client, record.experiment)
    child = find(client, experiment, EXECUTION, record.id, deleted=True)
    if child and (child.info.status == "FINISHED" or child.info.lifecycle_stage == "deleted"):
        return child
    child = child or create_child(client, record)
    curve = _read_history(RESULTS / record.stage / "history.csv")
    metrics = RESULTS / record.stage / "metrics.json"
    _log_missing(client, child, curve, read_json(metrics) if metrics.exists() else {}, record)
    for table in sorted((RESULTS / record.stage).glob("*.csv")):
        client.log_artifact(child.info.run_id, str(table))
    for run in (child.info.run_id, child.data.tags[PARENT]):
        client.set_terminated(run, "FINISHED", record.ended)
    return child


def create_child(client: "MlflowClient", record: Record) -> "Run":
    """Make a stage's run below its state's parent, found or made."""
    from mlflow.entities import Param

    with locked():  # of two processes the second finds the parent that the first makes
        experiment = open_experiment(client, record.experiment)
        parent = find(client, experiment, STATE, record.state, deleted=False)
        if parent is None:
            own = {key: value for key, value in record.tags.items() if key != PROCESS}
            own[STATE] = record.state
            parent = client.create_run(experiment, record.started, own, record.name)
            values = [Param(key, value) for key, value in record.params.items()]
            client.log_batch(parent.info.run_id, params=values)
    tags = {"edgeke.stage": record.stage, EXECUTION: record.id, PARENT: parent.info.run_id}
    return client.create_run(experiment, record.started, record.tags | tags, record.stage)


def metric_name(key: str) -> str:
    """The key as MLflow accepts it: other characters, from names of classes, as code points."""
    return re.sub(r"[^\w\-. :/]", lambda refused: f"-u{ord(refused[0]):x}-", key)[:250]


def _complete_parent(client: "MlflowClient", record: Record, children: Mapping[str, "Run"]) -> None:
    """Add the headline, links to the runs of stages that DVC restored, and the model."""
    from edgeke.tracking.models import FILE, log_model

    parent = client.get_run(children[record.stage].data.tags[PARENT])
    run = parent.info.run_id
    if parent.info.lifecycle_stage == "deleted":
        return
    _log_missing(client, parent, {}, record.headline, record)
    for stage, child in children.items():
        if child.info.lifecycle_stage == "active" and child.data.tags[PARENT] != run:
            client.set_tag(run, f"edgeke.restored.{stage}", child.info.run_id)
    client.set_terminated(run, "FINISHED", record.ended)
    if record.model is not None and parent.data.tags.get(FILE) != record.model:
        log_model(client, record, parent)


def _log_missing(
    client: "MlflowClient", run: "Run", curve: Curve, final: Mapping[str, float], record: Record
) -> None:
    """Log what a run lacks of a curve and of final metrics.

    Final metrics belong to the last epoch, or to step 0 where nothing was trained.
    """
    from mlflow.entities import Metric

    last = max((step for _, step in curve), default=0)
    points = curve | {(metric_name(key), last): value for key, value in final.items()}
    there = {
        (key, metric.step, metric.value)
        for key in {key for key, _ in points} & set(run.data.metrics)
        for metric in client.get_metric_history(run.info.run_id, key)
    }
    metrics = [
        Metric(key, value, record.ended, step)
        for (key, step), value in points.items()
        if (key, step, value) not in there
    ]
    client.log_batch(run.info.run_id, metrics=metrics)


def _read_history(path: Path) -> Curve:
    """The curves in a history.csv; empty where a stage trains nothing.

    Where several branches share the table, `train/loss` of branch 0 is `train/branch_0/loss`.
    """
    curve: Curve = {}
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                epoch, branch = int(row.pop("epoch")), row.pop("branch", None)
                for key, value in row.items():
                    name = key.replace("/", f"/branch_{branch}/", 1) if branch else key
                    if value:
                        curve[metric_name(name), epoch] = float(value)
    return curve


def _read_record(path: Path) -> Record:
    """A stage's record. Errors: InputError."""
    try:
        return Record(**read_json(path))
    except TypeError:
        raise InputError(f"{path} is no record of a run; delete it and run `dvc repro`") from None


def find(
    client: "MlflowClient", experiment: str, tag: str, value: str, deleted: bool
) -> "Run | None":
    """The newest run with a tag, or None; with `deleted` also one that was deleted in the UI."""
    from mlflow.entities import ViewType

    view = ViewType.ALL if deleted else ViewType.ACTIVE_ONLY
    runs = client.search_runs([experiment], f"tags.`{tag}` = '{value}'", view, 1)
    return runs[0] if runs else None

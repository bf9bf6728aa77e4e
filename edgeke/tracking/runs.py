"""The run of a stage: its epochs live while the store answers, everything else from results/."""

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeke.errors import InputError
from edgeke.files import write_json
from edgeke.params import Params
from edgeke.tracking.results import RESULTS, create_child, log_results, log_stage, metric_name
from edgeke.tracking.state import PARENT, Record
from edgeke.tracking.store import (
    connected,
    is_installed,
    open_experiment,
    project_root,
    refusal,
    store_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PROCESS = "edgeke.process"  # tag of a run: host, number and start of the process that writes it
_TRAINING = ("train_teacher", "distill", "train_branchynet")
# After a failure the store is left alone this long, or this many times what the attempt took.
_PAUSE_SECONDS, _PAUSE_FACTOR = 30.0, 20.0


class Run:
    """Where a stage reports what it does; live only while there is a `client`."""

    def __init__(self, record: Record, root: Path) -> None:
        self.record, self.root = record, root
        self.client: MlflowClient | None = None
        self.child = self.parent = ""  # ids
        self.failed, self._pause_until = False, 0.0

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        """Log one row of a training curve."""
        if self.client is None or time.monotonic() < self._pause_until:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(metric_name(k), float(v), now, epoch) for k, v in row.items()]
        with self.attempt():
            self.client.log_batch(self.child, metrics=metrics, synchronous=True)

    def headline(self, metrics: Mapping[str, float]) -> None:
        """The metrics that pipelines are compared by, for the parent run; the last stage's."""
        self.record.headline = dict(metrics)

    def model(self, models: Path) -> None:
        """The one file in a folder of models is what MLflow registers and serves."""
        from edgeke.tracking.models import digest

        self.record.model = digest(models)

    def start(self) -> None:
        """Make the stage's run, after those of dead processes are ended. Errors: InputError."""
        with connected(self.root) as client:
            end_dead_runs(client, open_experiment(client, self.record.experiment, self.root))
            tags = {_PROCESS: _this_process()}
            child = create_child(client, self.root, self.record, tags)
            self.child, self.parent = child.info.run_id, child.data.tags[PARENT]
            # In this order: a run in progress without a living process would be ended by others.
            client.set_tag(self.parent, _PROCESS, tags[_PROCESS])
            client.update_run(self.parent, status="RUNNING")
            self.client = client

    def finish(self) -> None:
        """Complete the stage's run from results/; after the last stage the runs of all."""
        if time.monotonic() < self._pause_until:
            return
        failed = self.failed
        with self.attempt():
            with connected(self.root) as client:
                if self.record.headline:
                    log_results(client, self.root)
                else:
                    log_stage(client, self.root, self.record)
            if failed:
                _tell("the tracking store answers again: this stage is logged, too")

    def end(self, status: str) -> None:
        """Mark the runs of a stage that did not finish."""
        if self.client is not None and time.monotonic() >= self._pause_until:
            with contextlib.suppress(Exception):  # the next stage marks them, then
                self.client.set_terminated(self.child, status)
                self.client.set_terminated(self.parent, status)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """A failure of the store is said once, and the store is left alone for a while."""
        began = time.monotonic()
        try:
            yield
        except Exception as error:  # MLflow passes on whatever its store raises
            took = time.monotonic() - began
            self._pause_until = time.monotonic() + max(_PAUSE_SECONDS, _PAUSE_FACTOR * took)
            said = error if isinstance(error, InputError) else refusal(self.root, error)
            if not self.failed:
                _tell(f"warning: {said}. The stage goes on; `make resend` logs its results then")
            self.failed = True


@contextlib.contextmanager
def stage_run(stage: str, params: Params) -> Iterator[Run]:
    """The run of one stage.

    What the stage wrote into `results/<stage>/` is logged at its end, and `run.json` beside it lets
    `make resend` do the same later. Nothing is logged when `tracking.enabled` is false or MLflow is
    not installed. Errors: InputError when the store does not answer and `tracking.on_failure` is
    `fail`.
    """
    record = Record.start(stage, params)
    run = Run(record, project_root())
    first = not int(os.environ.get("RANK", "0"))  # of the processes that train together
    tracked = params.tracking.enabled and first and is_installed()
    if tracked and params.tracking.on_failure == "warn":
        with run.attempt():
            run.start()
    elif tracked:
        try:
            run.start()
        except InputError as error:
            raise InputError(
                f"{error}; or run with -S tracking.on_failure=warn (`make resend` logs the results "
                "later) or -S tracking.enabled=false"
            ) from error
    try:
        with _system_metrics(run):
            yield run
    except BaseException as error:
        run.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    record.ended = int(time.time() * 1000)
    write_json(RESULTS / stage / "run.json", asdict(record))
    if tracked:
        run.finish()


def end_dead_runs(client: "MlflowClient", experiment: str) -> int:
    """Mark runs in progress whose process is gone (kill -9, power cut) as killed; returns how many.

    Processes of other hosts are assumed alive.
    """
    ended = 0
    for run in client.search_runs([experiment], "attributes.status = 'RUNNING'"):
        process = run.data.tags.get(_PROCESS)
        if process and not _is_alive(process):
            client.set_tag(run.info.run_id, "edgeke.killed", "its process was gone")
            client.set_terminated(run.info.run_id, "KILLED")
            ended += 1
    return ended


def _this_process() -> str:
    """This process, such as `host 4711 1763712000`: its host, its number, its start."""
    import psutil

    process = psutil.Process()
    return f"{platform.node()} {process.pid} {int(process.create_time())}"


def _is_alive(process: str) -> bool:
    import psutil

    host, number, started = process.rsplit(" ", 2)
    try:
        # A booting machine sets its clock once more, so the start may move by a second.
        return (
            host != platform.node()
            or abs(int(psutil.Process(int(number)).create_time()) - int(started)) <= 1
        )
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def _system_metrics(run: Run) -> Iterator[None]:
    """MLflow's own monitor of CPU, memory, disk, network and GPU while a stage trains."""
    wanted = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() == "true"
    if run.client is None or run.record.stage not in _TRAINING or not wanted:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run.child, tracking_uri=store_uri(run.root))
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

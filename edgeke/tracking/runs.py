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
from edgeke.tracking.state import PARENT, PROCESS, Record
from edgeke.tracking.store import connected, is_installed, open_experiment, refusal, store_uri

if TYPE_CHECKING:
    from mlflow.entities import Run as MlflowRun

    from mlflow import MlflowClient

_TRAINING = ("train_teacher", "distill", "train_branchynet")
_PAUSE = 300  # seconds without live metrics after a failure, which may have taken twenty


class Run:
    """Where a stage reports what it does; live only while there is a `client`."""

    def __init__(self, record: Record) -> None:
        self.record = record
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
        with connected() as client:
            end_dead_runs(client, open_experiment(client, self.record.experiment))
            child = create_child(client, self.record)
            self.child, self.parent = child.info.run_id, child.data.tags[PARENT]
            client.update_run(self.parent, status="RUNNING")
            self.client = client

    def finish(self) -> None:
        """Complete the stage's run from results/; after the last stage the runs of all."""
        with self.attempt(), connected() as client:
            if self.record.headline:
                log_results(client)
            else:
                log_stage(client, self.record)
            if self.failed:
                _tell("the tracking store answers again: this stage is logged, too")

    def end(self, status: str) -> None:
        """Mark the runs of a stage that did not finish."""
        if self.client is not None and time.monotonic() >= self._pause_until:
            with contextlib.suppress(Exception):  # the next stage marks them, then
                for run in (self.child, self.parent):
                    self.client.set_terminated(run, status)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """A failure of the store is said once, and the store is left alone for a while."""
        try:
            yield
        except Exception as error:  # MLflow passes on whatever its store raises
            self._pause_until = time.monotonic() + _PAUSE
            if not self.failed:
                _tell(
                    f"warning: {refusal(error)}. The stage goes on; `make resend` logs its results "
                    "then"
                )
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
    run = Run(record)
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
    """Mark stages' runs whose process is gone (kill -9, power cut) as killed; returns how many."""
    running = client.search_runs([experiment], "attributes.status = 'RUNNING'")
    dead = [run for run in running if _is_dead(run)]
    for run in dead:
        client.set_tag(run.info.run_id, "edgeke.killed", "its process was gone")
        for one in (run.info.run_id, run.data.tags[PARENT]):
            client.set_terminated(one, "KILLED")
    return len(dead)


def _is_dead(run: "MlflowRun") -> bool:
    """Whether a stage's process is gone; processes of other hosts are assumed alive."""
    import psutil

    host, _, number = run.data.tags.get(PROCESS, "").rpartition(" ")
    if host != platform.node():
        return False
    try:
        # A process that is younger than the run was given the number of one that is gone. The
        # system's clock gives its start to a second.
        return bool(psutil.Process(int(number)).create_time() > run.info.start_time / 1000 + 2)
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def _system_metrics(run: Run) -> Iterator[None]:
    """MLflow's own monitor of CPU, memory, disk, network and GPU while a stage trains."""
    enabled = os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() == "true"
    if run.client is None or run.record.stage not in _TRAINING or not enabled:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run.child, tracking_uri=store_uri())
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

"""The run of a stage: its epochs live while the store answers, everything else from results/."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from edgeke.errors import InputError
from edgeke.files import process_number, repository, write_json
from edgeke.params import Params
from edgeke.tracking.results import (
    EXECUTION,
    RESULTS,
    create_child,
    find,
    log_results,
    log_stage,
    metric_name,
)
from edgeke.tracking.state import PARENT, Record
from edgeke.tracking.store import (
    connected,
    is_installed,
    locked,
    open_experiment,
    refusal,
    store_uri,
)

if TYPE_CHECKING:
    from filelock import FileLock

    from mlflow import MlflowClient

_TRAINING = ("train_teacher", "distill", "prune", "train_branchynet")
_PAUSE = 300  # seconds without live metrics after a failure, which may have taken twenty


class Run:
    """Where a stage reports what it does; live only while there is a `client`."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.client: MlflowClient | None = None
        self.child = self.parent = ""  # ids
        self.failed, self._pause_until = False, 0.0
        self.cleanups: list[Callable[[], None]] = []  # once the results count, not before
        self._life: FileLock | None = None  # held until the process ends, however it does

    def epoch(self, epoch: int, row: Mapping[str, float]) -> None:
        """Log one row of a training curve."""
        if self.client is None or time.monotonic() < self._pause_until:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(metric_name(k), float(v), now, epoch) for k, v in row.items()]
        with self.attempt():
            self.client.log_batch(self.child, metrics=metrics)

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
            self._live()
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
            self._forget()
            if self.failed:
                _tell("the tracking store answers again: this stage is logged, too")

    def end(self, status: str) -> None:
        """Mark the runs of a stage that did not finish."""
        if self.client is not None and time.monotonic() >= self._pause_until:
            with contextlib.suppress(Exception):  # the next stage marks them, then
                for run in (self.child, self.parent):
                    self.client.set_terminated(run, status)
                self._forget()

    def _live(self) -> None:
        """Hold a lock that the system frees when this process is gone."""
        from filelock import FileLock

        with locked():
            _running().mkdir(parents=True, exist_ok=True)
            self._life = FileLock(_running() / self.record.id)
            self._life.acquire(timeout=0)

    def _forget(self) -> None:
        """The run has its last status: nobody needs to ask whether it is alive."""
        if self._life is not None:
            Path(self._life.lock_file).unlink(missing_ok=True)
            self._life.release()

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
    first = process_number() == 0  # of the processes that train together
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
    """Mark this repository's runs whose process is gone (kill -9, power cut) as killed.

    Returns how many. A process that lives holds the lock of its run, in whatever container it is;
    host names and process numbers would not tell two containers apart.
    """
    from filelock import FileLock, Timeout

    ended = 0
    with locked():
        for file in _running().glob("*"):
            try:
                with FileLock(file).acquire(timeout=0):
                    pass
            except Timeout:
                continue
            run = find(client, experiment, EXECUTION, file.name, deleted=True)
            if run is None:
                continue  # of another experiment or store
            if run.info.status == "RUNNING":
                client.set_tag(run.info.run_id, "edgeke.killed", "its process was gone")
                for one in (run.info.run_id, run.data.tags[PARENT]):
                    client.set_terminated(one, "KILLED")
                ended += 1
            file.unlink(missing_ok=True)
    return ended


def _running() -> Path:
    """The folder of the locks, named as the executions of stages."""
    return repository() / ".edgeke" / "running"


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

"""CPU, memory, disk, network and GPU use while a stage trains, by MLflow's own monitors."""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping

__all__ = ["watched"]

_SECONDS = 10.0  # MLflow's default; MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL changes it


@contextlib.contextmanager
def watched(uri: str, log: Callable[[Mapping[str, float], int], None]) -> Iterator[None]:
    """Give `log` a sample (`system/...`, its number) now, every few seconds, and at the end."""
    logging.getLogger("mlflow.system_metrics").setLevel(logging.ERROR)  # no GPU: no news
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # Its own thread would give up on a store that is away; so it only measures, and `log` keeps.
    measures = SystemMetricsMonitor("", tracking_uri=uri)
    interval = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or _SECONDS)
    stop = threading.Event()

    def sample() -> None:
        number, going = 0, True
        while going:
            measures.collect_metrics()
            found = measures.aggregate_metrics()
            log({f"system/{key}": value for key, value in found.items()}, number)
            for monitor in measures.monitors:
                monitor.clear_metrics()
            number += 1
            going = not stop.is_set()
            stop.wait(interval)

    thread = threading.Thread(target=sample, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()

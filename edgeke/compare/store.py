"""What a comparison reads from MLflow, and the page it leaves there."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgeke.compare.rows import PipelineRun
from edgeke.errors import InputError
from edgeke.tracking.state import STATE
from edgeke.tracking.store import connect, folder, locked, refusal

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["find_experiment", "log_page", "open_store", "read_runs"]

_COMPARISON = "edgeke.comparison"  # tag of the one run that holds the page
_PAGE = 1000  # runs per request


def open_store(root: Path) -> "MlflowClient":
    """A client of the store of `root`, which is not made when it is not there.

    Errors: InputError saying what to do.
    """
    file = folder(root) / "mlflow.db"
    if not os.environ.get("MLFLOW_TRACKING_URI") and not file.is_file():
        raise InputError(f"{file} is missing: nothing was run yet; `make run` makes the first run")
    return connect(root)


def find_experiment(client: "MlflowClient", root: Path, name: str) -> str:
    """The id of an experiment. Errors: InputError when it is not there, or the store is away."""
    try:
        found = client.get_experiment_by_name(name)
        known = [] if found else [other.name for other in client.search_experiments()]
    except Exception as error:  # MLflow passes on whatever its store raises
        raise refusal(root, error) from error
    if found is None:
        raise InputError(
            f"there is no experiment {name!r} in MLflow, only {', '.join(sorted(known)) or 'none'};"
            " `make run` makes it, --experiment names another"
        )
    if found.lifecycle_stage == "deleted":
        raise InputError(
            f"the experiment {name!r} was deleted in MLflow; the next run, such as `dvc exp run`, "
            "restores it"
        )
    return str(found.experiment_id)


def read_runs(client: "MlflowClient", root: Path, experiment: str) -> list[PipelineRun]:
    """The parent runs of an experiment, deleted ones left out.

    Errors: InputError when the store stops answering.
    """
    found: list[PipelineRun] = []
    token = None
    try:
        while True:
            # Only parents have the tag: children, of which there are ten times more, stay there.
            page = client.search_runs(
                [experiment], f"tags.`{STATE}` != ''", max_results=_PAGE, page_token=token
            )
            for run in page:
                tags, info = run.data.tags, run.info
                found.append(
                    PipelineRun(
                        str(info.run_id),
                        str(info.run_name),
                        str(info.status),
                        int(info.end_time or info.start_time),
                        dict(run.data.params),
                        {key: float(value) for key, value in run.data.metrics.items()},
                        tags.get("edgeke.machine", ""),
                        tags.get("mlflow.source.git.commit", ""),
                    )
                )
            token = page.token
            if not token:
                return found
    except Exception as error:  # MLflow passes on whatever its store raises
        raise refusal(root, error) from error


def log_page(client: "MlflowClient", root: Path, experiment: str, page: str) -> str:
    """Keep the page as `compare.html` of the experiment's run `comparison`; returns the run's id.

    The run is found or made, so the page of an earlier comparison is replaced.
    Errors: whatever MLflow raises.
    """
    with locked(root):
        found = client.search_runs([experiment], f"tags.`{_COMPARISON}` = 'true'", max_results=1)
        if found:
            run = str(found[0].info.run_id)
        else:
            tags = {_COMPARISON: "true"}
            run = str(client.create_run(experiment, tags=tags, run_name="comparison").info.run_id)
        client.log_text(run, page, "compare.html")
        client.set_terminated(run)
    return run

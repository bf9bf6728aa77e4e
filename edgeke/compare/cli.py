"""The command line of `make compare`: the table, the page, and the page in MLflow."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeke import params
from edgeke.compare.columns import notes
from edgeke.compare.page import write_page
from edgeke.compare.rows import CRITERION, SHOWN, Ranking, rank
from edgeke.compare.store import find_experiment, log_page, open_store, read_runs
from edgeke.compare.table import render
from edgeke.errors import InputError
from edgeke.tracking.store import project_root, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["main"]

_PIPED_WIDTH = 120  # characters where there is no terminal to ask


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m edgeke.compare",
        description=f"Compare the runs in MLflow, seeds averaged, ranked by {CRITERION}.",
    )
    parser.add_argument("--profile", help="or `all`; default: the one in params.yaml")
    parser.add_argument("--experiment", help="default: tracking.experiment in params.yaml")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    parser.add_argument("--out", type=Path, default=Path(".edgeke/compare.html"), help="the page")
    parser.add_argument("--no-log", action="store_true", help="do not keep the page in MLflow")
    options = parser.parse_args(arguments)
    try:
        _compare(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _compare(options: argparse.Namespace) -> None:
    settings = params.load()
    name = options.experiment or settings.tracking.experiment
    root = project_root()
    client = open_store(root)
    experiment = find_experiment(client, root, name)
    every = rank(read_runs(client, root, experiment))
    rankings = _chosen(every, options.profile or settings.profile_name, name)
    if options.json:
        content = {"experiment": name, "criterion": CRITERION}
        print(json.dumps({**content, "profiles": [_plain(one) for one in rankings]}, indent=2))
    else:
        width = shutil.get_terminal_size((_PIPED_WIDTH, 24)).columns
        print("\n\n".join(render(one, width) for one in rankings))
    try:
        page = write_page(rankings, name, options.out)
    except OSError as error:
        raise InputError(
            f"{options.out} cannot be written ({error.strerror}); name another file with --out"
        ) from error
    _tell(f"\n{options.out}")
    if not options.no_log:
        _log(client, root, experiment, page)


def _chosen(every: Sequence[Ranking], profile: str, experiment: str) -> list[Ranking]:
    found = [one for one in every if one.rows and profile in (one.profile, "all")]
    if found:
        return found
    others = ", ".join(one.profile for one in every if one.rows)
    unfinished = sum(
        count for one in every if profile in (one.profile, "all") for count in one.left_out.values()
    )
    raise InputError(
        f"no finished run of profile {profile!r} in the experiment {experiment!r} "
        f"({unfinished} unfinished); `dvc exp run` makes one"
        + (f", --profile shows others: {others}, all" if others else "")
    )


def _log(client: "MlflowClient", root: Path, experiment: str, page: str) -> None:
    try:
        run = log_page(client, root, experiment, page)
        _tell(f"kept in MLflow as compare.html of the run comparison ({run})")
    except Exception as error:  # MLflow passes on whatever its store raises
        _tell(f"warning: MLflow did not take the page ({reason(error)}); the file is there")


def _plain(ranking: Ranking) -> dict[str, Any]:
    """A ranking as JSON, every metric that a row has over its seeds."""
    rows = []
    for place, row in enumerate(ranking.rows, 1):
        metrics = sorted({name for run in row.runs for name in run.metrics})
        spreads = {name: row.spread(name) for name in metrics}
        rows.append(
            {
                "rank": place,
                "params": {key: row.settings.get(key) for key in (*SHOWN, *ranking.differing)},
                "seeds": [run.seed for run in row.runs],
                "runs": [run.id for run in row.runs],
                "met": {name: row.met(name) for name in row.requirements},
                "metrics": {name: asdict(found) for name, found in spreads.items() if found},
            }
        )
    return {"profile": ranking.profile, "rows": rows, "notes": notes(ranking)}


def _tell(text: str) -> None:
    print(text, file=sys.stderr)

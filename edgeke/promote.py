"""Gives a registered model the alias that serving reads: python -m edgeke.promote RUN.

A model is promoted only if every requirement on it is certified and its ONNX file was checked
against the network: `evaluate` tagged the model's version with its objections. What the test split
gave is shown beside it and decides nothing.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgeke import params
from edgeke.errors import InputError, report
from edgeke.tracking.models import MODEL, OBJECTIONS
from edgeke.tracking.results import STATE
from edgeke.tracking.store import connected, open_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient


def promote(client: "MlflowClient", experiment: str, name: str, alias: str) -> None:
    """Set the alias to the model of a run: its id (or how that begins), name or DVC experiment.

    Errors: InputError when no run or several match, or the model may not be promoted.
    """
    runs = [
        run
        for run in client.search_runs([experiment], f"tags.`{STATE}` != ''", max_results=5000)
        if name in (run.info.run_name, run.data.tags.get("DVC_EXP_NAME"))
        or (len(name) >= 4 and run.info.run_id.startswith(name))
    ]
    if len(runs) != 1:
        ids = ", ".join(f"{run.info.run_id[:8]} ({run.info.run_name})" for run in runs[:5])
        raise InputError(
            f"{len(runs)} runs are called {name!r}"
            + (f": give the id of one: {ids}" if runs else "; `make compare` lists them")
        )
    model, _, number = runs[0].data.tags.get(MODEL, "").rpartition("/")
    if not model:
        raise InputError(
            f"{runs[0].info.run_name} has no registered model: it did not finish, or the store "
            "was away; `make resend` in its workspace (after `dvc exp apply`) registers it"
        )
    tags = client.get_model_version(model, number).tags
    print(f"{model} version {number} ({tags.get('edgeke.precision')}), at its default point:")
    for split in ("validation", "calibration", "test"):
        print(f"  {split:11} {tags.get(f'edgeke.{split}') or '-'}")
    objections = tags.get(OBJECTIONS, "it was registered by an earlier version of EdgeKE")
    if objections:
        raise InputError(
            f"it is not promoted: {objections}. Require less in calibrate.requirements, or train a "
            "better one"
        )
    before = client.get_registered_model(model).aliases.get(alias)
    client.set_registered_model_alias(model, alias, number)
    print(f"{alias} is version {number}" + (f", before: version {before}" if before else ""))
    print(f'mlflow models serve -m "models:/{model}@{alias}" --env-manager local')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="edgeke.promote", description=__doc__)
    parser.add_argument("run", help="the run's id, name, or DVC experiment")
    parser.add_argument("--alias", choices=("champion", "challenger"), default="champion")
    options = parser.parse_args(arguments)
    try:
        name = params.load().tracking.experiment
        with connected() as client:
            promote(client, open_experiment(client, name), options.run, options.alias)
    except InputError as error:
        return report(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Gives a registered model the alias that serving reads: python -m edgeke.promote RUN.

A model is promoted only if everything that was asked of it is certified and its ONNX file equals
the network; what the test split gave is shown beside it and decides nothing.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgeke import params
from edgeke.errors import InputError
from edgeke.tracking.models import MODEL, PRECISION
from edgeke.tracking.state import PARENT, STATE
from edgeke.tracking.store import connect, open_experiment, project_root, refusal

if TYPE_CHECKING:
    from mlflow.entities import Run

    from mlflow import MlflowClient

__all__ = ["ALIASES", "Candidate", "find_candidate", "main", "objections", "promote"]

ALIASES = ("champion", "challenger")


@dataclass(frozen=True)
class Candidate:
    """A registered model and what its run measured.

    `metrics` are the run's headline, `parity` the largest differences between ONNX and the network
    by name, `tolerance` what they may be.
    """

    run_name: str
    model: str
    version: str
    precision: str
    metrics: Mapping[str, float]
    parity: Mapping[str, float]
    tolerance: float

    @property
    def prefix(self) -> str:
        """What the metrics of its precision begin with, behind the split."""
        return "int8/" if self.precision == "int8" else ""


def find_candidate(client: "MlflowClient", experiment: str, wanted: str) -> Candidate:
    """The model of a run, named by its id (or the beginning of one), name or DVC experiment.

    Errors: InputError when no run or several are called so, or the run has no model.
    """
    found = [
        run
        for run in client.search_runs([experiment], f"tags.`{STATE}` LIKE '%'", max_results=5000)
        if wanted in (run.info.run_name, run.data.tags.get("DVC_EXP_NAME"))
        or (len(wanted) >= 4 and run.info.run_id.startswith(wanted))
    ]
    if not found:
        raise InputError(f"no run is called {wanted!r}; `make compare` lists them")
    if len(found) > 1:
        named = ", ".join(f"{run.info.run_id[:8]} ({run.info.run_name})" for run in found[:5])
        raise InputError(f"{len(found)} runs are called {wanted!r}: give the id of one: {named}")
    (run,) = found
    if MODEL not in run.data.tags:
        raise InputError(
            f"{run.info.run_name} has no registered model: it did not finish, or the store was "
            "away; `dvc repro` (or `dvc exp apply` and `dvc repro -fs evaluate`) logs it"
        )
    model, _, version = run.data.tags[MODEL].rpartition("/")
    registered = client.get_model_version(model, version)
    exported = _exported(client, experiment, run)
    return Candidate(
        run.info.run_name,
        model,
        version,
        registered.tags.get(PRECISION, "fp32"),
        run.data.metrics,
        {key: value for key, value in exported.items() if key.endswith("/parity_difference")},
        float(run.data.params["export.parity_tolerance"]),
    )


def objections(candidate: Candidate) -> list[str]:
    """Why a model may not be promoted; empty where it may."""
    start, end = f"calibration/{candidate.prefix}", "/met"
    asked = {
        key[len(start) : -len(end)]: value
        for key, value in candidate.metrics.items()
        if key.startswith(start) and key.endswith(end) and key[len(start) :].count("/") == 1
    }
    found = [f"{name} is not certified" for name, met in sorted(asked.items()) if met != 1.0]
    if not asked:
        found.append("nothing was asked of it (calibrate.requirements), so nothing is certified")
    if not candidate.parity:
        found.append("its export left no parity check")
    found += [
        f"{name} is {value:.1e}, above export.parity_tolerance {candidate.tolerance:.1e}"
        for name, value in sorted(candidate.parity.items())
        if not value <= candidate.tolerance
    ]
    return found


def promote(client: "MlflowClient", candidate: Candidate, alias: str) -> str | None:
    """Set the alias; returns the version that had it. Errors: InputError with all objections."""
    against = objections(candidate)
    if against:
        raise InputError(
            f"{candidate.run_name} is not promoted: {'; '.join(against)}. Ask for less in "
            "calibrate.requirements, or train a better one"
        )
    before = _holder(client, candidate.model, alias)
    client.set_registered_model_alias(candidate.model, alias, candidate.version)
    return before


def _exported(client: "MlflowClient", experiment: str, run: "Run") -> Mapping[str, float]:
    """The metrics of the export a run's model comes from, its own or a restored one."""
    restored = run.data.tags.get("edgeke.restored.export")
    if restored:
        metrics: Mapping[str, float] = client.get_run(restored).data.metrics
        return metrics
    below = f"tags.`{PARENT}` = '{run.info.run_id}' and tags.DVC_STAGE = 'export'"
    order = ["attributes.start_time DESC"]
    own = client.search_runs([experiment], below, max_results=1, order_by=order)
    return own[0].data.metrics if own else {}


def _holder(client: "MlflowClient", model: str, alias: str) -> str | None:
    aliases = client.get_registered_model(model).aliases
    return str(aliases[alias]) if alias in aliases else None


def _shown(candidate: Candidate) -> str:
    """Accuracy, cost and latency of the default point: what decides, and test beside it."""
    lines = [f"{candidate.model} version {candidate.version} ({candidate.precision})"]
    for split, words in (
        ("validation", "fitted on"),
        ("calibration", "certified on"),
        ("test", "shown, decides nothing"),
    ):
        start = f"{split}/{candidate.prefix}default/"
        values = {
            key.removeprefix(start): value
            for key, value in candidate.metrics.items()
            if key.startswith(start)
        }
        cells = [
            f"{name} {values[key]:{form}}"
            for name, key, form in (
                ("accuracy", "accuracy", ".4f"),
                ("cost", "cost_share", ".3f"),
                ("latency ms", "latency_ms_mean", ".3f"),
            )
            if key in values
        ]
        lines.append(f"  {split:11} {', '.join(cells) or '-'}   ({words})")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="edgeke.promote", description=__doc__)
    parser.add_argument("run", help="the run's id, name, or DVC experiment")
    parser.add_argument("--alias", choices=ALIASES, default=ALIASES[0])
    options = parser.parse_args(arguments)
    root = project_root()
    try:
        name = params.load().tracking.experiment
        client = connect(root)
        try:
            candidate = find_candidate(client, open_experiment(client, name, root), options.run)
            print(_shown(candidate))
            before = promote(client, candidate, options.alias)
        except InputError:
            raise
        except Exception as error:  # MLflow passes on whatever its store raises
            raise refusal(root, error) from error
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    replaced = f", before: version {before}" if before else ""
    print(f"{options.alias} of {candidate.model} is version {candidate.version}{replaced}")
    print(f"mlflow models serve -m models:/{candidate.model}@{options.alias} --env-manager local")
    return 0


if __name__ == "__main__":
    sys.exit(main())

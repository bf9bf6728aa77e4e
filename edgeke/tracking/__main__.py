"""Logs what results/ hold and MLflow lacks, and marks dead runs: python -m edgeke.tracking."""

import sys

from edgeke import params
from edgeke.errors import InputError, report
from edgeke.tracking.results import log_results
from edgeke.tracking.runs import end_dead_runs
from edgeke.tracking.store import connected, open_experiment


def main() -> int:
    """Complete the repository's store; returns the exit status."""
    try:
        experiment = params.load().tracking.experiment
        with connected() as client:
            log_results(client)
            ended = end_dead_runs(client, open_experiment(client, experiment))
    except InputError as error:
        return report(error)
    print(f"MLflow has all that results/ hold; {ended} dead runs were marked as killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Sends what stages could not, and marks runs whose process is gone: python -m edgeke.tracking."""

import sys
from functools import partial

from edgeke import params
from edgeke.errors import InputError
from edgeke.tracking.outbox import resend
from edgeke.tracking.runs import create_runs, end_dead_runs
from edgeke.tracking.store import connect, open_experiment, project_root, store_uri

__all__ = ["main"]


def main() -> int:
    """Tidy the store of this repository; returns the exit status, 1 while something is unsent."""
    root = project_root()
    try:
        experiment = params.load().tracking.experiment
        client = connect(root)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sent, stay = resend(client, store_uri(root), root, partial(create_runs, root))
    ended = end_dead_runs(client, open_experiment(client, experiment, root))
    print(f"{sent} stages' messages sent, {stay} kept, {ended} runs marked as killed")
    return 1 if stay else 0


if __name__ == "__main__":
    sys.exit(main())

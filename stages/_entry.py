"""What every stage entry does around its own work: parameters, tracking, metrics, errors."""

import errno
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from edgeke import params
from edgeke.errors import InputError
from edgeke.files import write_json
from edgeke.tracking.runs import Run, stage_run
from stages._inputs import check_inputs, read_inputs

Body = Callable[[params.Params, Run], dict[str, float]]

# The machine's refusals, which only its owner can change. Any other OSError is a bug.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)


def check_code() -> None:
    """Refuse to run another project's code in this folder. Errors: InputError."""
    own, running = Path("stages/_entry.py"), Path(__file__)
    if own.exists() and not own.samefile(running):
        raise InputError(
            f"the code that runs is that of {running.parents[1]}, not of this folder; unset "
            "PYTHONPATH and PYTHONSAFEPATH, which put it first"
        )


def entry(stage: str, body: Body) -> int:
    """Run a stage and write `results/<stage>/metrics.json`; returns the exit status.

    Bad input is printed as one line; any other exception keeps its traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: KILLED
    try:
        check_code()
        loaded = params.load()
        with stage_run(stage, loaded) as run:
            inputs = read_inputs(stage, loaded)
            metrics = body(loaded, run)
            check_inputs(stage, loaded, inputs)
            write_json(Path("results") / stage / "metrics.json", metrics)
            for clean in run.cleanups:
                clean()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"stopped: {error}" if str(error) else "stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        print(f"error: {error}; change that and run again", file=sys.stderr)
        return 1
    return 0

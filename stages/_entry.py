"""What every stage entry does around its own work: parameters, tracking, metrics, errors."""

import errno
import sys
from collections.abc import Callable
from pathlib import Path

from edgeke import params, tracking
from edgeke.device.errors import DeviceError
from edgeke.errors import InputError
from edgeke.files import write_json

__all__ = ["entry"]

Body = Callable[[params.Params, tracking.Run], dict[str, float]]


def entry(slot: str, body: Body) -> int:
    """Run a stage and write `results/<slot>/metrics.json`; returns the exit status.

    Bad input is printed as one line; any other exception keeps its traceback.
    """
    try:
        loaded = params.load()
        with tracking.stage_run(slot, loaded) as run:
            metrics = body(loaded, run)
            write_json(Path("results") / slot / "metrics.json", metrics)
            run.metrics(metrics)
    except (InputError, DeviceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print(f"stopped: {error}" if str(error) else "stopped", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"error: no space left on the disk ({error}); free some, run again", file=sys.stderr)
        return 1
    return 0

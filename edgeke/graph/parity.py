"""Whether two ways of computing the same answers agree."""

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError


def check_close(
    what: str, values: NDArray[np.float32], expected: NDArray[np.float32], tolerance: float
) -> float:
    """The largest absolute difference. Errors: InputError when it exceeds `tolerance`."""
    difference = float(np.abs(values - expected).max(initial=0))
    if not difference <= tolerance:  # also catches NaN
        raise InputError(
            f"{what} is off by {difference:.2e}, more than {tolerance:.2e}: the exported model "
            "does not compute what was trained. Check the versions against requirements.txt "
            "before raising export.parity_tolerance"
        )
    return difference


def check_exits(
    exits: NDArray[np.int64],
    expected: NDArray[np.int64],
    scores: NDArray[np.float32],
    thresholds: NDArray[np.float32],
    tolerance: float,
) -> int:
    """How many samples left at another exit because their score ties with a threshold.

    `scores` `[E, N]`. Errors: InputError when a sample whose every score is further than
    `tolerance` from its threshold left elsewhere.
    """
    tied = (np.abs(scores - thresholds[:, None]) <= tolerance).any(axis=0)
    moved = exits != expected
    if (moved & ~tied).any():
        sample = int(np.flatnonzero(moved & ~tied)[0])
        raise InputError(
            f"the composed file leaves at exit {exits[sample]} where the cascade leaves at "
            f"{expected[sample]} (sample {sample}): the file does not compute its policy. Check "
            "the versions against requirements.txt"
        )
    return int(moved.sum())

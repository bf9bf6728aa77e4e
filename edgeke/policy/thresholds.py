"""Possible thresholds, and those under which given shares of the samples leave."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeke.device.policy import ALWAYS, NEVER


def cuts(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Every threshold that divides scores `[N]` differently, ascending from ALWAYS to NEVER.

    Each is halfway between two observed scores, so that no sample crosses it through rounding on
    another machine. Equal scores leave or stay together.
    """
    values = np.unique(scores.astype(np.float32))
    middles = ((values[:-1].astype(np.float64) + values[1:]) / 2).astype(np.float32)
    # Between neighbouring floats the middle rounds to one of them; scores must exceed it.
    middles = np.where(middles >= values[1:], values[:-1], middles)
    return np.concatenate([[ALWAYS], middles, [NEVER]]).astype(np.float32)


def threshold_for_share(scores: NDArray[np.float32], share: float) -> float:
    """The threshold that lets the surest `share` of samples leave; scores `[N]`.

    Equal scores leave or stay together, whichever comes nearer to `share`.
    """
    if len(scores) == 0 or share <= 0:
        return NEVER
    if share >= 1:
        return ALWAYS
    possible = cuts(scores)
    leaving = len(scores) - np.searchsorted(np.sort(scores), possible, side="right")
    return float(possible[np.abs(leaving - share * len(scores)).argmin()])


def thresholds_for_proportions(
    scores: NDArray[np.float32], proportions: Sequence[float]
) -> tuple[float, ...]:
    """One threshold per exit: `proportions[e]` of the samples that reach exit e leave there.

    `scores` `[E, N]`. The published code ranks all samples at every exit; counted over survivors
    the shares are met.
    """
    reaching = np.arange(scores.shape[1])
    thresholds = []
    for at_exit, share in zip(scores, proportions, strict=True):
        threshold = threshold_for_share(at_exit[reaching], share)
        reaching = reaching[at_exit[reaching] <= np.float32(threshold)]
        thresholds.append(threshold)
    return tuple(thresholds)

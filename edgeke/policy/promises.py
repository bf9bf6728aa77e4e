"""What can be promised of frozen candidates, from samples that nothing was fitted on.

Assumption of all of it: the samples and the device's images are exchangeable. Then each statement
holds with probability at least 1 - delta over the draw of the samples.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from edgeke.errors import InputError

__all__ = [
    "certified_prefix",
    "reach_bounds",
    "running_bounds",
    "upper_bound",
]


def certified_prefix(bad: NDArray[np.bool_], epsilon: float, delta: float) -> int:
    """How many candidates, from the first on, have a rate of bad samples of at most `epsilon`.

    Learn then Test (Angelopoulos et al. 2021): for each candidate the exact binomial p-value of
    "the rate exceeds epsilon", tested in the given order until the first that stays above `delta`
    (fixed-sequence testing: with probability at least 1 - delta no certified candidate is bad).
    `bad` `[M, N]`, conservative to aggressive. Errors: InputError when epsilon or delta lies outside (0, 1).
    """
    _check_probability("epsilon", epsilon)
    _check_probability("delta", delta)
    passed = binom.cdf(bad.sum(axis=1), bad.shape[1], epsilon) <= delta
    return len(passed) if passed.all() else int(passed.argmin())


def upper_bound(bad: NDArray[np.int64] | int, samples: int, delta: float) -> NDArray[np.float64]:
    """The largest rate that `bad` of `samples` do not contradict at level `delta`.

    One-sided Clopper-Pearson bound (1934). A p-value for "the rate exceeds epsilon" is at most
    delta exactly when epsilon is at least this bound.
    """
    _check_probability("delta", delta)
    counts = np.asarray(bad, np.int64)
    bound = beta.ppf(1 - delta, counts + 1, np.maximum(samples - counts, 1))
    return np.where(counts >= samples, 1.0, bound)


def running_bounds(bad: NDArray[np.bool_], delta: float) -> NDArray[np.float64]:
    """For each candidate the least epsilon for which `certified_prefix` reaches it: `[M]`.

    The largest upper bound so far. Whoever asks for an epsilon fixed beforehand and takes any
    candidate whose bound is at most that does what `certified_prefix` does for it.
    """
    return np.maximum.accumulate(upper_bound(bad.sum(axis=1), bad.shape[1], delta))


def reach_bounds(
    exits: NDArray[np.int64], thresholds: Sequence[Sequence[float]], count: int, delta: float
) -> NDArray[np.float64]:
    """Upper bounds on the probability of reaching each exit, `[M, E]`, that hold all at once.

    `exits` `[M, N]` is where M candidates let N samples leave, `thresholds` `[M, E]`, `count` is E.
    Clopper-Pearson with delta split evenly over all probabilities that are not known anyway: the
    first exit is always reached, and none behind an exit whose threshold lets everybody leave.
    """
    _check_probability("delta", delta)
    exits = np.asarray(exits)
    limits = np.asarray(thresholds, np.float64)
    reached = np.stack([(exits >= e).sum(axis=1) for e in range(count)], axis=1)
    blocked = np.cumsum(limits < 0, axis=1) > (limits < 0)
    unknown: NDArray[np.bool_] = ~blocked
    unknown[:, 0] = False
    bounds = np.where(blocked, 0.0, 1.0)
    share = delta / max(1, int(unknown.sum()))
    bounds[unknown] = upper_bound(reached[unknown], exits.shape[1], share)
    return bounds


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name} = {value!r} must lie between 0 and 1, such as 0.1")

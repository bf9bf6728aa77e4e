"""How well a score ranks right answers before wrong ones."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata


def area_under_risk_coverage(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """Mean error of the surest k samples over all k (AURC, Geifman et al. 2019); 0 is perfect.

    `scores`, `right` `[N]`. Equal scores count as if their samples came in every order.
    """
    values, group, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    share = np.bincount(group, weights=~right, minlength=len(values)) / counts
    errors = np.cumsum(share[group[np.argsort(-scores, kind="stable")]])
    return float((errors / np.arange(1, len(scores) + 1)).mean())


def auroc(scores: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """The probability that a right answer scores higher than a wrong one (ties count half).

    1 where there is no wrong answer, or no right one: nothing is out of order.
    """
    rights, wrongs = int(right.sum()), int((~right).sum())
    if not rights or not wrongs:
        return 1.0
    ranks = rankdata(scores)[right].sum()
    return float((ranks - rights * (rights + 1) / 2) / (rights * wrongs))

"""From counts on the calibration split to promises: one formula, and what it takes to use it."""

import math
from functools import lru_cache

from edgeke.errors import InputError


@lru_cache(maxsize=4096)
def upper_bound(bad: int, samples: int, delta: float) -> float:
    """The rate that `bad` of `samples` exceed with probability at most `delta` over their draw.

    One-sided bound of Clopper & Pearson (1934): the rate under which at most `bad` have the
    probability `delta`. Never below the observed rate, which matters for `delta` above 1/2 only.
    Errors: InputError when `delta` is not between 0 and 1.
    """
    _check_probability("delta", delta)
    if bad >= samples:
        return 1.0
    low, high = bad / samples, 1.0
    while high - low > 1e-10:
        middle = (low + high) / 2
        if _at_most(bad, samples, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def _at_most(bad: int, samples: int, rate: float) -> float:
    """The probability that at most `bad` of `samples` are bad; `rate` is above `bad / samples`.

    Summed from the largest term of the binomial distribution down.
    """
    logarithm = (
        math.lgamma(samples + 1)
        - math.lgamma(bad + 1)
        - math.lgamma(samples - bad + 1)
        + bad * math.log(rate)
        + (samples - bad) * math.log1p(-rate)
    )
    term = total = math.exp(logarithm)
    for count in range(bad, 0, -1):
        term *= count * (1 - rate) / ((samples - count + 1) * rate)
        total += term
        if term < 1e-17 * total:
            break
    return total


def samples_needed(epsilon: float, delta: float) -> int:
    """The least number of samples that can certify a rate of at most `epsilon`: none of them bad.

    230 for 1 % at delta 0.1. Errors: InputError when either is not between 0 and 1.
    """
    _check_probability("epsilon", epsilon)
    _check_probability("delta", delta)
    return math.ceil(math.log(delta) / math.log1p(-epsilon))


def _check_probability(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise InputError(f"{name} = {value!r} must be between 0 and 1, such as 0.05")

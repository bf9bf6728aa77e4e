"""Exact intervals for shares."""

from scipy.stats import binomtest


def share_interval(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson interval for a probability (Clopper & Pearson 1934)."""
    interval = binomtest(successes, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)

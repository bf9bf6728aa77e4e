import numpy as np
import pytest
from scipy.stats import binomtest

from edgeke.device.choice import samples_needed
from edgeke.errors import InputError
from edgeke.policy.promises import (
    certified_prefix,
    reach_bounds,
    running_bounds,
    upper_bound,
)


def bad(counts: list[int], samples: int) -> np.ndarray:
    return np.arange(samples) < np.array(counts)[:, None]


def test_samples_needed():
    assert samples_needed(0.01, 0.1) == 230
    assert certified_prefix(bad([0], 230), 0.01, 0.1) == 1
    assert certified_prefix(bad([0], 229), 0.01, 0.1) == 0


def test_one_percent_of_5000_may_show_080_percent():
    assert certified_prefix(bad([40], 5000), 0.01, 0.1) == 1
    assert certified_prefix(bad([42], 5000), 0.01, 0.1) == 0


def test_upper_bound_is_clopper_and_pearsons():
    for count in (0, 3, 50, 100):
        expected = binomtest(count, 100, alternative="less").proportion_ci(0.9, "exact").high
        assert upper_bound(count, 100, 0.1) == pytest.approx(expected)


def test_testing_stops_at_the_first_that_fails():
    counts = bad([0, 1, 30, 0], 1000)
    assert certified_prefix(counts, 0.02, 0.1) == 2
    assert certified_prefix(counts[:2], 0.02, 0.1) == 2
    assert certified_prefix(counts[2:], 0.02, 0.1) == 0


def test_running_bounds_certify_what_the_prefix_does():
    random = np.random.default_rng(0)
    counts = bad(np.sort(random.integers(0, 60, 30)).tolist()[::-1], 500)
    bounds = running_bounds(counts, 0.1)
    for epsilon in np.linspace(0.01, 0.2, 40):
        assert certified_prefix(counts, epsilon, 0.1) == (bounds <= epsilon).sum()
    assert (np.diff(bounds) >= 0).all()


def test_reach_bounds_share_delta_over_what_is_unknown():
    exits = np.array([[0] * 90 + [1] * 8 + [2] * 2, [1] * 100, [0] * 100])
    thresholds = [(0.5, 0.5, -1), (2, -1, -1), (-1, -1, -1)]
    bounds = reach_bounds(exits, thresholds, 3, 0.1)
    # Exit 0 is known; behind "always" nothing is reached; three numbers are left to bound.
    assert bounds[0, 1:] == pytest.approx(upper_bound(np.array([10, 2]), 100, 0.1 / 3))
    assert bounds[1].tolist() == [1, 1, 0]
    assert bounds[2].tolist() == [1, 0, 0]


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan")])
def test_epsilon_and_delta_lie_between_0_and_1(value):
    for call in (
        lambda: certified_prefix(bad([0], 9), value, 0.1),
        lambda: certified_prefix(bad([0], 9), 0.1, value),
        lambda: upper_bound(0, 9, value),
        lambda: reach_bounds(np.zeros((1, 9), int), [(0.5, 0.5)], 2, value),
    ):
        with pytest.raises(InputError, match="must lie between 0 and 1"):
            call()
    for arguments in ((value, 0.1), (0.1, value)):
        with pytest.raises(InputError, match="must lie between 0 and 1"):
            samples_needed(*arguments)

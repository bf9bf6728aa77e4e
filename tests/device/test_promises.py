import pytest
from scipy.stats import beta, binom

from edgeke.device.promises import samples_needed, upper_bound
from edgeke.errors import InputError


@pytest.mark.parametrize("samples", [1, 30, 360, 5000, 100_000])
@pytest.mark.parametrize("delta", [0.5, 0.1, 0.01, 1e-9])
def test_upper_bound_is_clopper_and_pearsons(samples, delta):
    for bad in {0, 1, samples // 100, samples // 2, samples - 1}:
        if bad < samples:
            expected = beta.isf(delta, bad + 1, samples - bad)
            assert upper_bound(bad, samples, delta) == pytest.approx(expected, abs=1e-9)
    assert upper_bound(samples, samples, delta) == 1


def test_a_large_delta_never_promises_less_than_was_observed():
    assert upper_bound(100, 1000, 0.9) == pytest.approx(0.1)


def test_a_bound_is_a_test_read_backwards():
    """At most 40 of 5,000 may be bad to certify 1 %."""
    assert binom.cdf(40, 5000, 0.01) <= 0.1 < binom.cdf(42, 5000, 0.01)
    assert upper_bound(40, 5000, 0.1) <= 0.01 < upper_bound(42, 5000, 0.1)


def test_samples_needed():
    assert samples_needed(0.01, 0.1) == 230
    assert upper_bound(0, 230, 0.1) <= 0.01 < upper_bound(0, 229, 0.1)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan")])
def test_probabilities_are_between_0_and_1(value):
    for call in (
        lambda: upper_bound(0, 9, value),
        lambda: samples_needed(value, 0.1),
        lambda: samples_needed(0.1, value),
    ):
        with pytest.raises(InputError, match="must be between 0 and 1"):
            call()

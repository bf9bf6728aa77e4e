import numpy as np
import pytest

from edgeke.device.scores import calibrated_probabilities
from edgeke.policy.intervals import share_interval
from edgeke.policy.temperatures import calibration_error, fit_temperature, negative_log_likelihood
from edgeke.policy.votes import fit_votes


def drawn(temperature: float, samples: int = 20_000):
    """Logits whose labels were drawn at a known temperature."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (samples, 4)).astype(np.float32)
    probabilities = calibrated_probabilities(logits[None], [temperature])[0].astype(float)
    cumulative = probabilities.cumsum(axis=1)
    labels = (random.random((samples, 1)) * cumulative[:, -1:] > cumulative).sum(axis=1)
    return logits, np.minimum(labels, 3)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_true_temperature_is_found(temperature):
    logits, labels = drawn(temperature)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


def test_the_right_temperature_has_the_least_calibration_error():
    logits, labels = drawn(3.0)
    raw = calibrated_probabilities(logits[None], [1.0])[0]
    scaled = calibrated_probabilities(logits[None], [3.0])[0]
    assert calibration_error(raw, labels) > 0.1
    assert calibration_error(scaled, labels) < 0.02
    assert negative_log_likelihood(logits, labels, 3.0) < negative_log_likelihood(
        logits, labels, 1.0
    )


def test_fitted_votes_beat_every_single_exit_and_equal_votes():
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 3000)
    exits = []
    for strength in (0.2, 1.0, 2.0):
        logits = random.normal(0, 1, (3000, 4))
        logits[np.arange(3000), labels] += strength
        exits.append(logits)
    probabilities = calibrated_probabilities(np.array(exits, np.float32), [1.0] * 3)

    def likelihood(votes):
        mixed = np.tensordot(votes, probabilities, axes=1)
        return np.log(mixed[np.arange(3000), labels]).mean()

    votes = fit_votes(probabilities, labels)
    assert sum(votes) == pytest.approx(1)
    assert min(votes) >= 0
    rivals = [*np.eye(3), np.full(3, 1 / 3), np.array([0.3, 0.3, 0.4])]
    assert all(likelihood(votes) >= likelihood(rival) - 1e-6 for rival in rivals)


def test_intervals_are_clopper_pearsons():
    # No failure in n trials: the one-sided bound is 1 - (alpha / 2)^(1 / n).
    low, high = share_interval(0, 50)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 50))


def test_no_error_on_few_samples_does_not_sharpen_without_end():
    labels = np.arange(40) % 4
    logits = 3 * np.eye(4, dtype=np.float32)[labels]
    assert 0.3 < fit_temperature(logits, labels) < 3
    scores = calibrated_probabilities(logits[None], [fit_temperature(logits, labels)])[0].max(-1)
    assert scores.max() < 0.9999

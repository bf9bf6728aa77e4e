import numpy as np
import pytest
from draws import draw

from edgeke.device.policy import force_exit
from edgeke.device.scores import calibrated_probabilities, max_probability
from edgeke.errors import InputError
from edgeke.policy.samples import ExitLogits, Samples

COSTS = (0.4, 0.7, 1.2)
VOTES = (0.2, 0.3, 0.5)


def make(samples: int = 400, reference: np.ndarray | None = None) -> Samples:
    split = draw(samples)
    probabilities = calibrated_probabilities(split.logits, [1.0] * 3)
    scores = max_probability(probabilities)
    return Samples.of(probabilities, scores, split.labels, VOTES, reference)


def test_results_by_hand():
    samples = make()
    full, first, vote = force_exit(2, 3), force_exit(0, 3), force_exit(3, 3)
    assert samples.cost(full, COSTS) == samples.cost(vote, COSTS) == pytest.approx(1.2)
    assert np.array_equal(samples.correct_at(full), samples.correct[2])
    assert np.array_equal(samples.correct_at(vote), samples.correct[3])
    assert not samples.degraded_at(full).any()
    assert np.array_equal(samples.degraded_at(first), samples.correct[2] & ~samples.correct[0])


def test_degradation_is_measured_against_the_reference():
    reference = np.arange(400) % 2 == 0
    samples = make(reference=reference)
    expected = reference & ~samples.correct[2]
    assert np.array_equal(samples.degraded_at(force_exit(2, 3)), expected)
    assert expected.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x[:1], y), "at least two"),
        (lambda x, y: (x[0], y), "at least two"),
        (lambda x, y: (x, y[:-1]), "30 samples and 29 labels"),
        (lambda x, y: (x[:, :0], y[:0]), "at least one sample"),
        (lambda x, y: (np.where(np.arange(30)[:, None] == 7, np.nan, x), y), "finite at sample 7"),
        (lambda x, y: (x, y + 4), "is not one of the 5 classes"),
        (lambda x, y: (x, y - 1), "label -1"),
    ],
)
def test_bad_logits_are_refused(change, words):
    split = draw(30)
    with pytest.raises(InputError, match=words):
        ExitLogits(*change(split.logits, split.labels))

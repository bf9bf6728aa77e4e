import numpy as np
import pytest
from draws import draw

from edgeke.device.policy import force_exit
from edgeke.device.scores import calibrated_probabilities, max_probability
from edgeke.errors import InputError
from edgeke.policy.samples import Samples, check_costs, check_logits

COSTS = (0.4, 0.7, 1.2)
VOTES = (0.2, 0.3, 0.5)


def make(samples: int = 400) -> Samples:
    logits, labels = draw(samples)
    probabilities = calibrated_probabilities(logits, [1.0] * 3)
    return Samples.of(probabilities, max_probability(probabilities), labels, VOTES)


def test_results_by_hand():
    samples = make()
    full = samples.result(force_exit(2, 3), COSTS)
    assert full.cost == pytest.approx(1.2)
    assert full.accuracy == samples.correct[2].mean()
    assert full.degradation == 0
    first = samples.result(force_exit(0, 3), COSTS)
    assert first.degradation == (samples.correct[2] & ~samples.correct[0]).mean()
    assert full.accuracy - first.accuracy <= first.degradation
    voted = samples.result(force_exit(3, 3), COSTS)
    assert voted.cost == pytest.approx(1.2)
    assert voted.accuracy == samples.correct[3].mean()


def test_likelihood_never_outweighs_an_answer():
    samples = make(50)
    for objective, worth in (
        ("accuracy", samples.correct),
        ("degradation", -1.0 * samples.degraded),
    ):
        extra = samples.gain(objective) - worth
        assert (extra <= 1e-12).all()
        assert extra.sum(axis=1).min() > -1


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
    logits, labels = change(*draw(30))
    with pytest.raises(InputError, match=words):
        check_logits(logits, np.asarray(labels))


@pytest.mark.parametrize("costs", [(1, 1, 2), (3, 2, 1), (1, 2), (0, 1, 2), (1, np.nan, 3)])
def test_costs_must_increase(costs):
    with pytest.raises(InputError, match="3 positive numbers that increase"):
        check_costs(costs, 3)

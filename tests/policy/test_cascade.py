import numpy as np
import pytest

from edgeke.device.policy import force_exit
from edgeke.device.scores import calibrated_probabilities, max_probability
from edgeke.policy.cascade import leave_at, run_cascade, vote


def answers(seed: int = 0, exits: int = 3, samples: int = 200, classes: int = 5):
    logits = np.random.default_rng(seed).normal(0, 3, (exits, samples, classes))
    probabilities = calibrated_probabilities(logits.astype(np.float32), [1.0, 1.5, 2.0][:exits])
    return probabilities, max_probability(probabilities)


def one_by_one(probabilities, scores, thresholds, votes):
    """The cascade as a device walks it."""
    exits, samples, _ = probabilities.shape
    for n in range(samples):
        for e in range(exits):
            if scores[e, n] > np.float32(thresholds[e]):
                yield e, probabilities[e, n]
                break
        else:
            weighted = sum(votes[e] * probabilities[e, n] for e in range(exits))
            yield exits, weighted / sum(votes)


@pytest.mark.parametrize("thresholds", [(0.9, 0.8, 0.7), (0.5, 2.0, 0.99), (2, 2, 2), (-1, 2, 2)])
def test_the_vectorised_cascade_equals_a_loop(thresholds):
    probabilities, scores = answers()
    votes = (0.3, 0.3, 0.4)
    outcome = run_cascade(probabilities, scores, thresholds, votes)
    for n, (exit, expected) in enumerate(one_by_one(probabilities, scores, thresholds, votes)):
        assert outcome.exit[n] == exit
        assert np.allclose(outcome.probabilities[n], expected, atol=1e-6)


def test_a_score_equal_to_its_threshold_stays():
    scores = np.array([[0.5], [0.5]], np.float32)
    assert leave_at(scores, (0.5, 0.4)).tolist() == [1]
    assert leave_at(scores, (0.5, 0.5)).tolist() == [2]


@pytest.mark.parametrize("exit", [0, 1, 2, 3])
def test_every_exit_can_be_forced(exit):
    probabilities, scores = answers()
    outcome = run_cascade(probabilities, scores, force_exit(exit, 3), (1, 1, 1))
    assert (outcome.exit == exit).all()


def test_votes_need_not_sum_to_one():
    probabilities, _ = answers()
    assert np.allclose(vote(probabilities, (3, 3, 4)), vote(probabilities, (0.3, 0.3, 0.4)))
    assert np.allclose(vote(probabilities, (3, 3, 4)).sum(-1), 1, atol=1e-6)

import numpy as np
import pytest

from edgeke.policy.exits import best_exit, last_useful


def answers(accuracies, samples=2000, seed=0):
    """Logits `[E, N, 4]` of exits that are equally sure and right on the easiest samples."""
    random = np.random.default_rng(seed)
    labels, hard = random.integers(0, 4, samples), random.random(samples)
    logits = random.normal(0, 0.5, (len(accuracies), samples, 4)).astype(np.float32)
    for exit, accuracy in enumerate(accuracies):
        top = np.where(hard < accuracy, labels, (labels + 1) % 4)
        logits[exit, np.arange(samples), top] += 3
    return logits, labels


@pytest.mark.parametrize(
    ("accuracies", "best", "last"),
    [
        ((0.8, 0.9, 0.95), 2, 2),
        ((0.95, 0.9, 0.6), 0, 1),  # no less than two exits
        ((0.8, 0.95, 0.6), 1, 1),
        ((0.8, 0.95, 0.6, 0.97), 3, 3),  # one in between stays: the unsure go on to the next
        ((0.8, 0.95, 0.9, 0.6), 1, 1),
    ],
)
def test_exits_that_know_less_than_an_earlier_one_are_not_useful(accuracies, best, last):
    logits, labels = answers(accuracies)
    assert (best_exit(logits, labels), last_useful(logits, labels)) == (best, last)


@pytest.mark.parametrize("seed", range(5))
def test_few_answers_of_many_are_no_reason_to_leave_an_exit_out(seed):
    """The last exit errs on eleven of 200 samples, the one before it on ten others."""
    logits, labels = answers((0.8, 1.0, 1.0), 200, seed)
    wrong = np.random.default_rng(seed).permutation(200)[:21]
    for exit, samples in ((1, wrong[:10]), (2, wrong[10:])):
        logits[exit, samples] = np.roll(logits[exit, samples], 1, axis=-1)
    assert (best_exit(logits, labels), last_useful(logits, labels)) == (1, 2)


def test_an_equal_exit_that_costs_more_is_not_useful():
    logits, labels = answers((0.8, 0.95))
    logits = np.concatenate([logits, logits[-1:]])
    assert (best_exit(logits, labels), last_useful(logits, labels)) == (1, 1)

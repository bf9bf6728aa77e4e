import numpy as np
import pytest
from draws import draw

from edgeke.device.scores import SCORES, Score, calibrated_probabilities
from edgeke.policy.learned import fit_learned
from edgeke.policy.ranking import area_under_risk_coverage, auroc


def test_plain_scores_by_hand():
    sure = np.array([[[1, 0, 0, 0]], [[0.25] * 4], [[0.5, 0.3, 0.2, 0]]], np.float32)
    found = {name: score(sure)[:, 0] for name, score in SCORES.items()}
    assert found["max_probability"] == pytest.approx([1, 0.25, 0.5])
    assert found["margin"] == pytest.approx([1, 0, 0.2])
    mixed = -(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2)) / np.log(4)
    assert found["entropy"] == pytest.approx([1, 0, 1 - mixed], abs=1e-6)


@pytest.mark.parametrize("name", [*SCORES, "learned"])
def test_every_score_lies_in_0_to_1(name):
    split = draw(300)
    for scale in (0.0, 1.0, 1e4):
        probabilities = calibrated_probabilities(scale * split.logits, [1.0] * 3)
        score = fit_learned(probabilities, split.labels) if name == "learned" else Score(name)
        scores = score.of(probabilities)
        assert scores.shape == (3, 300)
        assert scores.dtype == np.float32
        assert ((scores >= 0) & (scores <= 1)).all()


def test_the_learned_score_sees_what_one_exit_cannot():
    """Exit 1 is sure of everything; whether exit 0 agrees is all that tells right from wrong."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 4, 2000)
    answers = np.where(random.random(2000) < 0.3, (labels + 1) % 4, labels)
    probabilities = np.full((2, 2000, 4), 0.01, np.float32)
    probabilities[0, np.arange(2000), labels] = 0.97
    probabilities[1, np.arange(2000), answers] = 0.97
    right = answers == labels
    learned = fit_learned(probabilities[:, :1000], labels[:1000]).of(probabilities[:, 1000:])
    assert auroc(probabilities.max(axis=-1)[1, 1000:], right[1000:]) == 0.5
    assert auroc(learned[1], right[1000:]) == 1.0


def test_the_learned_score_survives_answers_without_an_error():
    probabilities = np.full((2, 20, 3), 0.05, np.float32)
    labels = np.arange(20) % 3
    probabilities[:, np.arange(20), labels] = 0.9
    scores = fit_learned(probabilities, labels).of(probabilities)
    assert np.isfinite(scores).all()
    assert (scores > 0.8).all()


def test_ranking_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    right = np.array([True, False, True, True])
    assert area_under_risk_coverage(scores, right) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 4) / 4)
    assert auroc(scores, right) == pytest.approx(1 / 3)
    perfect = np.array([True, True, True, False])
    assert auroc(scores, perfect) == 1
    assert area_under_risk_coverage(scores, perfect) == pytest.approx(1 / 16)

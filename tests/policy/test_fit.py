import numpy as np
import pytest
from draws import draw, settings

from edgeke.policy.fit import fit_policy
from edgeke.policy.tuning import cross_fit, rank_scores, tune

MACS, MAIN = (40, 70, 120), 100


def own_accuracy(fitted, samples) -> dict[str, float]:
    return {c.name: samples.correct_at(c.thresholds).mean() for c in fitted.candidates}


def test_cross_fitting_takes_the_flattery_out():
    """On few samples the thresholds' own accuracy is too good; left-out samples tell better."""
    flattered, crossed, truth = [], [], []
    pool = draw(20_000, seed=99)
    for seed in range(12):
        validation = draw(80, seed)
        fitted, _ = fit_policy(validation, MACS, MAIN, settings(points=20))
        flattering = own_accuracy(fitted, fitted.tuning.samples(validation))
        true = own_accuracy(fitted, fitted.tuning.samples(pool))
        names = [name for name in flattering if name.startswith("cost")]
        flattered += [flattering[name] for name in names]
        crossed += [fitted.validation_accuracy[name] for name in names]
        truth += [true[name] for name in names]
    assert np.mean(flattered) - np.mean(truth) > 0.01
    assert abs(np.mean(crossed) - np.mean(truth)) < (np.mean(flattered) - np.mean(truth)) / 2


def test_all_candidates_are_judged_on_one_scale():
    """Cross-fitted on few samples, `proportions` too; on many by their own accuracy."""
    for count in (100, 2000):
        validation = draw(count)
        fitted, _ = fit_policy(validation, MACS, MAIN, settings())
        own = own_accuracy(fitted, fitted.tuning.samples(validation))
        for name in ("proportions", "full", "exit_0"):
            same = fitted.validation_accuracy[name] == pytest.approx(own[name])
            assert same == (count == 2000 or name != "proportions"), name


def test_the_best_score_is_the_one_with_the_least_aurc():
    split = draw(400)
    name, metrics = rank_scores(split, cross_fit(split, settings()))
    risks = {
        score: metrics[f"score/{score}/exit_0/aurc"] + metrics[f"score/{score}/exit_1/aurc"]
        for score in ("max_probability", "margin", "entropy", "learned")
    }
    assert name == min(risks, key=lambda score: risks[score])
    assert all(0.5 < metrics[f"score/{score}/exit_2/auroc"] <= 1 for score in risks)
    assert fit_policy(split, MACS, MAIN, settings(score="best"))[0].tuning.score.name == name
    assert fit_policy(split, MACS, MAIN, settings(score="margin"))[0].tuning.score.name == "margin"


def test_published_votes_and_temperatures_are_taken_as_they_are():
    split = draw(200)
    fixed = settings(votes=(0.3, 0.3, 0.4), temperatures="none")
    fitted, _ = fit_policy(split, MACS, MAIN, fixed)
    assert fitted.tuning.votes == (0.3, 0.3, 0.4)
    assert fitted.tuning.temperatures == (1, 1, 1)
    assert tune(split, settings()).temperatures != (1, 1, 1)


def test_of_all_images_the_published_shares_leave():
    split = draw(1000)
    shares = {"of_all": [0.5, 0.3, 0.1]}
    fitted, _ = fit_policy(split, MACS, MAIN, settings(proportions=shares))
    samples = fitted.tuning.samples(split)
    left = np.bincount(samples.exits(fitted.proportions.thresholds), minlength=4) / 1000
    assert left.tolist() == pytest.approx([0.5, 0.3, 0.1, 0.1], abs=0.002)

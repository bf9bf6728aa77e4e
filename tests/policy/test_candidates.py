import itertools

import pytest
from draws import draw

from edgeke.policy.candidates import SMALL, budgets, cross_fitted_accuracy, propose
from edgeke.policy.tuning import rank_scores, tune

COSTS = (0.4, 0.7, 1.2)


def test_budgets_are_the_same_for_everybody():
    assert budgets(0.4, 0.6, 0.05) == pytest.approx([0.6, 0.55, 0.5, 0.45, 0.4])
    assert budgets(0.42, 0.58, 0.05) == pytest.approx([0.58, 0.55, 0.5, 0.45, 0.42])
    assert budgets(0.4, 0.5, 1.0) == pytest.approx([0.5, 0.4])


def test_sequences_run_from_cautious_to_bold():
    logits, labels = draw(500)
    samples = tune(logits, labels, "max_probability").samples(logits, labels)
    sequences = propose(samples, COSTS, 0.1)
    assert set(sequences) == {(o, cap) for o in ("accuracy", "degradation") for cap in range(3)}
    for (objective, cap), sequence in sequences.items():
        results = [samples.result(c.thresholds, COSTS) for c in sequence]
        for cautious, bold in itertools.pairwise(results):
            worse = bold.accuracy <= cautious.accuracy
            assert worse if objective == "accuracy" else bold.degradation >= cautious.degradation
        assert results[-1].cost == pytest.approx(0.4)
        for candidate in sequence:
            assert samples.exits(candidate.thresholds).max() <= (3 if cap == 2 else cap)
    assert sequences["degradation", 2][0].name == "full"
    assert sequences["degradation", 2][0].thresholds == (2, 2, -1)
    assert sequences["accuracy", 0] == sequences["degradation", 0]
    names = [c.name for c in sequences["accuracy", 2]]
    assert names[:3] == ["accuracy_1.200", "accuracy_1.100", "accuracy_1.000"]


def test_cross_fitting_takes_the_flattery_out():
    """On few samples the thresholds' own accuracy is too good; left-out samples tell better."""
    flattered, crossed, truth = [], [], []
    pool, pool_labels = draw(20_000, seed=99)
    for seed in range(12):
        logits, labels = draw(80, seed)
        tuning = tune(logits, labels, "max_probability")
        samples, unseen = tuning.samples(logits, labels), tuning.samples(pool, pool_labels)
        found = cross_fitted_accuracy(logits, labels, COSTS, "max_probability", 0.1)
        for candidate in propose(samples, COSTS, 0.1)["accuracy", 2]:
            flattered.append(samples.result(candidate.thresholds, COSTS).accuracy)
            truth.append(unseen.result(candidate.thresholds, COSTS).accuracy)
            crossed.append(found[candidate.name])
    mean = lambda values: sum(values) / len(values)  # noqa: E731
    assert mean(flattered) - mean(truth) > 0.01
    assert abs(mean(crossed) - mean(truth)) < (mean(flattered) - mean(truth)) / 2


def test_large_sets_need_no_cross_fitting():
    assert cross_fitted_accuracy(*draw(SMALL), COSTS, "max_probability", 0.1) == {}


def test_the_best_score_is_the_one_with_the_least_aurc():
    name, metrics = rank_scores(*draw(400))
    risks = {
        score: metrics[f"score/{score}/exit_0/aurc"] + metrics[f"score/{score}/exit_1/aurc"]
        for score in ("max_probability", "margin", "entropy", "learned")
    }
    assert name == min(risks, key=lambda score: risks[score])
    assert all(0.5 < metrics[f"score/{score}/exit_2/auroc"] <= 1 for score in risks)

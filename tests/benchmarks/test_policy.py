import numpy as np
import pytest
from draws import draw, settings

from benchmarks.policy import eenet, safe_kd
from edgeke.policy.tuning import tune

COSTS = (0.3, 0.6, 1.0)


def test_the_rules_of_others_by_hand():
    split = draw(999)
    samples = tune(split, settings()).samples(split)
    probability = samples.answers[0, np.arange(999), split.labels]  # of the true class at exit 0
    first, _, last = safe_kd(samples, 0.1)
    assert last == -1
    # The 900th smallest of 1 - p: one in ten images has a true class less likely than that.
    assert first == pytest.approx(np.sort(probability)[99], abs=1e-6)
    thresholds = eenet(samples, COSTS, 0.65)
    assert samples.cost(thresholds, COSTS) == pytest.approx(0.65, abs=0.01)

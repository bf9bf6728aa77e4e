import numpy as np

from edgeke.device.policy import ALWAYS, NEVER
from edgeke.policy.cascade import leave_at
from edgeke.policy.thresholds import threshold_for_share, thresholds_for_proportions


def scores(exits: int = 3, samples: int = 1000) -> np.ndarray:
    return np.random.default_rng(0).random((exits, samples)).astype(np.float32)


def test_proportions_are_counted_over_survivors():
    all_scores = scores()
    proportions = (0.5, 0.4, 0.9)
    thresholds = thresholds_for_proportions(all_scores, proportions)
    exit = leave_at(all_scores, thresholds)
    counts = np.bincount(exit, minlength=4)
    assert counts.tolist() == [500, 200, 270, 30]


def test_ranking_all_samples_as_the_published_code_does_misses_the_shares():
    # Correlated exits: who survives exit 0 is unsure at exit 1, too.
    base = np.random.default_rng(1).random(1000).astype(np.float32)
    correlated = np.stack([base, base, base])
    published = [float(np.sort(s)[::-1][500]) for s in correlated]
    assert (leave_at(correlated, published) == 1).sum() == 0
    ours = thresholds_for_proportions(correlated, (0.5, 0.5, 0.5))
    assert (leave_at(correlated, ours) == 1).sum() == 250


def test_equal_scores_stay_together():
    at_exit = np.array([1.0] * 6 + [0.5] * 4, np.float32)
    assert threshold_for_share(at_exit, 0.5) == 0.75  # 6 leave: nearest to 5
    assert threshold_for_share(at_exit, 0.2) == NEVER  # 0 is nearer to 2 than 6
    assert threshold_for_share(at_exit, 0.9) == ALWAYS

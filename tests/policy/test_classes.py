import numpy as np
import pytest

from edgeke.policy.classes import class_metrics, class_rows

NAMES = ("good", "scratch", "crack")
LABELS = np.array([0, 0, 0, 0, 1, 1, 2, 2])
ANSWERS = np.array([0, 0, 0, 1, 1, -1, 0, 0])


def test_recall_precision_and_f1_by_hand():
    rows = {row["class"]: row for row in class_rows(ANSWERS, LABELS, NAMES)}
    good, scratch, crack = (rows[name] for name in NAMES)
    assert (good["recall"], good["precision"]) == (3 / 4, 3 / 5)
    assert good["f1"] == pytest.approx(2 * 0.75 * 0.6 / 1.35)
    assert (scratch["recall"], scratch["precision"]) == (1 / 2, 1 / 2)
    assert (crack["recall"], crack["precision"], crack["f1"]) == (0, None, 0)
    # By SciPy's binomtest: 3 of 4.
    assert good["recall_low"] == pytest.approx(0.1941, abs=1e-4)
    assert good["recall_high"] == pytest.approx(0.9937, abs=1e-4)
    metrics = class_metrics([good, scratch, crack])
    assert metrics["macro_f1"] == pytest.approx((good["f1"] + 0.5) / 3)
    assert metrics["least_recall"] == 0

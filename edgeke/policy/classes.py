"""What answers are worth class by class: recall, precision, F1."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeke.policy.intervals import share_interval

Row = dict[str, object]


def class_rows(
    answers: NDArray[np.int64], labels: NDArray[np.int64], classes: Sequence[str]
) -> list[Row]:
    """One row per class: recall and precision with 95 % intervals (Clopper-Pearson), and F1.

    `answers` and `labels` `[N]`; an answer of -1 is none. Recall is None for a class without
    images, precision for one that is never answered; F1 then is 0, or None where both are.
    """
    rows: list[Row] = []
    for number, name in enumerate(classes):
        images, answered = labels == number, answers == number
        right, both = int((images & answered).sum()), int(images.sum() + answered.sum())
        row: Row = {"class": name, "images": int(images.sum()), "answered": int(answered.sum())}
        for key, among in (("recall", images), ("precision", answered)):
            trials = int(among.sum())
            low, high = share_interval(right, trials) if trials else (None, None)
            row |= {key: right / trials if trials else None}
            row |= {f"{key}_low": low, f"{key}_high": high}
        rows.append({**row, "f1": 2 * right / both if both else None})
    return rows


def class_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """`macro_f1`, the mean of F1 over the classes, and `least_recall`, that of the worst class."""
    f1 = [row["f1"] for row in rows if isinstance(row["f1"], float)]
    recall = [row["recall"] for row in rows if isinstance(row["recall"], float)]
    return {"macro_f1": float(np.mean(f1)), "least_recall": min(recall)}

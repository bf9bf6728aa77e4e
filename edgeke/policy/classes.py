"""What answers are worth class by class: recall, precision, F1, classes that are never named."""

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


def useless(
    answers: NDArray[np.int64], labels: NDArray[np.int64], classes: Sequence[str]
) -> str | None:
    """Why such answers are of little use, in words; None where nothing is to be said.

    A class that has images is never answered, or fewer answers are right than if every answer were
    the commonest class.
    """
    counts = np.bincount(labels, minlength=len(classes))
    never = [classes[k] for k in np.unique(labels) if not (answers == k).any()]
    right, commonest = float((answers == labels).mean()), int(counts.argmax())
    always = float(counts[commonest] / len(labels))
    reasons = []
    if never:
        some = ", ".join(never[:5]) + (f" and {len(never) - 5} more" if len(never) > 5 else "")
        reasons.append(f"never answers {some}")
    if right < always:
        reasons.append(
            f"is right in {right:.3f} of the images, where answering {classes[commonest]} always "
            f"would be in {always:.3f}"
        )
    return " and ".join(reasons) or None

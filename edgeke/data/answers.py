"""Whether a network's answers are of any use: for the stages that train, and for evaluation."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def never_answered(answers: NDArray[np.int64], labels: NDArray[np.int64]) -> list[int]:
    """The classes that have images and that no answer names; answers and labels `[N]`."""
    never: list[int] = np.setdiff1d(labels, answers).tolist()
    return never


def useless(
    answers: NDArray[np.int64], labels: NDArray[np.int64], classes: Sequence[str]
) -> str | None:
    """Why such answers are of little use, in words; None where nothing is to be said.

    A class that has images is never answered, or fewer answers are right than if every answer were
    the commonest class. Where no class has most of the images, they must be more by what chance may
    add, two standard deviations.
    """
    never = [classes[k] for k in never_answered(answers, labels)]
    counts = np.bincount(labels, minlength=len(classes))
    right, commonest = float((answers == labels).mean()), int(counts.argmax())
    always = float(counts[commonest] / len(labels))
    spread = math.sqrt(always * (1 - always) / len(labels))
    reasons = []
    if never:
        some = ", ".join(never[:5]) + (f" and {len(never) - 5} more" if len(never) > 5 else "")
        reasons.append(f"never answers {some}")
    if right < always or (always <= 0.5 and right <= always + 2 * spread):
        reasons.append(
            f"is right in {right:.3f} of the images, where answering {classes[commonest]} always "
            f"would be in {always:.3f}"
        )
    return " and ".join(reasons) or None

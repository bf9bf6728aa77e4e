"""Distances D(student, teacher) between softened class distributions.

Each is a pure function `(student_logits, teacher_logits, temperature) -> distance [...]` over
logits `[..., K]`; one per file.
"""

from collections.abc import Callable

from torch import Tensor

from edgeke.learning.distances.js import js
from edgeke.learning.distances.kl import kl
from edgeke.learning.distances.wasserstein import wasserstein

__all__ = ["DISTANCES", "Distance", "js", "kl", "wasserstein"]

Distance = Callable[[Tensor, Tensor, float], Tensor]

DISTANCES: dict[str, Distance] = {"kl": kl, "js": js, "wasserstein": wasserstein}

"""Distances D(student, teacher) between softened class distributions.

Each is a pure function of logits `[..., K]` and a temperature, one per file; two need more: the
labels, or the costs between classes.
"""

from collections.abc import Callable

from torch import Tensor

from edgeke.learning.distances.dkd import dkd
from edgeke.learning.distances.js import js
from edgeke.learning.distances.kl import kl
from edgeke.learning.distances.wasserstein import wasserstein
from edgeke.learning.distances.wasserstein_classes import class_costs, wasserstein_classes

__all__ = [
    "DISTANCES",
    "Distance",
    "class_costs",
    "dkd",
    "js",
    "kl",
    "wasserstein",
    "wasserstein_classes",
]

# (student logits [..., N, K], teacher logits, temperature, labels [N], class costs [K, K])
Distance = Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]

DISTANCES: dict[str, Distance] = {
    "kl": lambda s, t, temperature, labels, costs: kl(s, t, temperature),
    "js": lambda s, t, temperature, labels, costs: js(s, t, temperature),
    "wasserstein": lambda s, t, temperature, labels, costs: wasserstein(s, t, temperature),
    "wasserstein_classes": lambda s, t, temperature, labels, costs: wasserstein_classes(
        s, t, temperature, costs
    ),
    "dkd": lambda s, t, temperature, labels, costs: dkd(s, t, temperature, labels),
}

"""Entries of lists in params.yaml: `calibrate.requirements`."""

from dataclasses import dataclass

from edgeke.schema import require

__all__ = ["Requirement"]


@dataclass(frozen=True)
class Requirement:
    """Exactly one of a greatest mean cost, a least accuracy and a greatest loss.

    `max_cost` is a share of the plain main network's MACs; `max_degradation` is the share of images that
    the full network answers right and the early answer wrong. `delta` is the risk that the promise
    fails over the draw of the calibration split (left out: `calibrate.delta`).
    """

    max_cost: float | None
    min_accuracy: float | None
    max_degradation: float | None
    delta: float | None

    optional_keys = True  # a missing key is null

    def __post_init__(self) -> None:
        given = [self.max_cost, self.min_accuracy, self.max_degradation].count(None) == 2
        require(given, "max_cost", "give exactly one of max_cost, min_accuracy and max_degradation")
        cost, floor, loss = self.max_cost, self.min_accuracy, self.max_degradation
        require(cost is None or cost > 0, "max_cost", "use a share above 0, such as 0.9")
        require(floor is None or 0 < floor < 1, "min_accuracy", "use a number between 0 and 1")
        require(loss is None or 0 < loss < 1, "max_degradation", "use a number between 0 and 1")
        require(self.delta is None or 0 < self.delta < 1, "delta", "use a risk between 0 and 1")
        joint = cost is not None and self.delta is not None
        require(not joint, "delta", "costs are promised together at calibrate.delta; set that")

    @property
    def kind(self) -> str:
        """`max_cost`, `min_accuracy` or `max_degradation`."""
        named = ("max_cost", "min_accuracy", "max_degradation")
        return next(name for name in named if getattr(self, name) is not None)

    @property
    def bound(self) -> float:
        """The number that is asked for."""
        return float(getattr(self, self.kind))

    @property
    def name(self) -> str:
        """How metrics call it: `max_degradation_0.03`, `max_degradation_0.03_delta_0.05`."""
        risk = "" if self.delta is None else f"_delta_{self.delta:g}"
        return f"{self.kind}_{self.bound:g}{risk}"

    def __str__(self) -> str:
        return self.name

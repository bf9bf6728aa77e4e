"""A cluster behind `edgeke.serving`: its protocol, its requirements, the plan's costs."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from edgeke.cluster.engine import ClusterSegments, Engine
from edgeke.cluster.plan import Plan
from edgeke.device.classifier import Classifier
from edgeke.serving.application import Server
from edgeke.serving.batches import Batches
from edgeke.serving.costs import SegmentCosts

# How many times the expected time an answer may take at worst: what deadlines are compared with.
_WORST = 2.0


class ClusterClassifier(Classifier):
    """A classifier whose segments are computed by a cluster."""

    def __init__(self, engine: Engine, *arguments: Any) -> None:
        """`arguments`: those of `Classifier`."""
        super().__init__(*arguments)
        self._cluster = ClusterSegments(engine, self.policy)

    def open_segments(self) -> ClusterSegments:
        """The cluster's."""
        return self._cluster


@dataclass
class ClusterServer(Server):
    """A bundle behind HTTP, answered by a cluster."""

    engine: Engine | None = field(default=None)

    def check(self) -> Classifier:
        """The bundle, opened. Errors: InputError when it cannot be served."""
        assert self.engine is not None
        made = self.settings
        return ClusterClassifier(self.engine, made.bundle, made.precision, made.threads)

    def _open(self) -> Batches:
        assert self.engine is not None
        costs = plan_costs(self.engine.plan)
        return Batches(self.check(), 1, self.settings.longest, known=costs)


def plan_costs(plan: Plan) -> SegmentCosts:
    """What each segment costs by the plan; images of a batch go one after the other."""
    first = tuple(max(after - before, 1e-6) for before, after in pairwise([0.0, *plan.seconds]))
    return SegmentCosts(first, first, (_WORST,) * len(first))

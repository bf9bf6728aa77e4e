"""The steps of the campaign in their order, and how many epochs of each fit into the time left."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from edgeke.learning.orders import ORDERS
from edgeke.networks.architecture import Architecture
from edgeke.params import Params

__all__ = ["ROW_EPOCHS", "Costs", "Step", "asked_epochs", "full_epochs", "make_steps", "schedule"]

_Kind = Literal["teacher", "branch", "branchynet"]

ROW_EPOCHS = 30  # of one row of the paper's table
_LEAST = 1 / 3  # a table shorter than this share of what was asked says too little
_OUTPUTS = 0.2  # of an epoch: the logits of 15,000 images


@dataclass(frozen=True)
class Step:
    """One network to train. Steps of a group are scheduled together.

    `epochs` are asked for, per phase; where it is 0 the step gets `share` of what the steps in
    `budget_of` got, so that contenders train equally long. `starts` names the steps whose networks
    its order starts from, `exit` the branch that is trained alone.
    """

    name: str
    group: str
    kind: _Kind
    epochs: int = 0
    budget_of: tuple[str, ...] = ()
    share: float = 1.0
    phases: int = 1
    seed: int = 0  # added to the campaign's
    teacher: str = "teacher"
    distance: str | None = None  # None: the parameters' own
    source: str | None = None
    backbone: str | None = None
    layout: str = "stages"
    order: str = "mixed"
    exit: int = -1
    starts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()

    @property
    def cost(self) -> str:
        """Steps with the same are taken to need the same time for an epoch."""
        return "class_aware" if self.distance == "wasserstein_classes" else self.kind


@dataclass(frozen=True)
class Costs:
    """Measured seconds of an epoch and, once for every phase, of starting, by `Step.cost`."""

    epoch: Mapping[str, float]
    start: Mapping[str, float]

    def seconds(self, step: Step, epochs: int) -> float:
        """What a step takes, its logits included."""
        return self.fixed(step) + step.phases * epochs * self.epoch[step.cost]

    def fixed(self, step: Step) -> float:
        """What it takes whatever its epochs."""
        return step.phases * self.start[step.cost] + _OUTPUTS * self.epoch[step.cost]


def make_steps(params: Params, cap: int | None) -> tuple[Step, ...]:
    """All steps, most important first; `cap` is the longest schedule (None: as the recipes say)."""
    recipes = params.profile.recipes
    teacher, distill, exits, row = (
        min(epochs, cap or epochs)
        for epochs in (
            recipes.train_teacher.epochs,
            recipes.distill.epochs,
            recipes.train_branchynet.epochs,
            ROW_EPOCHS,
        )
    )
    return (
        Step("teacher", "headline", "teacher", teacher),
        Step("main", "headline", "branch", distill, needs=("teacher",)),
        _exits("branchynet", "headline", "main", "teacher", epochs=exits),
        _plain("plain_resnet18", "headline", ("main", "branchynet")),
        *_distances(row),
        *_orders(params.profile.student.network),
        _distance("wasserstein_classes", "class_aware", budget_of=("distance.kl",)),
        _plain("static_resnet10", "static", ("plain_resnet18",), backbone="resnet10"),
        Step("second.teacher", "seed", "teacher", budget_of=("teacher",), seed=1),
        _plain("second.main", "seed", ("main",), teacher="second.teacher", seed=1, layout="stages"),
        _exits(
            "second.branchynet",
            "seed",
            "second.main",
            "second.teacher",
            budget_of=("branchynet",),
            seed=1,
        ),
        _plain(
            "second.plain_resnet18", "seed", ("plain_resnet18",), teacher="second.teacher", seed=1
        ),
    )


def _plain(name: str, group: str, budget_of: tuple[str, ...], **more: object) -> Step:
    """A single-exit network under the teacher, as long as the named steps together."""
    teacher = str(more.get("teacher", "teacher"))
    return Step(name, group, "branch", budget_of=budget_of, needs=(teacher,), **more)  # type: ignore[arg-type]


def _exits(name: str, group: str, main: str, teacher: str, **more: object) -> Step:
    """The headline's own network: all exits jointly, from the main branch on."""
    needs = (main, teacher)
    return Step(name, group, "branchynet", teacher=teacher, starts=(main,), needs=needs, **more)  # type: ignore[arg-type]


def _distances(row: int) -> list[Step]:
    """One row per distance; the class-aware one, slow on some machines, comes by itself."""
    rest = ("js", "wasserstein", "none")
    return [
        _distance("kl", "distances", epochs=row),
        *(_distance(name, "distances", budget_of=("distance.kl",)) for name in rest),
    ]


def _distance(distance: str, group: str, **more: object) -> Step:
    """The paper's layout, all exits together under the teacher."""
    return Step(
        f"distance.{distance}",
        group,
        "branchynet",
        distance=distance,
        source="teacher",
        layout="edgeke",
        order="synchronous",
        needs=("teacher",),
        **more,  # type: ignore[arg-type]
    )


def _orders(backbone: str) -> list[Step]:
    """The paper's layout, one row per order: `distance.kl` is the synchronous one.

    Its epochs are shared out evenly over the branch an order starts from and its phases.
    """
    steps = []
    depths = Architecture.with_layout("edgeke", backbone, 8, 1, 2).depths
    for name in ("asynchronous", "asynchronous_back", "mixed"):
        order = ORDERS[name](depths)
        share = 1 / (len(order.starts) + len(order.phases))
        start, common = f"order.{name}.start", ("distance.kl",)
        fixed = {"share": share, "source": "teacher", "layout": "edgeke", "distance": "kl"}
        (exit,) = order.starts
        steps += [
            _plain(start, "orders", common, exit=exit, **fixed),
            Step(
                f"order.{name}",
                "orders",
                "branchynet",
                budget_of=common,
                phases=len(order.phases),
                order=name,
                starts=(start,),
                needs=(start, "teacher"),
                **fixed,  # type: ignore[arg-type]
            ),
        ]
    return steps


def asked_epochs(step: Step, planned: Mapping[str, int]) -> int:
    """Epochs a step should get, given those of the steps it is compared with; 0: none got any."""
    if not step.budget_of:
        return step.epochs
    budget = sum(planned.get(name, 0) for name in step.budget_of)
    return max(1, math.floor(budget * step.share + 1e-9)) if budget else 0


def full_epochs(steps: Sequence[Step]) -> dict[str, int]:
    """What every step would get with time enough."""
    asked: dict[str, int] = {}
    for step in steps:
        asked[step.name] = asked_epochs(step, asked)
    return asked


def schedule(
    steps: Sequence[Step], planned: Mapping[str, int], costs: Costs, left: float
) -> dict[str, int]:
    """Epochs for the steps of one group that are still to do, in `left` seconds.

    The headline is shortened until it fits, whatever that takes, and never below one epoch.
    Distances are shortened alike, to a third at least. Whatever has to train as long as something
    before it runs in full, first ones first, or not at all. Steps that get none are left out.
    """
    asked: dict[str, int] = {}
    for step in steps:
        asked[step.name] = asked_epochs(step, {**planned, **asked})
    headline = steps[0].group == "headline"
    if headline or steps[0].epochs:
        share = _share(steps, asked, costs, left)
        if share < _LEAST and not headline:
            return {}
        given = dict(planned)
        for step in steps:
            of_own = max(1, math.floor(asked[step.name] * share))
            given[step.name] = of_own if step.epochs else asked_epochs(step, given)
        return {step.name: given[step.name] for step in steps if given[step.name]}
    found = {}
    for step in steps:
        left -= costs.seconds(step, asked[step.name])
        if left < 0 or not asked[step.name]:
            break
        found[step.name] = asked[step.name]
    return found


def _share(steps: Sequence[Step], asked: Mapping[str, int], costs: Costs, left: float) -> float:
    fixed = sum(costs.fixed(step) for step in steps)
    full = sum(costs.seconds(step, asked[step.name]) for step in steps) - fixed
    return min(1.0, max(0.0, left - fixed) / full) if full else 0.0

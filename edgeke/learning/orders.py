"""Orders: which exits learn when, and what is frozen meanwhile. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """Train `exits` and the trunk in front of them, except its first `frozen` blocks.

    Those stay as they are, batch-norm statistics included.
    """

    exits: tuple[int, ...]
    frozen: int


@dataclass(frozen=True)
class Order:
    """The distilled branches an order starts from, and its phases.

    `shared` is false where every branch keeps a trunk of its own. `paper_factor` is the weight of
    T^2 D beside a whole CE under `kd.paper_weights`; None keeps the weights 1 - beta and beta.
    """

    starts: tuple[int, ...]
    phases: tuple[Phase, ...]
    shared: bool = True
    paper_factor: float | None = None


def independent(attached: tuple[int, ...]) -> Order:
    """The distilled branches side by side: nothing is shared, nothing is trained again."""
    return Order(tuple(range(len(attached))), (), shared=False)


def synchronous(attached: tuple[int, ...]) -> Order:
    """All together from fresh weights: every parameter moves under the weighted sum of losses."""
    return Order((), (Phase(tuple(range(len(attached))), 0),))


def asynchronous(attached: tuple[int, ...]) -> Order:
    """Deepest first (the paper's): starts from the distilled main branch.

    Then every earlier exit, deep to shallow: only its own body and head move, the whole trunk in
    front of it is frozen.
    """
    last = len(attached) - 1
    return Order((last,), tuple(Phase((e,), attached[e]) for e in reversed(range(last))))


def asynchronous_back(attached: tuple[int, ...]) -> Order:
    """Shallowest first (the paper's): starts from the distilled branch 0.

    Then every deeper exit: its own body and head move, and the trunk blocks after the previous
    attach point; everything the previous exits use is frozen.
    """
    phases = tuple(Phase((e,), attached[e - 1]) for e in range(1, len(attached)))
    return Order((0,), phases, paper_factor=2.0)


def mixed(attached: tuple[int, ...]) -> Order:
    """Main network first, then all jointly: starts from the distilled main branch.

    Then every parameter moves under the weighted sum of losses ("How to train your multi-exit
    model", ICML 2025).
    """
    return Order((len(attached) - 1,), synchronous(attached).phases)


def with_codec(order: Order, attached: tuple[int, ...], after: int) -> Order:
    """The order with a last phase for all that is behind exit `after`; a joint phase needs none."""
    if any(_joint(phase, attached) for phase in order.phases):
        return order
    behind = Phase(tuple(range(after + 1, len(attached))), attached[after])
    return replace(order, phases=(*order.phases, behind))


def without_codec(order: Order, attached: tuple[int, ...]) -> tuple[Order, Phase | None]:
    """The order that `with_codec` was given, and the phase that it added."""
    if any(_joint(phase, attached) for phase in order.phases):
        return order, None
    return replace(order, phases=order.phases[:-1]), order.phases[-1]


def _joint(phase: Phase, attached: tuple[int, ...]) -> bool:
    return len(phase.exits) == len(attached)


ORDERS: dict[str, Callable[[tuple[int, ...]], Order]] = {
    "independent": independent,
    "synchronous": synchronous,
    "asynchronous": asynchronous,
    "asynchronous_back": asynchronous_back,
    "mixed": mixed,
}

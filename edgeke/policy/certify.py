"""From frozen candidates and the calibration split to a policy with promises."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.policy import Answer, OperatingPoint, Policy, Promise
from edgeke.params import Requirement
from edgeke.policy.candidates import Candidate, Sequences
from edgeke.policy.intervals import share_interval
from edgeke.policy.promises import reach_bounds, running_bounds
from edgeke.policy.samples import Samples, check_logits
from edgeke.policy.tuning import Tuning

__all__ = ["Frozen", "certify"]


@dataclass(frozen=True)
class Frozen:
    """Everything that was chosen on validation. `costs` `[E]` are MACs.

    `sequences` are certified in their order; `extra` candidates are reported without promises on
    their accuracy. `validation_accuracy` by candidate's name.
    """

    tuning: Tuning
    sequences: Sequences
    extra: tuple[Candidate, ...]
    validation_accuracy: dict[str, float]
    macs: tuple[int, ...]
    main_macs: int

    def unique(self) -> list[Candidate]:
        """Each set of thresholds once, under its first name."""
        every = [c for sequence in self.sequences.values() for c in sequence]
        first: dict[tuple[float, ...], Candidate] = {}
        for candidate in sorted([*every, *self.extra], key=lambda c: c.name != "full"):
            first.setdefault(candidate.thresholds, candidate)
        return list(first.values())


def certify(
    frozen: Frozen,
    logits: NDArray[np.float32],
    labels: NDArray[np.int64],
    delta: float,
    asked: Sequence[Requirement],
) -> Policy:
    """Use the calibration split, logits `[E, N, K]` and labels `[N]`, this once.

    Promises are certified at `delta` and at every delta that a requirement asks for. A requirement
    that cannot be met is recorded as such, with the nearest that can.
    """
    check_logits(logits, labels)
    samples = frozen.tuning.samples(logits, labels)
    deltas = sorted({delta, *(of.delta for of in asked if of.delta is not None)})
    promises = _promises(frozen.sequences, samples, deltas)
    unique, exits = frozen.unique(), len(logits)
    taken = [samples.exits(candidate.thresholds) for candidate in unique]
    reach = reach_bounds(np.stack(taken), [c.thresholds for c in unique], exits, delta)
    points = []
    for candidate, exit, upper in zip(unique, taken, reach, strict=True):
        paid = np.bincount(np.minimum(exit, exits - 1), minlength=exits)
        wrong = int(samples.wrong(candidate.thresholds).sum())
        points.append(
            OperatingPoint(
                name=candidate.name,
                thresholds=candidate.thresholds,
                votes=frozen.tuning.votes,
                shares=tuple((paid / len(labels)).tolist()),
                reach_upper=tuple(upper.tolist()),
                voted=float((exit == exits).mean()),
                validation_accuracy=frozen.validation_accuracy[candidate.name],
                accuracy=1 - wrong / len(labels),
                accuracy_interval=share_interval(len(labels) - wrong, len(labels)),
                degradation=float(samples.degradations(candidate.thresholds).mean()),
                promises=promises.get(candidate.thresholds, ()),
            )
        )
    points.sort(key=lambda p: (-p.promised_cost(frozen.macs), p.name != "full"))
    policy = Policy(
        score=frozen.tuning.score.name,
        score_weights=frozen.tuning.score.weights,
        temperatures=frozen.tuning.temperatures,
        macs=frozen.macs,
        main_macs=frozen.main_macs,
        samples=len(labels),
        delta=delta,
        points=tuple(points),
        requirements=(),
        default="full",
    )
    answered = tuple(_answer(policy, of) for of in asked)
    met = [of.point for of in answered if of.point is not None]
    return dataclasses.replace(policy, requirements=answered, default=[*met, "full"][0])


def _promises(
    sequences: Sequences, samples: Samples, deltas: Iterable[float]
) -> dict[tuple[float, ...], tuple[Promise, ...]]:
    """The promises of every candidate's thresholds; a later equal one adds nothing."""
    found: dict[tuple[float, ...], dict[tuple[str, float, int], Promise]] = {}
    for (objective, cap), sequence in sequences.items():
        kind = "max_degradation" if objective == "degradation" else "max_error"
        judge = samples.degradations if objective == "degradation" else samples.wrong
        bad = np.stack([judge(candidate.thresholds) for candidate in sequence])
        for delta in deltas:
            for candidate, bound in zip(sequence, running_bounds(bad, delta), strict=True):
                promise = Promise(kind, float(bound), delta, cap)
                of = found.setdefault(candidate.thresholds, {})
                of.setdefault((kind, delta, cap), promise)
    return {thresholds: tuple(of.values()) for thresholds, of in found.items()}


def _answer(policy: Policy, asked: Requirement) -> Answer:
    delta = policy.delta if asked.delta is None else asked.delta
    key = "mean_cost" if asked.kind == "max_cost" else asked.kind
    point, nearest = None, None
    try:
        request = Request(**{key: asked.bound, "delta": delta})
        point = choose(policy, request, policy.cost_shares).name
    except UnmetError as error:
        nearest = error.nearest
    return Answer(asked.name, asked.kind, asked.bound, delta, point, nearest)

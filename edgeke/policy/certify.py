"""From frozen candidates and the calibration split to a policy with promises."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.policy import Evidence, OperatingPoint, Policy, RequirementResult
from edgeke.params import Calibrate, Requirement
from edgeke.policy.candidates import Candidate, FixedSequence
from edgeke.policy.fit import FittedPolicy
from edgeke.policy.samples import ExitLogits, Samples


def certify(fitted: FittedPolicy, calibration: ExitLogits, settings: Calibrate) -> Policy:
    """Count on the calibration split, this once, what the frozen candidates answer.

    A requirement that cannot be met is recorded as such, with the nearest that can. The default is
    the cheapest point that keeps all quality requirements (`max_degradation`, `min_accuracy`) at
    once; without any it is the point of the first `max_cost`. Where there is no such point, it is
    `full`, or the most accurate on validation where `full` is clearly worse there.
    """
    samples = fitted.tuning.samples(calibration)
    evidence: dict[tuple[float, ...], list[Evidence]] = {}
    for sequence in fitted.sequences:
        for candidate, item in zip(sequence.candidates, _evidence(sequence, samples), strict=True):
            evidence.setdefault(candidate.thresholds, []).append(item)
    points = [_point(candidate, fitted, samples, evidence) for candidate in fitted.candidates]
    costs = [macs / fitted.main_macs for macs in fitted.macs]
    points.sort(key=lambda point: (point.name != "full", -point.expected_cost(costs)))
    policy = Policy(
        score=fitted.tuning.score.name,
        score_weights=fitted.tuning.score.weights,
        temperatures=fitted.tuning.temperatures,
        macs=fitted.macs,
        main_macs=fitted.main_macs,
        delta=settings.delta,
        points=tuple(points),
        requirements=(),
        default="full",
    )
    results = tuple(_result(policy, requirement) for requirement in settings.requirements)
    return dataclasses.replace(policy, requirements=results, default=_default(policy, results))


def _evidence(sequence: FixedSequence, samples: Samples) -> list[Evidence]:
    degraded = [samples.degraded_at(candidate.thresholds) for candidate in sequence.candidates]
    wrong = [~samples.correct_at(candidate.thresholds) for candidate in sequence.candidates]
    counts = zip(
        _worst(degraded, sequence.for_degradation), _worst(wrong, sequence.for_error), strict=True
    )
    return [Evidence(sequence.cap, *both) for both in counts]


def _worst(bad: list[NDArray[np.bool_]], tested: Sequence[bool]) -> list[int | None]:
    """The greatest count of bad samples among each candidate and the tested ones before it."""
    counts = np.where(tested, [each.sum() for each in bad], 0)
    running = np.maximum.accumulate(counts).tolist()
    return [count if test else None for count, test in zip(running, tested, strict=True)]


def _point(
    candidate: Candidate,
    fitted: FittedPolicy,
    samples: Samples,
    evidence: Mapping[tuple[float, ...], list[Evidence]],
) -> OperatingPoint:
    exit, exits = samples.exits(candidate.thresholds), len(fitted.macs)
    return OperatingPoint(
        name=candidate.name,
        thresholds=candidate.thresholds,
        votes=fitted.tuning.votes,
        samples=len(exit),
        reached=tuple(int((exit >= e).sum()) for e in range(exits)),
        voted=int((exit == exits).sum()),
        wrong=int((~samples.correct_at(candidate.thresholds)).sum()),
        degraded=int(samples.degraded_at(candidate.thresholds).sum()),
        validation_accuracy=fitted.validation_accuracy[candidate.name],
        evidence=tuple(evidence.get(candidate.thresholds, ())),
    )


def _result(policy: Policy, requirement: Requirement) -> RequirementResult:
    delta = policy.delta if requirement.delta is None else requirement.delta
    key = "mean_cost" if requirement.kind == "max_cost" else requirement.kind
    point, nearest = None, None
    try:
        request = Request(**{key: requirement.bound, "delta": delta})
        point = choose(policy, request, policy.cost_shares).name
    except UnmetError as error:
        nearest = error.nearest
    bound = requirement.bound
    return RequirementResult(requirement.name, requirement.kind, bound, delta, point, nearest)


def _default(policy: Policy, results: Sequence[RequirementResult]) -> str:
    cap, costs = len(policy.macs) - 1, policy.cost_shares
    quality = [result for result in results if result.kind != "max_cost"]
    if not quality:
        return next((result.point for result in results if result.point is not None), "full")

    def keeps(point: OperatingPoint, result: RequirementResult) -> bool:
        if result.kind == "min_accuracy":
            return 1 - point.promised("max_error", result.delta, cap) >= result.bound - 1e-12
        return point.promised("max_degradation", result.delta, cap) <= result.bound + 1e-12

    kept = [p for p in policy.points if all(keeps(p, result) for result in quality)]
    if kept:
        return min(kept, key=lambda p: p.expected_cost(costs)).name
    full = policy.point("full")
    if not any(item.cap == cap and item.wrong is None for item in full.evidence):
        return full.name
    # It is clearly worse on validation than a cheaper point, so its error was not tested.
    best = max(policy.points, key=lambda p: (p.validation_accuracy, -p.expected_cost(costs)))
    return best.name

"""From frozen candidates and the calibration split to a policy with promises."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeke.device.choice import ClassShare, Request, UnmetError, choose
from edgeke.device.policy import (
    Evidence,
    Inspection,
    OperatingPoint,
    Policy,
    RequirementResult,
)
from edgeke.params import Calibrate, Requirement
from edgeke.policy.candidates import Candidate, FixedSequence
from edgeke.policy.families import Family, pairs_so_far
from edgeke.policy.fit import FittedPolicy
from edgeke.policy.samples import EitherSamples, ExitLogits, Samples


def certify(
    fitted: FittedPolicy,
    calibration: ExitLogits,
    settings: Calibrate,
    other: ExitLogits | None = None,
) -> Policy:
    """Count on the calibration split, this once, what the frozen candidates answer.

    `other` is another answer to the same images, which may come in place of the first: each image
    counts by the worse of the two.

    A requirement that cannot be met is recorded as such, with the nearest that can. The default is
    the cheapest point that keeps all quality requirements (`max_degradation`, `min_accuracy`,
    `max_miss`) at once; without any it is the point of the first requirement. Where there is no
    such point, it is `full`, or the most accurate on validation where `full` is clearly worse
    there.
    """
    samples = fitted.tuning.samples(calibration)
    if other is not None:
        samples = EitherSamples(**vars(samples), other=fitted.tuning.samples(other))
    evidence: dict[tuple[float, ...], list[Evidence]] = {}
    for sequence in fitted.sequences:
        for candidate, item in zip(sequence.candidates, _evidence(sequence, samples), strict=True):
            evidence.setdefault(candidate.thresholds, []).append(item)
    inspections: dict[Candidate, list[Inspection]] = {}
    for tested, inspection in _inspections(fitted, samples):
        inspections.setdefault(tested, []).append(inspection)
    known = {c.thresholds: c for c in fitted.candidates}
    for tested in [c for c in inspections if not c.bias and not c.unsure]:
        same = known[tested.thresholds]  # by another name in another sequence
        if same != tested:
            inspections[same] = [*inspections.get(same, ()), *inspections.pop(tested)]
    points = [
        _point(candidate, fitted, samples, evidence, inspections) for candidate in fitted.candidates
    ]
    costs = [macs / fitted.main_macs for macs in fitted.macs]
    points.sort(key=lambda point: (point.name != "full", -point.expected_cost(costs)))
    others = [_point(candidate, fitted, samples, {}, inspections) for candidate in fitted.others]
    policy = Policy(
        score=fitted.tuning.score.name,
        score_weights=fitted.tuning.score.weights,
        temperatures=fitted.tuning.temperatures,
        macs=fitted.macs,
        main_macs=fitted.main_macs,
        delta=settings.delta,
        points=(*points, *others),
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


def _inspections(fitted: FittedPolicy, samples: Samples) -> Iterator[tuple[Candidate, Inspection]]:
    """What calibration says of risks among some of the images, by tested candidate."""
    for sequence in fitted.sequences:
        for label, name in fitted.miss:
            tested = [
                candidate
                for candidate, test in zip(
                    sequence.candidates, sequence.for_miss[label], strict=True
                )
                if test
            ]
            inside = samples.labels == label
            images = int(inside.sum())
            counts = [
                (int(samples.degraded_at(c.thresholds)[inside].sum()), images) for c in tested
            ]
            for candidate, count, worst in zip(tested, counts, pairs_so_far(counts), strict=True):
                yield candidate, Inspection("max_miss", name, sequence.cap, *count, worst)
    for family in fitted.families:
        answers = [samples.labels_at(c.thresholds, c.bias, c.unsure) for c in family.candidates]
        counts = [_counts(family, answer, samples.labels) for answer in answers]
        tested_so_far = zip(family.candidates, answers, counts, pairs_so_far(counts), strict=True)
        for candidate, answer, count, worst in tested_so_far:
            other = answer[samples.labels != family.label]
            alarms = None if family.label is None else int((other == family.label).sum())
            inspection = Inspection(family.risk, family.class_name, None, *count, worst, alarms)
            yield candidate, inspection


def _counts(
    family: Family, answers: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[int, int]:
    """How many of the images that a family's risk is about are bad, and how many there are."""
    about = answers >= 0 if family.label is None else labels == family.label
    return int((answers != labels)[about].sum()), int(about.sum())


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
    inspections: Mapping[Candidate, list[Inspection]],
) -> OperatingPoint:
    exit, exits = samples.exits(candidate.thresholds), len(fitted.macs)
    answers = samples.labels_at(candidate.thresholds, candidate.bias, candidate.unsure)
    wrong = answers != samples.labels
    return OperatingPoint(
        name=candidate.name,
        thresholds=candidate.thresholds,
        votes=fitted.tuning.votes,
        samples=len(exit),
        reached=tuple(int((exit >= e).sum()) for e in range(exits)),
        voted=int((exit == exits).sum()),
        wrong=int(wrong.sum()),
        degraded=int((samples.reference & wrong).sum()),
        validation_accuracy=fitted.validation_accuracy[candidate.name],
        evidence=tuple(evidence.get(candidate.thresholds, ())),
        bias=candidate.bias,
        unsure=candidate.unsure,
        inspections=tuple(inspections.get(candidate, ())),
    )


def _result(policy: Policy, requirement: Requirement) -> RequirementResult:
    delta = policy.delta if requirement.delta is None else requirement.delta
    key = "mean_cost" if requirement.kind == "max_cost" else requirement.kind
    point, nearest, few = None, None, None
    name = requirement.class_name
    value = requirement.bound if name is None else ClassShare(name, requirement.bound)
    try:
        requested: dict[str, Any] = {key: value, "delta": delta}
        request = Request(**requested)
        point = choose(policy, request, policy.cost_shares).name
    except UnmetError as error:
        nearest, few = error.nearest, error.few or None
    bound = requirement.bound
    return RequirementResult(
        requirement.name, requirement.kind, bound, delta, point, nearest, name, few
    )


def _default(policy: Policy, results: Sequence[RequirementResult]) -> str:
    cap, costs = len(policy.macs) - 1, policy.cost_shares
    quality = [r for r in results if r.kind in ("max_degradation", "min_accuracy", "max_miss")]
    if not quality:
        return next((result.point for result in results if result.point is not None), "full")

    def keeps(point: OperatingPoint, result: RequirementResult) -> bool:
        if result.kind == "min_accuracy":
            return 1 - point.promised("max_error", result.delta, cap) >= result.bound - 1e-12
        if result.kind == "max_miss":
            bound = point.promised("max_miss", result.delta, cap, result.class_name)
        else:
            bound = point.promised("max_degradation", result.delta, cap)
        return bound <= result.bound + 1e-12

    kept = [p for p in policy.points if all(keeps(p, result) for result in quality)]
    if kept:
        return min(kept, key=lambda p: p.expected_cost(costs)).name
    full = policy.point("full")
    if not any(item.cap == cap and item.wrong is None for item in full.evidence):
        return full.name
    # It is clearly worse on validation than a cheaper point, so its error was not tested.
    best = max(policy.points, key=lambda p: (p.validation_accuracy, -p.expected_cost(costs)))
    return best.name

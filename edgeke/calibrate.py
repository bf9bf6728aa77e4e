"""Stage `calibrate`: from logits to operating points, and the one file that obeys them."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeke.data.dataset import Split, channels_last
from edgeke.device.bundle import segments_hash
from edgeke.device.manifest import Manifest
from edgeke.device.policy import Answer, Policy, force_exit
from edgeke.device.scores import Score, calibrated_probabilities, vote
from edgeke.device.session import open_session
from edgeke.graph.compose import compose_cascade
from edgeke.graph.parity import check_close, check_exits
from edgeke.graph.runner import segment_logits
from edgeke.params import Calibrate
from edgeke.policy.candidates import Candidate, cross_fitted_accuracy, propose
from edgeke.policy.cascade import run_cascade
from edgeke.policy.certify import Frozen, certify
from edgeke.policy.samples import check_costs, check_logits
from edgeke.policy.temperatures import (
    calibration_error,
    negative_log_likelihood,
    reliability,
)
from edgeke.policy.thresholds import thresholds_for_proportions
from edgeke.policy.tuning import Tuning, folds, rank_scores, tune

__all__ = [
    "Answers",
    "Calibrated",
    "calibrate",
    "check_composed",
    "compose",
    "exit_quality",
    "freeze",
    "point_metrics",
    "promised",
    "reliability_rows",
    "tuning_of",
    "vote_quality",
]

# Probabilities of the composed file and of NumPy differ by rounding alone.
_TOLERANCE = 1e-5
_IMAGES = 500


@dataclass(frozen=True)
class Answers:
    """What the segments answered on one split: logits `[E, N, K]` and labels `[N]`."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Calibrated:
    """A policy, the one file that carries it, and what was measured on the way.

    `logits` `[E, N, K]` by split; `reliability` holds the rows of the diagram.
    """

    policy: Policy
    model: bytes
    metrics: dict[str, float]
    logits: dict[str, NDArray[np.float32]]
    reliability: list[dict[str, object]]


def calibrate(
    segments: Sequence[Path],
    manifest: Manifest,
    validation: Split,
    calibration: Split,
    settings: Calibrate,
) -> Calibrated:
    """Fit a policy to what the segments answer, certify it, and compose the one file.

    Errors: InputError when the file does not compute its policy.
    """
    seen, held = (
        Answers(segment_logits(segments, channels_last(split.images), 0), split.labels)
        for split in (validation, calibration)
    )
    frozen, metrics = freeze(seen, manifest.macs, manifest.main_macs, settings)
    policy = certify(frozen, held.logits, held.labels, settings.delta, settings.requirements)
    metrics |= point_metrics(policy, seen)
    metrics |= exit_quality(seen, policy.temperatures, "validation")
    metrics |= exit_quality(held, policy.temperatures, "calibration")
    model = compose(segments, policy, manifest)
    metrics |= check_composed(model, policy, seen, validation)
    logits = {"validation": seen.logits, "calibration": held.logits}
    rows = reliability_rows(held, policy.temperatures)
    return Calibrated(policy, model, metrics, logits, rows)


def freeze(
    validation: Answers, macs: Sequence[int], main_macs: int, settings: Calibrate
) -> tuple[Frozen, dict[str, float]]:
    """Choose the score and fit temperatures, votes and candidate thresholds, on validation alone.

    `macs` `[E]` are given as shares of the plain main network's `main_macs`. Errors: InputError
    for logits, labels or costs that no policy can be fitted on.
    """
    logits, labels = validation.logits, validation.labels
    check_logits(logits, labels)
    check_costs(macs, len(logits))
    costs = [m / main_macs for m in macs]
    best, ranked = rank_scores(logits, labels)
    metrics = {f"validation/{key}": value for key, value in ranked.items()}
    tuning = tune(logits, labels, best if settings.score == "best" else settings.score)
    samples = tuning.samples(logits, labels)
    sequences = propose(samples, costs, settings.cost_step)
    asked = thresholds_for_proportions(samples.scores, settings.shares(len(costs)))
    extra = (Candidate("proportions", asked),)
    accuracy = {
        candidate.name: samples.result(candidate.thresholds, costs).accuracy
        for candidate in (*itertools.chain.from_iterable(sequences.values()), *extra)
    }
    step, name = settings.cost_step, tuning.score.name
    accuracy |= cross_fitted_accuracy(logits, labels, costs, name, step)
    metrics |= vote_quality(validation)
    frozen = Frozen(tuning, sequences, extra, accuracy, tuple(macs), main_macs)
    return frozen, metrics


def vote_quality(validation: Answers) -> dict[str, float]:
    """Accuracy and likelihood of the vote on validation: fitted, with fixed weights, and none.

    Cross-fitted. The fixed weights are the paper's 0.3, 0.3, 0.4, in that proportion for any number
    of exits; without a vote the main exit answers.
    """
    logits, labels = validation.logits, validation.labels
    exits, every = len(logits), np.arange(len(labels))
    weights = {"fixed": [0.3] * (exits - 1) + [0.4], "none": [0.0] * (exits - 1) + [1.0]}
    answers = {name: np.empty(logits.shape[1:], np.float32) for name in ("fitted", *weights)}
    for tuning, held in folds(logits, labels, partial(tune, score="max_probability")):
        probabilities = tuning.probabilities(logits[:, held])
        for name, of in {"fitted": tuning.votes, **weights}.items():
            answers[name][held] = vote(probabilities, of)
    metrics = {}
    for name, answer in answers.items():
        metrics[f"validation/vote/{name}/accuracy"] = float((answer.argmax(-1) == labels).mean())
        likelihood = np.log(answer[every, labels].astype(np.float64) + 1e-12)
        metrics[f"validation/vote/{name}/negative_log_likelihood"] = float(-likelihood.mean())
    return metrics


def point_metrics(policy: Policy, validation: Answers) -> dict[str, float]:
    """What the named points gave on validation and calibration, and what requirements promise."""
    costs = policy.cost_shares
    samples = tuning_of(policy).samples(validation.logits, validation.labels)
    metrics: dict[str, float] = {}
    for label, point in policy.named.items():
        metrics |= {
            f"validation/{label}/accuracy": point.validation_accuracy,
            f"validation/{label}/cost_share": samples.result(point.thresholds, costs).cost,
            f"calibration/{label}/accuracy": point.accuracy,
            f"calibration/{label}/degradation": point.degradation,
            f"calibration/{label}/cost_share": point.expected_cost(costs),
            f"calibration/{label}/promised_cost_share": point.promised_cost(costs),
        }
    for asked in policy.requirements:
        metrics[f"calibration/{asked.name}/met"] = float(asked.point is not None)
        if asked.point is not None:
            metrics[f"calibration/{asked.name}/promised"] = promised(policy, asked)
        elif asked.nearest is not None:
            metrics[f"calibration/{asked.name}/nearest"] = asked.nearest
    return metrics


def promised(policy: Policy, asked: Answer) -> float:
    """The bound that the answer to a met requirement promises: at least as good as asked."""
    point, cap = policy.named[asked.name], len(policy.macs) - 1
    if asked.kind == "max_cost":
        return point.promised_cost(policy.cost_shares)
    if asked.kind == "min_accuracy":
        return 1 - point.promised("max_error", asked.delta, cap)
    return point.promised("max_degradation", asked.delta, cap)


def tuning_of(policy: Policy) -> Tuning:
    """What a policy says about turning logits into answers."""
    score = Score(policy.score, policy.score_weights)
    return Tuning(policy.temperatures, policy.points[0].votes, score)


def exit_quality(answers: Answers, temperatures: Sequence[float], split: str) -> dict[str, float]:
    """Per exit and for the temperatures: accuracy, and calibration error before and after."""
    raw = calibrated_probabilities(answers.logits, [1.0] * len(answers.logits))
    scaled = calibrated_probabilities(answers.logits, temperatures)
    metrics: dict[str, float] = {}
    for exit, temperature in enumerate(temperatures):
        before, after = raw[exit], scaled[exit]
        right = (before.argmax(-1) == answers.labels).mean()
        loss = negative_log_likelihood(answers.logits[exit], answers.labels, temperature)
        metrics |= {
            f"{split}/exit_{exit}/accuracy": float(right),
            f"{split}/exit_{exit}/negative_log_likelihood": loss,
            f"{split}/exit_{exit}/ece_uncalibrated": calibration_error(before, answers.labels),
            f"{split}/exit_{exit}/ece": calibration_error(after, answers.labels),
        }
    return metrics


def reliability_rows(answers: Answers, temperatures: Sequence[float]) -> list[dict[str, object]]:
    """The reliability diagram of every exit, as rows of a table."""
    probabilities = calibrated_probabilities(answers.logits, temperatures)
    return [
        {"exit": f"exit {exit}", **row}
        for exit in range(len(probabilities))
        for row in reliability(probabilities[exit], answers.labels)
    ]


def compose(segments: Sequence[Path], policy: Policy, manifest: Manifest) -> bytes:
    """The one file: the segments in one model, with what a device must know in its metadata.

    That is the policy, class names, input shape `[H, W, C]`, significant bits of 16-bit pictures,
    and the segments' hash, by which a device tells whether the segments beside the file are its.
    """
    metadata = {
        "policy": json.dumps(policy.to_json()),
        "classes": json.dumps(list(manifest.classes)),
        "image_shape": json.dumps(list(manifest.image_shape)),
        "bits": json.dumps(manifest.bits),
        "segments_sha256": segments_hash(segments),
    }
    model = compose_cascade(
        [onnx.load(segment) for segment in segments],
        score=Score(policy.score, policy.score_weights),
        temperatures=policy.temperatures,
        image_shape=manifest.image_shape,
        classes=len(manifest.classes),
        metadata=metadata,
    )
    return bytes(model.SerializeToString())


def check_composed(
    model: bytes, policy: Policy, answers: Answers, split: Split
) -> dict[str, float]:
    """Compare the file with the vectorised cascade: named points, forced exits, the vote and more.

    Of the other points eight are taken, spread from conservative to aggressive. Runs up to 500 images of the
    split that `answers` belongs to. Errors: InputError when exits differ away from ties or
    probabilities differ at all.
    """
    session = open_session(model)
    pixels = channels_last(split.images[:_IMAGES])
    probabilities = calibrated_probabilities(answers.logits, policy.temperatures)[:, :_IMAGES]
    scores = Score(policy.score, policy.score_weights).of(probabilities)
    exits = len(probabilities)
    votes = policy.points[0].votes
    spread = np.linspace(0, len(policy.points) - 1, 8).astype(int)
    checked = [*policy.named.values(), *(policy.points[i] for i in spread)]
    settings = {point.name: point.thresholds for point in checked}
    settings |= {f"exit {e}": force_exit(e, exits) for e in range(exits)}
    settings["vote"] = force_exit(exits, exits)
    ties, difference = 0, 0.0
    for name, thresholds in settings.items():
        limits = np.asarray(thresholds, np.float32)
        feeds = {"thresholds": limits, "votes": np.asarray(votes, np.float32)}
        ran = [session.run(None, {"image": image[None], **feeds}) for image in pixels]
        found = np.concatenate([answer for answer, _ in ran])
        found_exit = np.concatenate([exit for _, exit in ran])
        expected = run_cascade(probabilities, scores, thresholds, votes)
        ties += check_exits(found_exit, expected.exit, scores, limits, _TOLERANCE)
        same = found_exit == expected.exit
        difference = max(
            difference,
            check_close(
                f"the composed file at {name}",
                found[same],
                expected.probabilities[same],
                _TOLERANCE,
            ),
        )
    return {
        "validation/composed/parity_difference": difference,
        "validation/composed/ties": ties,
    }

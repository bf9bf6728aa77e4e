"""Stage `calibrate`: from logits to operating points, and the one file that obeys them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from edgeke.data.dataset import Split
from edgeke.device.policy import OperatingPoint, Policy, force_exit
from edgeke.device.session import open_session
from edgeke.graph.compose import compose_cascade
from edgeke.graph.parity import check_close, check_exits
from edgeke.graph.runner import channels_last
from edgeke.params import Calibrate
from edgeke.policy.cascade import run_cascade
from edgeke.policy.frontier import Samples, fit_frontier, judge
from edgeke.policy.intervals import share_interval
from edgeke.policy.scores import SCORES, calibrated_probabilities
from edgeke.policy.temperatures import (
    calibration_error,
    fit_temperature,
    negative_log_likelihood,
    reliability,
)
from edgeke.policy.thresholds import thresholds_for_proportions
from edgeke.policy.votes import fit_votes

__all__ = ["Answers", "check_composed", "compose", "exit_quality", "fit_policy", "reliability_rows"]

# Probabilities of the composed file and of NumPy differ by rounding alone.
_TOLERANCE = 1e-5
_IMAGES = 500


@dataclass(frozen=True)
class Answers:
    """What the segments answered on one split: logits `[E, N, K]` and labels `[N]`."""

    logits: NDArray[np.float32]
    labels: NDArray[np.int64]


def fit_policy(
    validation: Answers,
    calibration: Answers,
    macs: Sequence[int],
    main_macs: int,
    settings: Calibrate,
) -> tuple[Policy, dict[str, float]]:
    """Fit temperatures, votes and operating points on validation; report them on calibration.

    Points: the full network, the one with the asked proportions, and the frontier, ordered
    cautious to bold. The default is the cheapest whose validation accuracy is not below the full
    network's. Calibration is read after everything is frozen. `macs` `[E]` are given as shares of
    the plain main network's `main_macs`.
    """
    temperatures = [fit_temperature(at_exit, validation.labels) for at_exit in validation.logits]
    score = SCORES[settings.score]
    probabilities = calibrated_probabilities(validation.logits, temperatures)
    scores = score(probabilities)
    votes = fit_votes(probabilities, validation.labels)
    samples = Samples.of(probabilities, scores, validation.labels, votes)
    costs = [m / main_macs for m in macs]

    candidates = {
        "full": judge(force_exit(len(macs) - 1, len(macs)), samples, costs),
        "proportions": judge(
            thresholds_for_proportions(scores, settings.proportions), samples, costs
        ),
    }
    frontier = fit_frontier(samples, costs, settings.frontier_points)
    named = {candidate.thresholds for candidate in candidates.values()}
    new = [candidate for candidate in frontier if candidate.thresholds not in named]
    candidates |= {f"frontier_{i}": candidate for i, candidate in enumerate(new, 1)}
    ordered = sorted(candidates, key=lambda name: (-candidates[name].cost, name != "full"))
    enough = candidates["full"].accuracy
    default = [name for name in ordered if candidates[name].accuracy >= enough][-1]

    frozen = calibrated_probabilities(calibration.logits, temperatures)
    points: list[OperatingPoint] = []
    metrics: dict[str, float] = {}
    for name in ordered:
        candidate = candidates[name]
        outcome = run_cascade(frozen, score(frozen), candidate.thresholds, votes)
        accuracy, count = outcome.accuracy(calibration.labels), len(calibration.labels)
        point = OperatingPoint(
            name=name,
            thresholds=candidate.thresholds,
            votes=votes,
            shares=outcome.shares(len(macs)),
            voted=float((outcome.exit == len(macs)).mean()),
            accuracy=accuracy,
            accuracy_interval=share_interval(round(accuracy * count), count),
            accuracy_samples=count,
        )
        points.append(point)
        metrics |= {
            f"validation/{name}/accuracy": candidate.accuracy,
            f"validation/{name}/cost_share": candidate.cost,
            f"calibration/{name}/accuracy": accuracy,
            f"calibration/{name}/cost_share": float(np.dot(point.shares, costs)),
        }
    policy = Policy(settings.score, tuple(temperatures), tuple(macs), tuple(points), default)
    return policy, metrics


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


def compose(
    segments: Sequence[Path],
    policy: Policy,
    classes: Sequence[str],
    image_shape: tuple[int, int, int],
) -> bytes:
    """The one file: segments, policy, class names and input shape `[H, W, C]` in one model."""
    metadata = {
        "policy": json.dumps(policy.to_json()),
        "classes": json.dumps(list(classes)),
        "image_shape": json.dumps(list(image_shape)),
    }
    model = compose_cascade(
        [onnx.load(segment) for segment in segments],
        score=policy.score,
        temperatures=policy.temperatures,
        image_shape=image_shape,
        classes=len(classes),
        metadata=metadata,
    )
    return bytes(model.SerializeToString())


def check_composed(
    model: bytes, policy: Policy, answers: Answers, split: Split
) -> dict[str, float]:
    """Compare the file with the vectorised cascade at every point, forced exit and the vote.

    Runs up to 500 images of the split that `answers` belongs to. Errors: InputError when exits
    differ away from ties or probabilities differ at all.
    """
    session = open_session(model)
    pixels = channels_last(split.images[:_IMAGES])
    probabilities = calibrated_probabilities(answers.logits, policy.temperatures)[:, :_IMAGES]
    scores = SCORES[policy.score](probabilities)
    exits = len(probabilities)
    votes = policy.points[0].votes
    settings = {point.name: point.thresholds for point in policy.points}
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

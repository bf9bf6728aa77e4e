"""What a calibrated policy is worth, as metrics, and the rows of the reliability diagram."""

from collections.abc import Sequence
from typing import cast

from edgeke.device.policy import Policy, RequirementResult, Risk
from edgeke.device.scores import Score, calibrated_probabilities
from edgeke.policy.samples import ExitLogits
from edgeke.policy.temperatures import calibration_error, negative_log_likelihood, reliability
from edgeke.policy.tuning import Tuning


def point_metrics(policy: Policy, validation: ExitLogits) -> dict[str, float]:
    """What named points gave on validation and calibration, and what requirements are promised."""
    costs = policy.cost_shares
    score = Score(policy.score, policy.score_weights)
    samples = Tuning(policy.temperatures, policy.points[0].votes, score).samples(validation)
    metrics: dict[str, float] = {}
    for label, point in policy.named.items():
        metrics |= {
            f"validation/{label}/accuracy": point.validation_accuracy,
            f"validation/{label}/cost_share": samples.cost(point.thresholds, costs),
            f"calibration/{label}/accuracy": point.accuracy,
            f"calibration/{label}/degradation": point.degradation,
            f"calibration/{label}/cost_share": point.expected_cost(costs),
            f"calibration/{label}/promised_cost_share": policy.promised_cost(point, costs),
        }
        if point.unsure:
            metrics[f"calibration/{label}/automation"] = point.automation
        for each in point.inspections:
            if each.false_alarms is not None:
                metrics[f"calibration/{label}/false_alarms"] = each.false_alarms / point.samples
    for result in policy.requirements:
        metrics[f"calibration/{result.name}/met"] = float(result.point is not None)
        if result.point is not None:
            metrics[f"calibration/{result.name}/promised"] = _promised(policy, result)
        elif result.nearest is not None:
            metrics[f"calibration/{result.name}/nearest"] = result.nearest
    return metrics


def _promised(policy: Policy, result: RequirementResult) -> float:
    """What the point of a met requirement promises: at least as good as required."""
    point, cap = policy.named[result.name], len(policy.macs) - 1
    if result.kind == "max_cost":
        return policy.promised_cost(point, policy.cost_shares, result.delta)
    if result.kind == "min_accuracy":
        return 1 - point.promised("max_error", result.delta, cap)
    risk: Risk = "max_degradation"
    if result.kind in ("max_miss", "min_recall", "max_sure_error"):
        risk = cast(Risk, result.kind)
    bound = point.promised(risk, result.delta, cap, result.class_name)
    return 1 - bound if result.kind == "min_recall" else bound


def exit_metrics(split: ExitLogits, temperatures: Sequence[float], name: str) -> dict[str, float]:
    """Per exit of a split: accuracy, and calibration error before and after its temperature."""
    raw = calibrated_probabilities(split.logits, [1.0] * len(split.logits))
    scaled = calibrated_probabilities(split.logits, temperatures)
    metrics: dict[str, float] = {}
    for exit, temperature in enumerate(temperatures):
        right = (raw[exit].argmax(-1) == split.labels).mean()
        likelihood = negative_log_likelihood(split.logits[exit], split.labels, temperature)
        metrics |= {
            f"{name}/exit_{exit}/accuracy": float(right),
            f"{name}/exit_{exit}/negative_log_likelihood": likelihood,
            f"{name}/exit_{exit}/ece_uncalibrated": calibration_error(raw[exit], split.labels),
            f"{name}/exit_{exit}/ece": calibration_error(scaled[exit], split.labels),
        }
    return metrics


def reliability_rows(split: ExitLogits, temperatures: Sequence[float]) -> list[dict[str, object]]:
    """The reliability diagram of every exit, as rows of a table."""
    probabilities = calibrated_probabilities(split.logits, temperatures)
    return [
        {"exit": f"exit {exit}", **row}
        for exit in range(len(probabilities))
        for row in reliability(probabilities[exit], split.labels)
    ]

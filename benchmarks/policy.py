"""How good the thresholds are, how long they take, and how often promises hold.

    python -m benchmarks.policy [--peers] [--models FOLDER [--dataset FILE] [--errors 0.2 0.1]]

Logits are drawn with a known law (deeper exits are surer, hard images are hard for all), so that
truth can be counted on 200,000 samples. Compares the solver with every combination of thresholds
in steps of 0.01, times whole fits, and simulates 1,000 calibration draws. Then the rules of others
(`--peers`: only those): how often what each promises is broken. With `--models` not on drawn
logits, but on what the exits of a bundle answer: a folder with edgeke.int8.onnx or edgeke.onnx,
such as the `models/` of a project. Rules are fitted on validation; calibration and test together
are the truth from which as many images as calibration has are drawn. `--errors` are the promised
errors. The last line is JSON.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from edgeke.data.dataset import channels_last, load_dataset
from edgeke.device.choice import Request, UnmetError, choose
from edgeke.device.classifier import Classifier
from edgeke.params import Calibrate, Requirement
from edgeke.policy.certify import certify
from edgeke.policy.fit import fit_policy
from edgeke.policy.samples import ExitLogits, Samples
from edgeke.policy.solver import best_thresholds
from edgeke.policy.tuning import tune

__all__ = ["main"]

_COSTS = (0.3, 0.6, 1.0)
_DRAWS = 1000
_SETTINGS = Calibrate(
    score="max_probability",
    proportions=0.5,
    points=30,
    temperatures="fitted",
    votes="fitted",
    delta=0.1,
    requirements=(),
    partitions=(),
)


def draw(
    samples: int, seed: int, classes: int = 5, strengths: Sequence[float] = (1.5, 2.5, 3.5)
) -> ExitLogits:
    """A split of `samples` images and as many exits as strengths."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, samples)
    hardness = random.normal(0, 1.5, samples)
    exits = []
    for strength in strengths:
        logits = random.standard_normal((samples, classes), np.float32)
        logits[np.arange(samples), labels] += (strength - hardness).astype(np.float32)
        exits.append(logits)
    return ExitLogits(np.array(exits, np.float32), labels)


def exhaustive(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy and mean cost of every pair of thresholds with its best vote, on a 0.01 grid."""
    grid, count = np.linspace(0, 1, 101).astype(np.float32), samples.scores.shape[1]
    bins = np.searchsorted(grid, samples.scores)  # a sample stays under level m when bin <= m
    right = samples.correct.astype(np.int64)
    change = right[3] - right[2]  # by the vote
    accuracy, cost = [], []
    for a in range(101):
        stays = bins[0] <= a
        first = int(right[0, ~stays].sum())
        for b in range(101):
            deep = stays & (bins[1] <= b)
            votes = np.bincount(bins[2, deep], change[deep], 102)[:101].cumsum().max(initial=0)
            leave = int(right[1, stays & ~deep].sum())
            accuracy.append((first + leave + right[2, deep].sum() + votes) / count)
            cost.append(
                float(np.dot(_COSTS, [(~stays).mean(), stays.mean() - deep.mean(), deep.mean()]))
            )
    return np.array(accuracy), np.array(cost)


def gaps(draws: int) -> list[float]:
    """How much better the exhaustive grid is within a budget, in points of accuracy."""
    points = []
    budgets = np.linspace(0.3, 1.0, 29).tolist()
    for seed in range(draws):
        split = draw(1000, seed)
        samples = tune(split, _SETTINGS).samples(split)
        accuracy, cost = exhaustive(samples)
        solved = best_thresholds(samples, samples.correct.astype(np.float64), _COSTS, budgets)
        found = [each for each in solved if each is not None]
        costs = np.array([samples.cost(each, _COSTS) for each in found])
        right = np.array([samples.correct_at(each).mean() for each in found])
        for budget in budgets:
            best = accuracy[cost <= budget + 1e-9].max()
            points.append(100 * (best - right[costs <= budget + 1e-9].max()))
    return points


def seconds(samples: int, classes: int, exits: int) -> float:
    """A whole calibration of one precision, without networks: fit, and certify."""
    strengths = np.linspace(2, 5, exits)
    validation, calibration = (draw(samples, seed, classes, strengths) for seed in (0, 1))
    macs = np.linspace(100, 1300, exits).astype(int).tolist()
    started = time.perf_counter()
    fitted, _ = fit_policy(validation, macs, 1000, _SETTINGS)
    certify(fitted, calibration, _SETTINGS)
    return time.perf_counter() - started


def simulate(samples: int, degradation: float) -> dict[str, float]:
    """Shares of calibration draws in which a promise is broken, and the cost of what is certified.

    The requested error is that of the full network and `degradation` more. `plain_cost`: of the
    dearest point whose mean cost on calibration is within a budget, one close to 0.6.
    """
    macs = [int(1000 * cost) for cost in _COSTS]
    fitted, _ = fit_policy(draw(1000, 1), macs, 1000, _SETTINGS)
    pool = draw(200_000, 2)
    truth, random = fitted.tuning.samples(pool), np.random.default_rng(0)
    names = [candidate.name for candidate in fitted.candidates]
    thresholds = [candidate.thresholds for candidate in fitted.candidates]
    lost = {n: truth.degraded_at(t).mean() for n, t in zip(names, thresholds, strict=True)}
    wrong = {n: 1 - truth.correct_at(t).mean() for n, t in zip(names, thresholds, strict=True)}
    cost = {n: truth.cost(t, _COSTS) for n, t in zip(names, thresholds, strict=True)}
    error = wrong["full"] + degradation
    budget = min(cost.values(), key=lambda value: abs(value - 0.6)) - 1e-9
    broken = dict.fromkeys(("degradation", "error", "both", "cost", "plain_cost"), 0)
    paid = []
    for _ in range(_DRAWS):
        policy = certify(fitted, pool.at(random.integers(0, 200_000, samples)), _SETTINGS)
        kept = {
            p.name for p in policy.points if p.promised("max_degradation", 0.1, 2) <= degradation
        }
        right = {p.name for p in policy.points if p.promised("max_error", 0.1, 2) <= error}
        broken["degradation"] += any(lost[name] > degradation for name in kept)
        broken["error"] += any(wrong[name] > error for name in right)
        both = kept & right
        broken["both"] += any(lost[n] > degradation or wrong[n] > error for n in both)
        broken["cost"] += any(
            policy.promised_cost(p, _COSTS) < cost[p.name] - 1e-12 for p in policy.points
        )
        within = [p for p in policy.points if p.expected_cost(_COSTS) <= budget]
        dearest = max(within, key=lambda p: p.expected_cost(_COSTS))
        broken["plain_cost"] += cost[dearest.name] > budget
        paid.append(min((cost[name] for name in kept), default=_COSTS[-1]))
    oracle = min(cost[name] for name in names if lost[name] <= degradation)
    return {**{name: n / _DRAWS for name, n in broken.items()}, "power": np.mean(paid) / oracle}


def safe_kd(calibration: Samples, epsilon: float) -> tuple[float, ...]:
    """SAFE-KD's thresholds (arXiv 2602.03043): of early answers `epsilon` at most are wrong.

    At every exit the conformal quantile of 1 - p(true class), over all calibration images and not
    those that reach the exit; an image leaves where its largest probability is as high.
    """
    count = calibration.scores.shape[1]
    place = min(math.ceil((count + 1) * (1 - epsilon)), count) - 1
    wrongness = np.sort(1 - np.exp(calibration.log_likelihood[:-1]), axis=1)[:, place]
    return (*(1 - wrongness[:-1]).tolist(), -1.0)


def eenet(calibration: Samples, costs: Sequence[float], budget: float) -> tuple[float, ...]:
    """EENet's rule (Ilhan et al. 2024): shares that leave at each exit, within a mean cost.

    Thresholds are those under which chosen shares of calibration leave. EENet learns the shares;
    here they are geometric (as in MSDNet), with the ratio that uses the budget up: that changes
    the error, and not whether the promised cost is kept.
    """
    exits, count = calibration.scores.shape
    low, high = 1e-3, 1e3  # share of an exit over that of the next
    for _ in range(60):
        ratio = math.sqrt(low * high)
        shares = ratio ** -np.arange(exits, dtype=float)
        shares /= shares.sum()
        low, high = (low, ratio) if shares @ np.array(costs) <= budget else (ratio, high)
    waiting, thresholds = np.arange(count), []
    for exit in range(exits - 1):
        scores = np.sort(calibration.scores[exit, waiting])[::-1]
        leave = min(round(float(shares[exit]) * count), len(scores))
        thresholds.append(float(scores[leave]) if leave < len(scores) else -1.0)
        waiting = waiting[calibration.scores[exit, waiting] <= np.float32(thresholds[-1])]
    return (*thresholds, -1.0)


def peers(
    validation: ExitLogits,
    pool: ExitLogits,
    costs: Sequence[float],
    samples: int,
    epsilon: float,
    budget: float,
) -> dict[str, dict[str, float]]:
    """For each rule: how often its promise is broken in 1,000 draws, and mean results on the pool.

    `error` and `share`: of the images that some exit was sure of (before the last, where the last
    answers whatever comes); `cost`: mean over all images, as a share of the full network's. Ours
    answers with the full network where it refuses; that is in `refused`.
    """
    macs = [round(1e6 * cost) for cost in costs]
    ours = replace(_SETTINGS, requirements=(Requirement(max_sure_error=epsilon),))
    fitted, _ = fit_policy(validation, macs, 10**6, ours)
    truth, random = fitted.tuning.samples(pool), np.random.default_rng(0)
    last = len(costs) - 1

    def ask(split: ExitLogits, **limit: float) -> tuple[float, ...] | None:
        policy = certify(fitted, split, ours)
        try:
            return choose(policy, Request(**limit), costs).thresholds  # type: ignore[arg-type]
        except UnmetError:
            return None

    rules: dict[str, Callable[[ExitLogits], tuple[float, ...] | None]] = {
        "SAFE-KD": lambda split: safe_kd(fitted.tuning.samples(split), epsilon),
        "fixed": lambda split: (*[1 - epsilon] * last, -1.0),
        "EdgeKE, max_sure_error": lambda split: ask(split, max_sure_error=epsilon),
        "EENet": lambda split: eenet(fitted.tuning.samples(split), costs, budget),
        "EdgeKE, max_cost": lambda split: ask(split, mean_cost=budget),
    }
    totals = {
        name: dict.fromkeys(("broken", "refused", "error", "share", "cost"), 0.0) for name in rules
    }
    for _ in range(_DRAWS):
        split = pool.at(random.integers(0, len(pool.labels), samples))
        for name, rule in rules.items():
            thresholds, row = rule(split), totals[name]
            if thresholds is None:
                row["refused"] += 1
                row["cost"] += costs[-1]
                continue
            exit = truth.exits(thresholds)
            sure = exit <= last if name.endswith("sure_error") else exit < last
            error = 1 - truth.correct_at(thresholds)[sure].mean() if sure.any() else 0.0
            cost = truth.cost(thresholds, costs)
            by_cost = name in ("EENet", "EdgeKE, max_cost")
            row["broken"] += cost > budget + 1e-9 if by_cost else error > epsilon
            row["error"] += error
            row["share"] += sure.mean()
            row["cost"] += cost
    for row in totals.values():
        answered = max(_DRAWS - row["refused"], 1)
        row["error"] /= answered
        row["share"] /= answered
        for key in ("broken", "refused", "cost"):
            row[key] /= _DRAWS
    return totals


def of_bundle(models: Path, dataset: Path) -> tuple[ExitLogits, ExitLogits, tuple[int, ...], int]:
    """What a bundle's exits answer to validation, and to calibration and test; MACs; calibration.

    Each exit of the one file is forced; the logits are logarithms of its probabilities.
    """
    data = load_dataset(dataset, ("validation", "calibration", "test"))
    answers = []
    with Classifier(models) as classifier:
        if classifier.classes != data.classes:
            raise SystemExit(f"{models} and {dataset} have other classes")
        macs = classifier.policy.macs
        forced = [classifier.forced(exit) for exit in range(len(macs))]
        for split in tqdm(data.splits.values(), desc=str(models)):
            images = channels_last(split.images)
            found = np.array([[run(image).probabilities for image in images] for run in forced])
            answers.append(ExitLogits(np.log(np.maximum(found, 1e-30)), split.labels))
    validation, *rest = answers
    logits = np.concatenate([each.logits for each in rest], axis=1)
    pool = ExitLogits(logits, np.concatenate([each.labels for each in rest]))
    return validation, pool, macs, len(rest[0].labels)


def print_peers(
    models: Path | None, dataset: Path | None, errors: Sequence[float]
) -> dict[str, object]:
    """The table of docs/comparison.md."""
    cases = {"drawn": (draw(1000, 1), draw(20_000, 2), (3, 6, 10), 1000, (0.05, 0.02))}
    if models is not None:
        file = dataset or models.parent / "data" / "dataset.safetensors"
        cases = {str(models): (*of_bundle(models, file), tuple(errors))}
    print("\nrules of others: each promises an error among early answers, or a mean cost")
    print("| logits | promise | rule | broken | refused | error | share early | cost |")
    print("| --- " * 8 + "|")
    results: dict[str, object] = {}
    for name, (validation, pool, macs, count, epsilons) in cases.items():
        costs = [each / macs[-1] for each in macs]
        budget = round((costs[0] + 1) / 2, 2)
        for epsilon in epsilons:
            rows = peers(validation, pool, costs, count, epsilon, budget)
            for rule, row in rows.items():
                by_cost = rule in ("EENet", "EdgeKE, max_cost")
                if by_cost and epsilon != epsilons[0]:
                    continue  # the same again
                promise = f"cost <= {budget}" if by_cost else f"error <= {epsilon}"
                print(
                    f"| {name} | {promise} | {rule} | {100 * row['broken']:.1f} % "
                    f"| {100 * row['refused']:.1f} % | {100 * row['error']:.2f} % "
                    f"| {100 * row['share']:.1f} % | {row['cost']:.3f} |"
                )
            results[f"{name}, {epsilon}"] = rows
    return results


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=Path, help="a bundle, or models/ of a built project")
    parser.add_argument(
        "--dataset", type=Path, help="its dataset.safetensors; default: data/ beside models/"
    )
    parser.add_argument("--errors", type=float, nargs=2, default=(0.02, 0.01))
    parser.add_argument("--peers", action="store_true", help="only the rules of others")
    options = parser.parse_args(arguments)
    if options.peers:
        print(json.dumps(print_peers(options.models, options.dataset, options.errors)))
        return
    points = gaps(10)
    print("against every combination in steps of 0.01 (3 exits, 1,000 samples, 10 draws):")
    print(f"  accuracy at a budget: worst {max(points):+.2f} points, mean {np.mean(points):+.2f}")
    taken = {}
    for samples, classes, exits in ((5000, 100, 4), (4000, 10, 9), (4000, 10, 17)):
        taken[exits] = seconds(samples, classes, exits)
        print(f"{exits} exits, {samples} samples, {classes} classes: {taken[exits]:.1f} s")
    columns = ("degradation", "error", "both", "cost", "plain_cost")
    print("\nbroken promises in 1,000 draws at delta 0.1, and certified over an oracle's cost:")
    print(f"| samples | epsilon | {' | '.join(columns)} | cost ratio |")
    print("| --- " * (len(columns) + 3) + "|")
    rows = {}
    for samples, epsilon in ((360, 0.03), (1000, 0.02), (4000, 0.01)):
        row = rows[samples] = simulate(samples, epsilon)
        broken = " | ".join(f"{100 * row[column]:.1f} %" for column in columns)
        print(f"| {samples} | {epsilon} | {broken} | {row['power']:.3f} |")
    others = print_peers(options.models, options.dataset, options.errors)
    print(
        json.dumps(
            {
                "worst_accuracy_gap_points": max(points),
                "seconds_4_exits": taken[4],
                "seconds_17_exits": taken[17],
                **{f"{name}_broken": max(r[name] for r in rows.values()) for name in columns[:4]},
                "peers": others,
                "power_cost_ratio": float(rows[4000]["power"]),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])

"""How good the thresholds are, how long they take, and how often promises hold.

    python -m benchmarks.policy

Logits are drawn with a known law (deeper exits are surer, hard images are hard for all), so that
truth can be counted on 200,000 samples. Compares the solver with every combination of thresholds in
steps of 0.01, times whole fits, and simulates 1,000 calibration draws. The last line is JSON.
"""

import json
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeke.params import Calibrate
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


def main() -> None:
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
    print(
        json.dumps(
            {
                "worst_accuracy_gap_points": max(points),
                "seconds_4_exits": taken[4],
                "seconds_17_exits": taken[17],
                **{f"{name}_broken": max(r[name] for r in rows.values()) for name in columns[:4]},
                "power_cost_ratio": float(rows[4000]["power"]),
            }
        )
    )


if __name__ == "__main__":
    main()

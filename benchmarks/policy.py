"""How good the thresholds are, how long they take, and how often promises hold.

    python -m benchmarks.policy

Logits are drawn with a known law (deeper exits are surer, hard images are hard for all), so that
truth can be counted on 200,000 samples. Compares the solver with every combination of thresholds in
steps of 0.01, times a whole frontier, and simulates 1,000 calibration draws. The last line is JSON.
"""

import json
import statistics
import time

import numpy as np
from numpy.typing import NDArray

from edgeke.policy.candidates import propose
from edgeke.policy.promises import certified_prefix, reach_bounds
from edgeke.policy.samples import Samples
from edgeke.policy.solver import Solver
from edgeke.policy.tuning import Tuning, rank_scores, tune

__all__ = ["main"]

_COSTS = (0.3, 0.6, 1.0)
_DRAWS = 1000
_DELTA = 0.1


def draw(
    samples: int, seed: int, classes: int = 5, strengths: tuple[float, ...] = (1.5, 2.5, 3.5)
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Logits `[E, N, K]` and labels `[N]`."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, samples)
    hardness = random.normal(0, 1.5, samples)
    exits = []
    for strength in strengths:
        logits = random.standard_normal((samples, classes), np.float32)
        logits[np.arange(samples), labels] += (strength - hardness).astype(np.float32)
        exits.append(logits)
    return np.array(exits, np.float32), labels


def exhaustive(samples: Samples) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Accuracy and mean cost of every pair of thresholds with its best vote, on a 0.01 grid."""
    grid, count = np.linspace(0, 1, 101).astype(np.float32), samples.scores.shape[1]
    bins = np.searchsorted(grid, samples.scores)  # a sample stays under level m when bin <= m
    right = samples.correct.astype(np.int64)
    swap = right[3] - right[2]  # what voting changes
    accuracy, cost = [], []
    for a in range(101):
        stays = bins[0] <= a
        first = int(right[0, ~stays].sum())
        for b in range(101):
            deep = stays & (bins[1] <= b)
            votes = np.bincount(bins[2, deep], swap[deep], 102)[:101].cumsum().max(initial=0)
            leave = int(right[1, stays & ~deep].sum())
            accuracy.append((first + leave + right[2, deep].sum() + votes) / count)
            cost.append(
                _COSTS[0]
                + (_COSTS[1] - _COSTS[0]) * stays.mean()
                + (_COSTS[2] - _COSTS[1]) * deep.mean()
            )
    return np.array(accuracy), np.array(cost)


def gaps(draws: int) -> tuple[list[float], list[float]]:
    """How much better the exhaustive grid is: accuracy in points, cost in percent."""
    points, percent = [], []
    for seed in range(draws):
        logits, labels = draw(1000, seed)
        samples = tune(logits, labels, "max_probability").samples(logits, labels)
        accuracy, cost = exhaustive(samples)
        solver = Solver(samples, _COSTS)
        for budget in np.arange(0.3, 1.0, 0.05):
            found = samples.result(solver.within(budget), _COSTS)
            points.append(100 * (accuracy[cost <= budget + 1e-9].max() - found.accuracy))
        for floor in np.linspace(accuracy.min(), accuracy.max(), 12):
            found = samples.result(solver.at_least(floor), _COSTS)
            percent.append(100 * (found.cost / cost[accuracy >= floor - 1e-9].min() - 1))
    return points, percent


def frontier_seconds(rounds: int = 3) -> list[float]:
    """A whole frontier, both objectives and every cap, on 5,000 x 100 classes x 4 exits."""
    logits, labels = draw(5000, 0, 100, (3.0, 4.0, 5.0, 6.0))
    costs, seconds = (0.3, 0.55, 0.8, 1.05), []
    for _ in range(rounds):
        started = time.perf_counter()
        samples = tune(logits, labels, "max_probability").samples(logits, labels)
        propose(samples, costs, 0.025)
        seconds.append(time.perf_counter() - started)
    return seconds


def simulate(samples: int, epsilon: float) -> dict[str, float]:
    """Shares of calibration draws that break a promise, and the cost of what is certified."""
    tuning: Tuning = tune(*draw(1000, 1), "max_probability")
    sequences = propose(tuning.samples(*draw(1000, 1)), _COSTS, 0.025)
    pool = tuning.samples(*draw(200_000, 2))
    outcomes = {
        objective: np.stack([judge(c.thresholds) for c in sequences[objective, 2]])
        for objective, judge in (("degradation", pool.degradations), ("accuracy", pool.wrong))
    }
    thresholds = sorted({c.thresholds for of in sequences.values() for c in of})
    exits = np.stack([pool.exits(of) for of in thresholds])
    reach = np.stack([(exits >= e).mean(axis=1) for e in range(3)], axis=1)
    costs = np.array([pool.result(c.thresholds, _COSTS).cost for c in sequences["degradation", 2]])
    truth = {name: of.mean(axis=1) for name, of in outcomes.items()}
    floor = float(truth["accuracy"][0] + epsilon)
    broken = dict.fromkeys(("max_degradation", "max_error", "cost", "plain_cost"), 0)
    paid, random = [], np.random.default_rng(0)
    steps = np.diff([0, *_COSTS])
    for _ in range(_DRAWS):
        seen = random.integers(0, 200_000, samples)
        prefix = certified_prefix(outcomes["degradation"][:, seen], epsilon, _DELTA)
        broken["max_degradation"] += bool(prefix) and truth["degradation"][:prefix].max() > epsilon
        paid.append(costs[max(prefix, 1) - 1])
        prefix = certified_prefix(outcomes["accuracy"][:, seen], floor, _DELTA)
        broken["max_error"] += bool(prefix) and truth["accuracy"][:prefix].max() > floor
        bounds = reach_bounds(exits[:, seen], thresholds, 3, _DELTA)
        broken["cost"] += bool((bounds @ steps < reach @ steps - 1e-12).any())
        mean = np.stack([(exits[:, seen] >= e).mean(axis=1) for e in range(3)], axis=1) @ steps
        bought = np.flatnonzero(mean <= 0.6)[mean[mean <= 0.6].argmax()]
        broken["plain_cost"] += bool(reach[bought] @ steps > 0.6)
    oracle = costs[truth["degradation"] <= epsilon].min()
    return {**{name: n / _DRAWS for name, n in broken.items()}, "power": np.mean(paid) / oracle}


def main() -> None:
    points, percent = gaps(10)
    print("against every combination in steps of 0.01 (3 exits, 1,000 samples, 10 draws):")
    print(f"  accuracy at a budget: worst {max(points):+.2f} points, mean {np.mean(points):+.2f}")
    print(f"  cost at a floor: worst {max(percent):+.2f} %, mean {np.mean(percent):+.2f} %")
    seconds = frontier_seconds()
    print(
        f"frontier, 5,000 x 100 x 4 exits: {min(seconds):.2f} s, median {sorted(seconds)[1]:.2f} s"
    )
    name, _ = rank_scores(*draw(1000, 1))
    print(f"best score by AURC on 1,000 samples: {name}")
    print("\n| samples | epsilon | max_degradation broken | max_error broken | cost broken | "
          "plain mean cost broken | certified / oracle cost |")  # fmt: skip
    print("| --- | --- | --- | --- | --- | --- | --- |")
    rows = {}
    for samples, epsilon in ((360, 0.03), (1000, 0.02), (4000, 0.01)):
        row = rows[samples] = simulate(samples, epsilon)
        broken = [
            f"{100 * row[k]:.1f} %" for k in ("max_degradation", "max_error", "cost", "plain_cost")
        ]
        print(f"| {samples} | {epsilon} | {' | '.join(broken)} | {row['power']:.3f} |")
    worst = {name: max(row[name] for row in rows.values()) for name in ("max_degradation", "cost")}
    print(
        json.dumps(
            {
                "worst_accuracy_gap_points": max(points),
                "worst_cost_gap_percent": max(percent),
                "frontier_seconds": statistics.median(seconds),
                "max_degradation_broken": worst["max_degradation"],
                "cost_broken": worst["cost"],
                "power_cost_ratio": float(rows[4000]["power"]),
            }
        )
    )


if __name__ == "__main__":
    main()

"""The trade-off between accuracy and cost: thresholds that are best on given samples.

Each image that does not leave at exit e swaps that exit's answer for the next one's and pays for
the way there. So gain and cost of every combination of thresholds on a grid are sums of cumulative
histograms: E tables, filled with one pass over the samples. The best cell is then refined on ever
finer grids, down to single samples. (Counting as for integral images, Crow 1984.)
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeke.errors import InputError
from edgeke.policy.samples import Objective, Samples, check_costs
from edgeke.policy.thresholds import cuts

__all__ = ["Solver"]

_CELLS = 100_000  # of the coarse grid
_LEVELS = 64  # per exit at most
_STARTS = 6  # cells of the coarse grid, next to the best one, that are refined as well
_FINE = 4  # steps to either side when a cell is refined

_Cells = NDArray[np.float64]
_Choice = Callable[
    [_Cells, _Cells], int
]  # mean gain and mean cost of every cell, flat -> its index


class Solver:
    """Best thresholds for one set of samples, costs `[E]` and objective.

    The coarse grid is counted once; every question then refines its own cell. `cap` is the deepest
    exit that may be used (default: the last); only the last one can end in a vote.
    """

    def __init__(
        self,
        samples: Samples,
        costs: Sequence[float],
        objective: Objective = "accuracy",
        cap: int | None = None,
    ) -> None:
        exits = len(samples.scores)
        check_costs(costs, exits)
        self.exits, self.cap = exits, exits - 1 if cap is None else cap
        self._samples, self._costs, self._objective = samples, costs, objective
        self._gain = samples.gain(objective)
        # At the cap everybody left answers; in the full cascade the last exit may call the vote.
        free = exits if self.cap == exits - 1 else self.cap
        if free == 0:
            raise ValueError("nothing is free when the first exit is the cap: force it")
        self._cuts = [cuts(at_exit) for at_exit in samples.scores[:free]]
        levels = int(np.clip(_CELLS ** (1 / free), 2, _LEVELS))
        self._coarse = [
            np.unique(np.linspace(0, len(of) - 1, levels).round().astype(int)) for of in self._cuts
        ]
        self._best_cells, *self._tables = _undominated(*self._count(self._coarse))

    def within(self, budget: float) -> tuple[float, ...]:
        """Thresholds `[E]` of the most gain whose mean cost is at most `budget`.

        Errors: InputError when no thresholds are that cheap.
        """
        cheapest = self._costs[0]
        if budget < cheapest:
            raise InputError(
                f"a mean cost of {budget:g} cannot be met: the first exit alone costs "
                f"{cheapest:g}; ask for at least that"
            )

        def best(gain: _Cells, cost: _Cells) -> int:
            allowed = np.where(cost <= budget + 1e-9, gain, -np.inf)
            ties = np.flatnonzero(allowed >= allowed.max() - 1e-12)
            return int(ties[cost[ties].argmin()])

        return self._refine(best)

    def at_least(self, floor: float) -> tuple[float, ...]:
        """Thresholds `[E]` of the least mean cost whose mean gain is at least `floor`.

        With the objective `accuracy` the floor is an accuracy in [0, 1]; with `loss` it is minus
        the greatest loss. Errors: InputError with the best that was found when nothing reaches it.
        """
        samples = self._gain.shape[1]
        # The likelihoods in the gain add up to less than one answer.
        needed = (np.ceil(floor * samples - 1e-6) - 1 + 1e-3) / samples

        def best(gain: _Cells, cost: _Cells) -> int:
            allowed = np.where(gain > needed, cost, np.inf)
            if not np.isfinite(allowed.min()):
                return int(gain.argmax())
            ties = np.flatnonzero(allowed <= allowed.min() + 1e-12)
            return int(ties[gain[ties].argmax()])

        thresholds = self._refine(best)
        result = self._samples.result(thresholds, self._costs)
        reached = result.accuracy if self._objective == "accuracy" else -result.degradation
        if reached < floor - 1e-9:
            raise InputError(
                f"{floor:.4g} cannot be reached: the best on these samples is {reached:.4g} at a "
                f"mean cost of {result.cost:.4g}; ask for no more than that"
            )
        return thresholds

    def _refine(self, best: _Choice) -> tuple[float, ...]:
        """The best cells of the coarse grid, each refined; the best of what that gives."""
        gains, costs = self._tables
        chosen = best(gains, costs)
        near = np.unique(np.clip(chosen + np.arange(-_STARTS, 2), 0, len(gains) - 1))
        shape = [len(of) for of in self._coarse]
        found = []
        for start in self._best_cells[near]:
            cell = np.unravel_index(start, shape)
            found.append(
                self._descend(best, [of[i] for of, i in zip(self._coarse, cell, strict=True)])
            )
        places, gain, cost = zip(*found, strict=True)
        place = places[best(np.array(gain), np.array(cost))]
        values = [float(of[i]) for of, i in zip(self._cuts, place, strict=True)]
        return (*values, *[-1.0] * (self.exits - len(values)))

    def _descend(self, best: _Choice, place: list[int]) -> tuple[list[int], float, float]:
        """From one cell to ever finer grids around the best so far, down to single samples."""
        stride = [int(np.diff(of).max(initial=1)) for of in self._coarse]
        while True:
            grid = [
                np.unique(
                    np.clip(np.linspace(at - by, at + by, 2 * _FINE + 1).round(), 0, len(of) - 1)
                ).astype(int)
                for at, by, of in zip(place, stride, self._cuts, strict=True)
            ]
            gain, cost = self._count(grid)
            chosen = best(gain, cost)
            cell = np.unravel_index(chosen, [len(of) for of in grid])
            moved = [int(of[i]) for of, i in zip(grid, cell, strict=True)]
            if moved == place and all(by <= _FINE for by in stride):
                return place, float(gain[chosen]), float(cost[chosen])
            place = moved
            stride = [max(min(by, _FINE), -(-by // _FINE)) for by in stride]

    def _count(self, grid: Sequence[NDArray[np.int64]]) -> tuple[_Cells, _Cells]:
        """Mean gain and mean cost of every combination of cuts, flat in C order."""
        samples = self._gain.shape[1]
        shape = [len(of) for of in grid]
        # A sample stays at exit e under level m when at most m levels lie below its score.
        below = [
            np.searchsorted(of[at], scores)
            for of, at, scores in zip(self._cuts, grid, self._samples.scores, strict=False)
        ]
        gain = np.full(shape, self._gain[0].sum())
        cost = np.full(shape, float(samples * self._costs[0]))
        cells = np.zeros(samples, np.int64)
        for e, levels in enumerate(below):
            cells = cells * (shape[e] + 1) + levels
            sizes = [size + 1 for size in shape[: e + 1]]
            tail = [1] * (len(shape) - e - 1)
            swap = self._gain[e + 1] - self._gain[e]
            gain += _stayed(cells, swap, sizes).reshape(shape[: e + 1] + tail)
            if e + 1 < self.exits:
                step = np.full(samples, self._costs[e + 1] - self._costs[e])
                cost += _stayed(cells, step, sizes).reshape(shape[: e + 1] + tail)
        return gain.ravel() / samples, cost.ravel() / samples


def _undominated(gain: _Cells, cost: _Cells) -> tuple[NDArray[np.int64], _Cells, _Cells]:
    """The cells that no other beats in both, by rising cost: their indices, gains and costs."""
    order = np.lexsort((-gain, cost))
    highest = np.maximum.accumulate(gain[order])
    kept = order[np.append(True, highest[1:] > highest[:-1])]
    return kept, gain[kept], cost[kept]


def _stayed(cells: NDArray[np.int64], weights: _Cells, sizes: Sequence[int]) -> _Cells:
    """Sum of the weights of the samples that stay at all of these exits, for every cell."""
    counted = np.bincount(cells, weights, int(np.prod(sizes))).reshape(sizes)
    summed: _Cells = counted[tuple(slice(0, size - 1) for size in sizes)].astype(np.float64)
    for axis in range(len(sizes)):
        np.cumsum(summed, axis, out=summed)
    return summed

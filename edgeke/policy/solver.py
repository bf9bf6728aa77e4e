"""The trade-off between accuracy and cost: the thresholds that are best on given samples.

A sample that continues past exit e replaces its prediction and pays for the next segment. So with
all other thresholds fixed, total gain and total cost as functions of one exit's threshold are two
cumulative sums over the samples in the order of their scores: one exact scan.

The search is coordinate ascent in many narrow windows of cost at once. Every scan may improve the
thresholds kept for any window, and whatever is improved is scanned again, until nothing improves.
Windows exchange: one exit moves the cost up, another moves it down again. That replaces scans of
pairs of exits, and the work for one set of thresholds grows linearly with the number of exits.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgeke.device.policy import ALWAYS, NEVER
from edgeke.policy.samples import Samples, check_costs
from edgeke.policy.thresholds import cuts

_WINDOWS = 1600  # divided by the number of exits: more are finer and slower
_STARTS = 9  # shares of the samples that continue at every exit, evenly from none to all

_Floats = NDArray[np.float64]
_Integers = NDArray[np.int64]


def best_thresholds(
    samples: Samples,
    gain: _Floats,
    costs: Sequence[float],
    budgets: Sequence[float],
    cap: int | None = None,
) -> list[tuple[float, ...] | None]:
    """For each budget the thresholds `[E]` of most gain that cost more than the budget before it.

    `gain` `[E + 1, N]` of each exit's answer and the vote's; `costs` `[E]`; `budgets` ascending,
    as mean costs. None where no thresholds were found between two budgets. `cap` is the deepest
    exit that may be used (default: the last); only the last one can end in a vote.
    """
    exits, count = samples.scores.shape
    cap = exits - 1 if cap is None else cap
    check_costs(costs, exits)
    cascade = _Cascade(samples, gain, costs, exits if cap == exits - 1 else cap)
    windows = np.linspace(costs[0], costs[cap], _WINDOWS // exits)
    edges = np.unique(np.concatenate([windows, budgets])) * count + 1e-6  # of total cost
    best = np.full(len(edges), -np.inf)
    stays = np.zeros((len(edges), cascade.free), np.int64)
    done: set[bytes] = set()

    def improve(start: _Integers) -> None:
        """Scan every exit from these thresholds; keep what is best in its window."""
        if start.tobytes() in done:
            return
        done.add(start.tobytes())
        gains, totals = cascade.scan(start)
        for exit, (of_cut, cost) in enumerate(zip(gains, totals, strict=True)):
            window = np.searchsorted(edges, cost)
            first = np.flatnonzero(np.diff(window, prepend=-1))
            top = np.maximum.reduceat(of_cut, first)
            for k in np.flatnonzero(top > best[window[first]] + 1e-9):
                w, end = window[first[k]], first[k + 1] if k + 1 < len(first) else len(of_cut)
                best[w], stays[w] = top[k], start
                stays[w, exit] = first[k] + of_cut[first[k] : end].argmax()

    for share in np.linspace(0, 1, _STARTS):
        improve(cascade.start(share))
    scanned = 0
    while len(done) > scanned:
        scanned = len(done)
        for window in np.flatnonzero(np.isfinite(best)):
            improve(stays[window].copy())
    results: list[tuple[float, ...] | None] = []
    before = 0
    for budget in budgets:
        end = int(np.searchsorted(edges, budget * count)) + 1
        chosen = before + int(best[before:end].argmax()) if end > before else before
        known = end > before and np.isfinite(best[chosen])
        results.append(cascade.thresholds(stays[chosen]) if known else None)
        before = end
    return results


class _Cascade:
    """Samples in the order of their scores; the first `free` exits have a free threshold.

    `stay` `[F]` stands for thresholds: at each exit, how many of all samples (those of the lowest
    scores) continue if they get there.
    """

    def __init__(self, samples: Samples, gain: _Floats, costs: Sequence[float], free: int) -> None:
        self.exits, count = samples.scores.shape
        self.free, self.gain = free, gain[: free + 1]
        last = np.minimum(np.arange(free + 1), self.exits - 1)
        self.paid = np.asarray(costs, np.float64)[last]
        self.scores = samples.scores[:free]
        self.order = np.argsort(self.scores, axis=1, kind="stable")
        self.rank = np.argsort(self.order, axis=1)
        ordered = np.take_along_axis(self.scores, self.order, axis=1)
        # Between equal scores there is no threshold.
        self.possible = np.ones((free, count + 1), bool)
        self.possible[:, 1:-1] = ordered[:, 1:] > ordered[:, :-1]

    def start(self, share: float) -> _Integers:
        """About this share of the samples continues at every exit."""
        count = self.possible.shape[1] - 1
        places = [np.flatnonzero(possible) for possible in self.possible]
        return np.array([place[np.abs(place - share * count).argmin()] for place in places])

    def scan(self, stay: _Integers) -> tuple[_Floats, _Floats]:
        """Total gain and cost `[F, N + 1]` when one exit's threshold moves through all places.

        Costs ascend along the second axis; impossible places have a gain of minus infinity.
        """
        rows, samples = np.arange(self.free)[:, None], np.arange(self.rank.shape[1])
        leave = np.where(self.rank >= stay[:, None], rows, self.free)
        before = np.full_like(leave, self.free)  # where a sample left that does not get here
        before[1:] = np.minimum.accumulate(leave[:-1], axis=0)
        after = np.full_like(leave, self.free)  # where it leaves if it continues here
        after[:-1] = np.minimum.accumulate(leave[:0:-1], axis=0)[::-1]
        here = before == self.free
        taken = np.where(here, rows, before)
        totals = []
        for value in (self.gain, self.paid[:, None] * np.ones_like(self.gain)):
            change = np.where(here, value[after, samples] - value[rows, samples], 0.0)
            change = np.take_along_axis(change, self.order, axis=1).cumsum(axis=1)
            start = value[taken, samples].sum(axis=1, keepdims=True)
            totals.append(np.concatenate([start, start + change], axis=1))
        return np.where(self.possible, totals[0], -np.inf), totals[1]

    def thresholds(self, stay: _Integers) -> tuple[float, ...]:
        """The thresholds `[E]` under which those samples continue."""
        rows = zip(self.scores, self.possible, stay, strict=True)
        values = [float(cuts(scores)[possible[1 : n + 1].sum()]) for scores, possible, n in rows]
        values.append(ALWAYS)
        reached = values[: values.index(ALWAYS) + 1]
        return tuple([*reached, *[NEVER] * self.exits][: self.exits])

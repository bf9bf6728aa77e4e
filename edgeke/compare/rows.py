"""Rows of a comparison: runs with equal settings averaged over seeds, ranked by validation."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

__all__ = ["CRITERION", "SHOWN", "PipelineRun", "Ranking", "Row", "Spread", "rank"]

CRITERION = "validation accuracy of the main exit, ties by the default point's mean cost"
SHOWN = ("kd.distance", "branchynet.order", "kd.beta")  # always columns

# What cannot change a result. `evaluate.` changes where latency is measured; notes speak of that.
_IGNORED = ("tracking.", "evaluate.")
_EXIT = re.compile(r"validation/exit_(\d+)/accuracy")
_DEFAULT_COST = "validation/default/cost_share"


@dataclass(frozen=True)
class PipelineRun:
    """One pipeline state as the store knows it; `ended` in milliseconds since 1970."""

    id: str
    name: str
    status: str
    ended: int
    params: Mapping[str, str]
    metrics: Mapping[str, float]
    machine: str
    commit: str

    @property
    def seed(self) -> str:
        """The seed as it was logged."""
        return self.params.get("seed", "-")

    @cached_property
    def exits(self) -> tuple[int, ...]:
        """The exits with a validation accuracy, shallow to deep; none while unfinished."""
        found = (_EXIT.fullmatch(name) for name in self.metrics if self.value(name) is not None)
        return tuple(sorted(int(match[1]) for match in found if match))

    def value(self, metric: str) -> float | None:
        """A metric; None where it is missing or no number."""
        value = self.metrics.get(metric)
        return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of `seeds` values; a single one has no deviation."""

    mean: float
    std: float | None
    seeds: int


@dataclass(frozen=True)
class Row:
    """Runs that differ in nothing but the seed, one per seed."""

    settings: Mapping[str, str]
    runs: tuple[PipelineRun, ...]

    @property
    def exits(self) -> tuple[int, ...]:
        """The exits of its runs, shallow to deep."""
        return tuple(sorted({exit for run in self.runs for exit in run.exits}))

    @property
    def requirements(self) -> tuple[str, ...]:
        """The requirements' names, in the order of params.yaml."""
        return tuple(filter(None, self.settings.get("calibrate.requirements", "").split(", ")))

    def spread(self, metric: str) -> Spread | None:
        """A metric over the seeds that have it; None where none has."""
        values = [value for run in self.runs if (value := run.value(metric)) is not None]
        if not values:
            return None
        std = statistics.stdev(values) if len(values) > 1 else None
        return Spread(statistics.fmean(values), std, len(values))

    def met(self, requirement: str) -> tuple[int, int] | None:
        """How many seeds certified a requirement, of how many that say so."""
        values = [run.value(f"calibration/{requirement}/met") for run in self.runs]
        known = [value for value in values if value is not None]
        return (sum(value == 1 for value in known), len(known)) if known else None


@dataclass(frozen=True)
class Ranking:
    """The rows of one profile, best first.

    `differing` names the parameters beyond `SHOWN` that are not the same in all rows; `left_out`
    counts runs that are in no row, by reason.
    """

    profile: str
    rows: tuple[Row, ...]
    differing: tuple[str, ...]
    left_out: Mapping[str, int]


def rank(runs: Sequence[PipelineRun]) -> list[Ranking]:
    """One ranking per profile: accuracies on different data do not compare."""
    profiles = sorted({_profile(run) for run in runs})
    return [_rank(name, [run for run in runs if _profile(run) == name]) for name in profiles]


def _rank(profile: str, runs: Sequence[PipelineRun]) -> Ranking:
    left_out: Counter[str] = Counter()
    groups: dict[tuple[tuple[str, str], ...], dict[str, PipelineRun]] = {}
    for run in sorted(runs, key=lambda run: run.ended, reverse=True):
        seeds = groups.setdefault(tuple(sorted(_settings(run).items())), {})
        if run.status != "FINISHED":
            left_out[run.status.lower()] += 1
        elif not run.exits:
            left_out["without validation metrics"] += 1
        elif run.seed in seeds:
            left_out["older, of a seed that ran again"] += 1
        else:
            seeds[run.seed] = run
    rows = [
        Row(dict(key), tuple(sorted(seeds.values(), key=_by_seed)))
        for key, seeds in groups.items()
        if seeds
    ]
    rows.sort(key=_merit)
    names = sorted({name for row in rows for name in row.settings} - set(SHOWN))
    differing = [name for name in names if len({row.settings.get(name) for row in rows}) > 1]
    return Ranking(profile, tuple(rows), tuple(differing), left_out)


def _profile(run: PipelineRun) -> str:
    return run.params.get("profile", "-")


def _settings(run: PipelineRun) -> dict[str, str]:
    return {
        name: value
        for name, value in run.params.items()
        if name != "seed" and not name.startswith(_IGNORED)
    }


def _by_seed(run: PipelineRun) -> tuple[int, str]:
    return (int(run.seed) if run.seed.isdecimal() else 0, run.seed)


def _merit(row: Row) -> tuple[float, float, tuple[str, ...]]:
    """What rows are sorted by; rounded, since means of equal values can differ in the last bit."""
    accuracy = row.spread(f"validation/exit_{row.exits[-1]}/accuracy")
    cost = row.spread(_DEFAULT_COST)
    assert accuracy is not None
    named = tuple(row.settings.get(name, "-") for name in SHOWN)
    return -round(accuracy.mean, 9), round(cost.mean, 9) if cost else math.inf, named

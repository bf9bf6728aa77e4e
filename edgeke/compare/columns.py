"""What a comparison shows, as text: columns, labels of rows, and notes below the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from edgeke.compare.rows import CRITERION, SHOWN, Ranking, Row

__all__ = ["CAPTION", "Column", "columns", "labels", "notes", "variants"]

CAPTION = (
    f"Ranked by {CRITERION}. Mean ± std over seeds (one seed has no std). Accuracy in %, cost in % "
    "of the plain main network's MACs, (m/n): m of n seeds certified the requirement, latency of "
    "the default point in ms."
)

_MISSING = "-"
_OWN_COLUMNS = 3  # differing parameters that get a column each; more of them share one


@dataclass(frozen=True)
class Column:
    """One column: what stands above its name, the name, a cell per row.

    `key` marks the columns that say whose row it is.
    """

    heading: str
    name: str
    cells: tuple[str, ...]
    key: bool = False


def columns(ranking: Ranking, detailed: bool = False) -> list[Column]:
    """The columns of a ranking; `detailed` adds the test accuracy of exits and static networks."""
    rows = ranking.rows

    def column(heading: str, name: str, cell: Callable[[Row], str]) -> Column:
        return Column(heading, name, tuple(map(cell, rows)))

    def accuracy(heading: str, name: str, metric: str) -> Column:
        return column(heading, name, partial(_percent, metric=metric))

    found = [Column("", "rank", tuple(str(place) for place in range(1, len(rows) + 1)), True)]
    found += [Column("", key.rpartition(".")[2], _settings(rows, key), True) for key in SHOWN]
    if len(ranking.differing) > _OWN_COLUMNS:
        found.append(Column("", "other", tuple(_variants(ranking)[0]), True))
    else:
        found += [Column("", key, _settings(rows, key), True) for key in ranking.differing]
    found.append(column("", "seeds", lambda row: str(len(row.runs))))
    exits = [f"exit_{exit}" for exit in sorted({exit for row in rows for exit in row.exits})]
    found += [accuracy("validation accuracy", e, f"validation/{e}/accuracy") for e in exits]
    asked = dict.fromkeys(name for row in rows for name in row.requirements)
    found += [
        column("mean validation cost (seeds met)", name, partial(_cost, requirement=name))
        for name in asked
    ]
    shown = ["default", "int8/default"]
    if detailed:
        shown = [*exits, *shown, "main", "teacher"]
    found += [accuracy("test accuracy", name, f"test/{name}/accuracy") for name in shown]
    found += [
        column("test latency", name, partial(_latency, metric=metric))
        for name, metric in (
            ("fp32", "test/default/latency_ms_mean"),
            ("int8", "test/int8/default/latency_ms_mean"),
        )
    ]
    return found


def labels(ranking: Ranking) -> list[str]:
    """A short name per row for pictures, such as `1: kl, asynchronous, beta 0.5`."""
    keys = [column for column in columns(ranking) if column.key]
    plain = {"rank", "distance", "order", "other"}
    return [
        f"{keys[0].cells[n]}: "
        + ", ".join(
            key.cells[n] if key.name in plain else f"{key.name} {key.cells[n]}" for key in keys[1:]
        )
        for n in range(len(ranking.rows))
    ]


def variants(ranking: Ranking) -> list[Column]:
    """What the column `other` stands for: a line per differing parameter, a column per variant.

    Empty where the parameters are so few that each has a column of its own.
    """
    if len(ranking.differing) <= _OWN_COLUMNS:
        return []
    held = _variants(ranking)[1]
    return [
        Column("", "parameter", ranking.differing),
        *(Column("", f"v{n}", values) for n, values in enumerate(held, 1)),
    ]


def notes(ranking: Ranking) -> list[str]:
    """What to know before believing the table: sentences."""
    found = []
    images = {row.settings.get("data.validation", "") for row in ranking.rows}
    if len(images) == 1 and (count := images.pop()).isdecimal():
        found.append(f"One of the {count} validation images is {100 / int(count):.2g} points.")
    left_out = [f"{count} {reason}" for reason, count in sorted(ranking.left_out.items())]
    if left_out:
        found.append(f"Runs left out: {', '.join(left_out)}.")
    runs = [run for row in ranking.rows for run in row.runs]
    places = sorted({_place(run.machine, run.params) for run in runs})
    if len(places) > 1:
        found.append(
            f"Latencies were measured in {len(places)} places and do not compare between them: "
            f"{'; '.join(places)}."
        )
    commits = {run.commit for run in runs}
    if len(commits) > 1:
        mixed = [
            str(place)
            for place, row in enumerate(ranking.rows, 1)
            if len({run.commit for run in row.runs}) > 1
        ]
        within = f", also within rank {', '.join(mixed)}" if mixed else ""
        found.append(f"The runs come from {len(commits)} commits{within}: code may differ, too.")
    return found


def _variants(ranking: Ranking) -> tuple[list[str], list[tuple[str, ...]]]:
    """Each row's variant, and the values of the differing parameters in each variant."""
    rows = [
        tuple(row.settings.get(key, _MISSING) for key in ranking.differing) for row in ranking.rows
    ]
    held = list(dict.fromkeys(rows))
    return [f"v{held.index(values) + 1}" for values in rows], held


def _place(machine: str, params: Mapping[str, str]) -> str:
    """Where and how latency was measured: the device, and the first tier."""
    device = params.get("evaluate.device", "local")
    where = (machine or "machine not recorded") if device == "local" else device
    tier = params.get("evaluate.tiers", "").split(":")[0]
    return f"{where}, {tier}" if tier else where


def _settings(rows: tuple[Row, ...], key: str) -> tuple[str, ...]:
    return tuple(row.settings.get(key, _MISSING) for row in rows)


def _percent(row: Row, metric: str) -> str:
    return _spread(row, metric, lambda value: f"{100 * value:.1f}")


def _latency(row: Row, metric: str) -> str:
    found = row.spread(metric)
    digits = 3 if found is None or found.mean < 1 else 2 if found.mean < 10 else 1
    return _spread(row, metric, lambda value: f"{value:.{digits}f}")


def _cost(row: Row, requirement: str) -> str:
    if requirement not in row.requirements:
        return _MISSING
    met = row.met(requirement)
    cost = _percent(row, f"validation/{requirement}/cost_share")
    return f"{cost} ({met[0]}/{met[1]})" if met else cost


def _spread(row: Row, metric: str, text: Callable[[float], str]) -> str:
    found = row.spread(metric)
    if found is None:
        return _MISSING
    std = "" if found.std is None else f" ± {text(found.std)}"
    # A mean over fewer seeds than the row has says so; a requirement's (m/n) says it already.
    fewer = found.seeds < len(row.runs) and not metric.endswith("cost_share")
    return f"{text(found.mean)}{std}" + (f" ({found.seeds} seeds)" if fewer else "")

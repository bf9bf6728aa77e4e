"""Finished runs side by side, averaged over seeds: python -m edgeke.compare (`make compare`).

One setting beats another if it is at least as accurate on validation and costs no more, at the
default point, and is better in one of the two. Settings are ranked by how many beat them, then by
accuracy. Test numbers are shown and decide nothing.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path

import altair as alt
import pandas as pd

from edgeke import params
from edgeke.errors import InputError, report
from edgeke.files import write_text
from edgeke.tracking.results import STATE
from edgeke.tracking.store import connected, folder

_PAGE = Path(".edgeke/compare.html")
_SETTINGS = ["kd.distance", "branchynet.order", "kd.beta"]  # shown always, others where they differ
_NO_SETTING = ("seed", "tracking.", "evaluate.")  # cannot change a result beyond its spread
_METRICS = {  # of the default point, by column
    "accuracy": "validation/default/accuracy",
    "cost": "validation/default/cost_share",
    "test accuracy": "test/default/accuracy",
    "test latency": "test/default/latency_ms_mean",
}
_LEGEND = (
    "Mean ± standard deviation over seeds, at the default point. accuracy, cost: on validation; a "
    "cost of 1 is that of the plain main network. certified: seeds with every requirement met. "
    "beaten by: settings at least as accurate and as cheap, and better in one. Latency in ms."
)


def read_runs(experiment: str, profile: str) -> pd.DataFrame:
    """The finished pipelines of a profile, oldest first; a column for each parameter and metric.

    Metrics are those of int8, which is shipped, where there are any. `run` is the DVC experiment's
    name or the run's id, `place` the machine. Errors: InputError when there is nothing to read.
    """
    file = folder() / "mlflow.db"
    if not os.environ.get("MLFLOW_TRACKING_URI") and not file.is_file():
        raise InputError(f"{file} is missing: nothing was run yet; `make run` makes the first run")
    with connected() as client:
        known = client.get_experiment_by_name(experiment)
        runs = client.search_runs(
            [known.experiment_id] if known else [],
            f"tags.`{STATE}` != '' and attributes.status = 'FINISHED'",
            max_results=50_000,
            order_by=["attributes.start_time"],
        )
    rows = []
    for run in runs:
        metrics, tags = run.data.metrics, run.data.tags
        shipped = {k.replace("/int8/", "/", 1): v for k, v in metrics.items() if "/int8/" in k}
        name = tags.get("DVC_EXP_NAME") or run.info.run_id[:8]
        place = tags.get("edgeke.machine", "")
        rows.append({**run.data.params, **metrics, **shipped, "run": name, "place": place})
    table = pd.DataFrame(rows)
    table = table.reindex(columns=table.columns.union(["profile", *_METRICS.values()]))
    chosen = table[table["profile"] == profile].dropna(subset=list(_METRICS.values())[:2])
    if chosen.empty:
        others = ", ".join(sorted(table["profile"].dropna().unique())) or "none"
        raise InputError(
            f"experiment {experiment!r} in MLflow has no finished run of profile {profile!r}; `dvc "
            f"exp run` makes one, --profile NAME shows another (there: {others})"
        )
    return chosen


def rank(runs: pd.DataFrame) -> pd.DataFrame:
    """One row per setting, the best first: its parameters, then means, `... std` beside each.

    Runs with another seed are one setting; of runs that differ in nothing the newest counts.
    """
    names = [n for n in runs if "/" not in n and n not in ("run", "place", *_SETTINGS)]
    names = [name for name in names if not name.startswith(_NO_SETTING)]
    settings = _SETTINGS + [name for name in names if runs[name].nunique(dropna=False) > 1]
    runs = runs.fillna(dict.fromkeys(settings, "-"))
    runs = runs.drop_duplicates([*settings, "seed"], keep="last").reset_index(drop=True)
    met = [name for name in runs if name.startswith("calibration/") and name.endswith("/met")]
    runs["certified"] = runs[met].min(axis=1).eq(1) if met else False
    groups = runs.groupby(settings, sort=False)
    table = groups.agg(seeds=("seed", "count"), certified=("certified", "sum"))
    for column, metric in _METRICS.items():
        table[column], table[f"{column} std"] = groups[metric].mean(), groups[metric].std()
    accuracy, cost = table["accuracy"].round(9), table["cost"].round(9)
    table["beaten by"] = [
        int(((accuracy >= a) & (cost <= c) & ((accuracy > a) | (cost < c))).sum())
        for a, c in zip(accuracy, cost, strict=True)
    ]
    table["runs"] = groups["run"].agg(", ".join)
    table = table.sort_values(["beaten by", "accuracy"], ascending=[True, False]).reset_index()
    table.index = pd.RangeIndex(1, len(table) + 1, name="rank")
    return table


def make_page(table: pd.DataFrame, title: str) -> str:
    """The ranking as one HTML page that needs no network: a chart, and the table."""
    # Ranks name the dots: what users named is in the table alone, where pandas escapes it.
    dots = table[["accuracy", "cost", "seeds"]].reset_index()
    for name in ("accuracy", "cost"):
        std = table[f"{name} std"].fillna(0).to_numpy()
        dots[f"{name} low"], dots[f"{name} high"] = dots[name] - std, dots[name] + std
    x, y = (alt.Scale(zero=False, padding=20) for _ in range(2))
    base = alt.Chart(dots)
    cost = alt.X("cost:Q", scale=x, title="mean MACs, as a share of the plain main network's")
    accuracy = alt.Y("accuracy:Q", scale=y, title="accuracy on validation")
    chart = alt.layer(
        base.mark_rule().encode(cost, alt.Y("accuracy low:Q", scale=y), y2="accuracy high"),
        base.mark_rule().encode(alt.X("cost low:Q", scale=x), accuracy, x2="cost high"),
        base.mark_point(filled=True, size=60).encode(cost, accuracy, tooltip=list(dots)),
        base.mark_text(dx=9, dy=-9).encode(cost, accuracy, text="rank"),
    ).properties(width=700, height=400)
    return (
        f'<!DOCTYPE html><meta charset="utf-8"><title>{escape(title)}</title>'
        "<style>body {font: 14px sans-serif} td, th {padding: 3px 8px; white-space: nowrap}</style>"
        f"<h1>{escape(title)}</h1>{chart.to_html(inline=True, fullhtml=False)}<p>{_LEGEND}</p>"
        f"{_shown(table).to_html(border=0)}"
    )


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text: a cell for mean and deviation; a single seed has none."""
    shown = table.copy()
    for column in _METRICS:
        spread = zip(table[column], shown.pop(f"{column} std"), strict=True)
        shown[column] = [
            "-" if pd.isna(mean) else f"{mean:.4f}" + ("" if pd.isna(std) else f" ± {std:.4f}")
            for mean, std in spread
        ]
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m edgeke.compare", description=__doc__)
    parser.add_argument("--profile", help="default: the one in params.yaml")
    options = parser.parse_args(arguments)
    try:
        loaded = params.load()
        profile, name = options.profile or loaded.profile_name, loaded.tracking.experiment
        runs = read_runs(name, profile)
        table = rank(runs)
        width = shutil.get_terminal_size((120, 24)).columns
        print(_shown(table).to_string(line_width=width), f"\n{_LEGEND}")
        if runs["place"].nunique() > 1:
            print(f"Latencies of several machines do not compare: {'; '.join(set(runs['place']))}.")
        write_text(_PAGE, make_page(table, f"Experiment {name}, profile {profile}"))
    except InputError as error:
        return report(error)
    print(_PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())

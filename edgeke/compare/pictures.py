"""The pictures of a comparison, as Vega-Lite specifications made by Altair."""

from typing import Any

import altair as alt

from edgeke.compare.columns import labels
from edgeke.compare.rows import Ranking, Row, Spread

__all__ = ["LARGEST", "accuracy_picture", "cost_picture"]

LARGEST = 30  # rows in a picture: more cannot be told apart

_COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000"]
_FACETS = 2  # pictures of operating points side by side
_NEAR = 0.05  # of an axis: ranks of nearer dots would cover each other
_ZOOMED = alt.Scale(zero=False, nice=True, padding=14)


def accuracy_picture(ranking: Ranking) -> dict[str, Any]:
    """Validation accuracy of every exit, a line per row of the table, best first."""
    values = []
    for label, row in _shown(ranking):
        for exit in row.exits:
            accuracy = row.spread(f"validation/exit_{exit}/accuracy")
            assert accuracy is not None
            values.append({"setting": label, "exit": f"exit {exit}", **_measured("x", accuracy)})
    base = alt.Chart(alt.InlineData(values)).encode(
        y=alt.Y(
            "setting:N",
            sort=[label for label, _ in _shown(ranking)],
            title=None,
            axis=alt.Axis(labelLimit=420, labelFontSize=12, grid=True, tickBand="extent"),
        ),
        yOffset=alt.YOffset("exit:N"),
        color=alt.Color(
            "exit:N",
            title=None,
            scale=alt.Scale(range=_COLOURS),
            legend=alt.Legend(symbolOpacity=1, symbolStrokeWidth=0),
        ),
    )
    bars = base.mark_rule(strokeWidth=2, opacity=0.6).encode(
        x=alt.X("x_low:Q", scale=_ZOOMED, title="validation accuracy (%)"), x2="x_high:Q"
    )
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(
        x=alt.X("x:Q", scale=_ZOOMED),
        tooltip=[
            alt.Tooltip("setting:N"),
            alt.Tooltip("exit:N"),
            alt.Tooltip("x_text:N", title="accuracy (%)"),
            alt.Tooltip("seeds:Q"),
        ],
    )
    exits = max(len(row.exits) for _, row in _shown(ranking))
    step = alt.Step(11 * exits + 6, **{"for": "position"})
    return _spec((bars + dots).properties(width=700, height=step))


def cost_picture(ranking: Ranking) -> dict[str, Any] | None:
    """Validation accuracy against mean cost at the default point and at each requirement.

    The numbers at the dots are ranks. None where no row knows its costs.
    """
    points = ["default", *dict.fromkeys(n for _, row in _shown(ranking) for n in row.requirements)]
    values: list[dict[str, Any]] = []
    for place, (label, row) in enumerate(_shown(ranking), 1):
        for point in points:
            cost = row.spread(f"validation/{point}/cost_share")
            accuracy = row.spread(f"validation/{point}/accuracy")
            if cost is None or accuracy is None:
                continue
            found = {**_measured("x", cost), **_measured("y", accuracy)}
            value = {"point": point, "setting": label, "place": place, **found}
            value["distance"] = row.settings.get("kd.distance", "-")
            value["order"] = row.settings.get("branchynet.order", "-")
            values.append(value)
    if not values:
        return None
    _write_ranks(values)
    base = alt.Chart().encode(
        color=alt.Color(
            "distance:N",
            scale=alt.Scale(range=_COLOURS),
            legend=alt.Legend(symbolOpacity=1, symbolStrokeWidth=0),
        )
    )
    costs, accuracies = "mean cost (% of the plain network's MACs)", "validation accuracy (%)"
    x = alt.X("x:Q", scale=_ZOOMED, title=costs)
    y = alt.Y("y:Q", scale=_ZOOMED, title=accuracies)
    across = base.mark_rule(opacity=0.6).encode(
        x=alt.X("x_low:Q", scale=_ZOOMED, title=costs), x2="x_high:Q", y=y
    )
    along = base.mark_rule(opacity=0.6).encode(
        y=alt.Y("y_low:Q", scale=_ZOOMED, title=accuracies), y2="y_high:Q", x=x
    )
    dots = base.mark_point(filled=True, size=70, opacity=0.9).encode(
        x=x,
        y=y,
        shape="order:N",
        tooltip=[
            alt.Tooltip("setting:N"),
            alt.Tooltip("x_text:N", title="mean cost (%)"),
            alt.Tooltip("y_text:N", title="accuracy (%)"),
            alt.Tooltip("seeds:Q"),
        ],
    )
    ranks = base.mark_text(align="left", dx=7, dy=-7, fontSize=11).encode(
        x=x, y=y, text="ranks:N", color=alt.value("#444")
    )
    layers = alt.layer(across, along, dots, ranks).properties(width=460, height=280)
    facet = alt.Facet("point:N", sort=points, title=None, header=alt.Header(labelFontSize=12))
    return _spec(layers.facet(facet=facet, columns=_FACETS, data=alt.InlineData(values)))


def _shown(ranking: Ranking) -> list[tuple[str, Row]]:
    return list(zip(labels(ranking), ranking.rows, strict=True))[:LARGEST]


def _measured(axis: str, of: Spread) -> dict[str, object]:
    """A share in percent: where it is drawn, its bar over seeds, and its words."""
    mean, std = 100 * of.mean, None if of.std is None else 100 * of.std
    text = f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
    low, high = mean - (std or 0), mean + (std or 0)
    ends = {f"{axis}_low": low, f"{axis}_high": high}
    return {axis: mean, **ends, f"{axis}_text": text, "seeds": of.seeds}


def _write_ranks(values: list[dict[str, Any]]) -> None:
    """Add the text beside each dot: ranks of dots that nearly touch stand beside the first."""
    spans = {axis: [value[axis] for value in values] for axis in ("x", "y")}
    near = {axis: _NEAR * (max(span) - min(span)) for axis, span in spans.items()}
    for n, value in enumerate(values):
        value["ranks"] = ""
        first = next(
            other
            for other in values[: n + 1]
            if other["point"] == value["point"]
            and (other is value or other["ranks"])
            and all(abs(other[axis] - value[axis]) <= near[axis] for axis in near)
        )
        first["ranks"] += (", " if first["ranks"] else "") + str(value["place"])


def _spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    found: dict[str, Any] = (
        chart.configure_axis(
            labelColor="#333", titleColor="#333", titleFontWeight="normal", gridColor="#e6e6e6"
        )
        .configure_view(stroke="#ccc")
        .to_dict()
    )
    return found

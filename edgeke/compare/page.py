"""A comparison as one HTML file that needs no network: tables, and pictures drawn by Vega."""

import json
from collections.abc import Sequence
from datetime import datetime
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from edgeke.compare.columns import CAPTION, Column, columns, notes, variants
from edgeke.compare.pictures import LARGEST, accuracy_picture, cost_picture
from edgeke.compare.rows import Ranking
from edgeke.files import write_text

__all__ = ["write_page"]

# The policy forbids the page every address, so that nothing can be loaded by mistake.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1400px;
  padding: 0 1.5rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
h3 { font-size: 1rem; margin: 1.6rem 0 0.4rem; }
p { max-width: 60rem; margin: 0.4rem 0; }
p, li { color: #444; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.6rem; text-align: left; white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
thead th[colspan] { color: #555; font-weight: normal; }
thead th[colspan]:not(:empty) { border-left: 1px solid #ccc; }
thead tr:last-child th { border-bottom: 2px solid #888; }
tbody tr:nth-child(even) { background: #f6f7f9; }
tbody td { border-bottom: 1px solid #eee; }
"""
_DRAW = """
const pictures = JSON.parse(document.getElementById("pictures").textContent);
for (const [id, spec] of Object.entries(pictures))
  vegaEmbed("#" + id, spec, {renderer: "svg", actions: false, ast: true}).catch((error) => {
    document.getElementById(id).textContent = "This picture could not be drawn: " + error.message;
  });
"""


def write_page(rankings: Sequence[Ranking], experiment: str, path: Path) -> str:
    """Write the page to `path` atomically; returns its content.

    Errors: InputError when the disk is full.
    """
    pictures: dict[str, dict[str, Any]] = {}
    sections = "".join(_section(ranking, pictures) for ranking in rankings)
    title = escape(f"Comparison of {experiment}")
    made = datetime.now().astimezone().strftime("%d %B %Y, %H:%M %Z")
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{title}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>Made {made} from the runs in MLflow. {escape(CAPTION)} Test numbers stand beside and decide
nothing.</p>
{sections}
<script type="application/json" id="pictures">{_in_script(pictures)}</script>
<script>{_vega()}</script>
</body>
</html>
"""
    write_text(path, page)
    return page


def _section(ranking: Ranking, pictures: dict[str, dict[str, Any]]) -> str:
    """One profile; its pictures are added to `pictures` by the id of their place."""
    cost = cost_picture(ranking)
    found = {
        "Validation accuracy of every exit": (
            accuracy_picture(ranking),
            "Dots are means, bars one standard deviation over seeds.",
        ),
        "Validation accuracy against mean cost": (
            cost,
            "At the default point and at the point that answers each requirement. "
            "The numbers at the dots are ranks.",
        ),
    }
    parts = [f"<h2>{escape(ranking.profile)}</h2>"]
    for title, (spec, words) in found.items():
        if spec is not None:
            place = f"picture-{len(pictures)}"
            pictures[place] = spec
            few = f" The best {LARGEST} rows." if len(ranking.rows) > LARGEST else ""
            parts.append(f"<h3>{title}</h3><p>{words}{few}</p>")
            parts.append(f'<div class="scroll"><div id="{place}"></div></div>')
    parts += ["<h3>All numbers</h3>", _table(columns(ranking, detailed=True))]
    if others := variants(ranking):
        parts += ["<p>What <i>other</i> stands for:</p>", _table(others)]
    if known := notes(ranking):
        parts.append(f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in known)}</ul>")
    parts += ["<h3>The runs behind it</h3>", _runs(ranking)]
    return "\n".join(parts)


def _table(shown: Sequence[Column]) -> str:
    headings = [(name, len(list(group))) for name, group in groupby(shown, lambda of: of.heading)]
    heads = "".join(f'<th colspan="{count}">{escape(name)}</th>' for name, count in headings)
    head = f"<tr>{heads}</tr>" if any(name for name, _ in headings) else ""
    names = "".join(f"<th>{escape(column.name)}</th>" for column in shown)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>\n"
        for cells in zip(*(column.cells for column in shown), strict=True)
    )
    return (
        f'<div class="scroll"><table><thead>{head}<tr>{names}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>"
    )


def _runs(ranking: Ranking) -> str:
    names = ("rank", "seed", "run", "id", "machine", "commit", "ended")
    rows = [
        (
            str(place),
            run.seed,
            run.name,
            run.id,
            run.machine or "-",
            run.commit[:7] or "-",
            datetime.fromtimestamp(run.ended / 1000).astimezone().strftime("%Y-%m-%d %H:%M"),
        )
        for place, row in enumerate(ranking.rows, 1)
        for run in row.runs
    ]
    pairs = zip(names, zip(*rows, strict=True), strict=True)
    return _table([Column("", name, cells) for name, cells in pairs])


def _vega() -> str:
    """Vega with what draws the pictures, as one script, in the version that Altair writes for."""
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    return vl_convert.javascript_bundle(_DRAW, version)


def _in_script(content: Any) -> str:
    """JSON that cannot end the script it stands in: users name runs."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c")

"""A ranking in the terminal."""

import itertools
import re
import textwrap
from collections.abc import Sequence

from edgeke.compare.columns import CAPTION, Column, columns, notes, variants
from edgeke.compare.rows import Ranking

__all__ = ["render"]

_GAP = "  "
_NAME_WIDTH = 14  # longer names are broken where they have underscores or dots


def render(ranking: Ranking, width: int) -> str:
    """The table, broken into several below each other where it is wider than `width` characters.

    Every part repeats the columns that say whose row it is.
    """
    shown = columns(ranking)
    keys = [column for column in shown if column.key]
    parts = [keys]
    for _, group in itertools.groupby(
        (column for column in shown if not column.key), lambda column: column.heading
    ):
        together = list(group)
        if len(parts[-1]) > len(keys) and _width([*parts[-1], *together]) > width:
            parts.append(keys)
        parts[-1] = [*parts[-1], *together]
    runs = sum(len(row.runs) for row in ranking.rows)
    lines = [f"{ranking.profile}: {len(ranking.rows)} settings, {runs} runs"]
    lines += textwrap.wrap(CAPTION, width)
    for part in parts:
        lines += ["", *_lines(part)]
    if others := variants(ranking):
        lines += ["", "What `other` stands for:", *_lines(others)]
    return "\n".join(
        [*lines, "", *(textwrap.fill(note, width) for note in notes(ranking))]
    ).rstrip()


def _lines(shown: Sequence[Column]) -> list[str]:
    """Headings, names, a rule, and a line per row."""
    widths, heads = [], []
    for heading, group in itertools.groupby(shown, lambda column: column.heading):
        wide = [_column_width(column) for column in group]
        wide[-1] += max(0, len(heading) - sum(wide) - len(_GAP) * (len(wide) - 1))
        heads.append(heading.ljust(sum(wide) + len(_GAP) * (len(wide) - 1)))
        widths += wide
    names = [_broken(column.name) for column in shown]
    tallest = max(map(len, names))
    lines = [_GAP.join(heads)] if any(column.heading for column in shown) else []
    for level in range(tallest):
        lines.append(_joined([name[level] if level < len(name) else "" for name in names], widths))
    lines.append(_GAP.join("-" * w for w in widths))
    for cells in zip(*(column.cells for column in shown), strict=True):
        lines.append(_joined(cells, widths))
    return [line.rstrip() for line in lines]


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    return _GAP.join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True))


def _broken(name: str) -> list[str]:
    """A long name in lines of at most `_NAME_WIDTH`, broken behind underscores and dots."""
    lines = [""]
    for piece in re.findall(r"[^_.]*[_.]?", name):
        if lines[-1] and len(lines[-1] + piece) > _NAME_WIDTH:
            lines.append("")
        lines[-1] += piece
    return lines


def _column_width(column: Column) -> int:
    return max(map(len, [*_broken(column.name), *column.cells]))


def _width(shown: Sequence[Column]) -> int:
    return max(map(len, _lines(shown)))

"""A comparison's page: forest plots of every quantity, the differences with their verdicts, and what the recipes differ in."""

from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from mechsub.comparison.comparison import Comparison
from mechsub.comparison.sections import Section
from mechsub.reporting.charts import draw_figure
from mechsub.reporting.page import render_page

MARK = "made by mechsub compare"
"""Stands in every page, so that no other file is overwritten."""
_MOST_ROWS = 80
_MOST_FIELDS = 60
_MOST_NAMED = 3
_NUMBERS = ("estimate", "low", "high", "null_low", "null_high", "difference", "difference_low", "difference_high")
_WORDS = (
    *("run", "condition", "trait", "own_verdict", "against", "method", "verdict", "reason", "rule", "outcome", "place"),
    "null",
)


def render_comparison(comparison: Comparison, file: str, command: str | None) -> str:
    """The whole page. ``file``: the name of the HDF5 file beside it; ``command``: what the user typed."""
    runs = comparison.runs
    return render_page(
        "comparison.html",
        {"command": command},
        {"name": _name([run.name for run in runs])},
        mark=MARK,
        comparison=comparison,
        file=file,
        sections=[_show(section) for section in comparison.sections],
        fields=list(zip(comparison.recipes.fields, comparison.recipes.values, strict=True))[:_MOST_FIELDS],
        num_more_fields=max(0, len(comparison.recipes.fields) - _MOST_FIELDS),
    )


def _name(runs: Sequence[str]) -> str:
    if len(runs) > _MOST_NAMED:
        return f"{runs[0]} and {len(runs) - 1} other runs"
    return " and ".join(part for part in (", ".join(runs[:-1]), runs[-1]) if part)


def _show(section: Section) -> Mapping[str, Any]:
    """A section as the template takes it; only those with rows that are held against each other have a table."""
    result, data = section.result, section.result.data
    rows = _rows(data) if "difference" in data else []
    return {
        "name": section.name,
        "title": section.title,
        "summary": result.summary,
        "figures": [draw_figure(figure, result) for figure in result.figures],
        "rows": rows[:_MOST_ROWS],
        "num_more": max(0, len(rows) - _MOST_ROWS),
        "several_traits": "trait" in data.coords and len({*map(str, data.trait.values)}) > 1,
        "several_places": len({row["place"] for row in rows}) > 1,
        "several_runs": "run" in data.coords and len({*map(str, data.run.values)}) > 1,
    }


def _rows(data: xr.Dataset) -> Sequence[dict[str, Any]]:
    found = []
    for place in range(data.sizes["row"]):
        row = data.isel(row=place)
        numbers = {name: float(row[name].values) for name in _NUMBERS}
        found.append({**numbers, **{name: str(row[name].values) for name in _WORDS}, "n": int(row.n.values)})
    return found

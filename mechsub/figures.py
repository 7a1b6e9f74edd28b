"""Figures as data: a Vega-Lite spec over named variables of a result, drawn later by the report.

The spec holds no numbers: its data is filled from the result's arrays, so that a figure cannot differ from them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

DATA = alt.NamedData("data")
"""The data of every figure's chart."""


@dataclass(frozen=True)
class Figure:
    """One figure of an analysis."""

    name: str
    title: str
    """What it shows, as a sentence."""
    caption: str
    """Formula, scope, unit, n, null."""
    variables: tuple[str, ...]
    """Which arrays become columns; their dims and coordinates come along."""
    spec: Mapping[str, Any]
    """A Vega-Lite spec whose data is named ``data``."""
    select: Mapping[str, Any] = field(default_factory=dict)
    """Labels to keep, by dim."""
    headline: bool = False
    """Whether it belongs on the report's first screen."""


def chart_spec(chart: alt.TopLevelMixin) -> dict[str, Any]:
    """A chart over `DATA` as plain data.

    Raises:
        ValueError: a facet whose inner chart has data of its own; every panel would then show all rows.
    """
    spec: dict[str, Any] = chart.to_dict()
    if "facet" in spec and _holds_key(spec["spec"], "data"):
        raise ValueError("the inner chart of a facet must not name its data: every panel would show all rows")
    return {name: value for name, value in spec.items() if name not in {"config", "datasets"}}


def diverging_scale(values: np.ndarray) -> alt.Scale:
    """Blue under 0 and orange over it, equally strong for equal sizes, wide enough for ``values``."""
    known = values[np.isfinite(values)]
    bound = float(np.abs(known).max()) if known.size else 1.0
    return alt.Scale(scheme="blueorange", domain=[-(bound or 1.0), bound or 1.0])


def fold_variables(value: str, names: Mapping[str, str]) -> alt.Chart:
    """The variables ``names`` as rows of one column ``value``, with who they belong to in ``who``; missing ones dropped."""
    folded: alt.Chart = (
        alt.Chart(DATA)
        .transform_fold(list(names), as_=["which", value])
        .transform_filter(f"isValid(datum.{value})")
        .transform_calculate(who=f"{json.dumps(dict(names), ensure_ascii=False)}[datum.which]")
    )
    return folded


def color_by_who(names: Mapping[str, str]) -> alt.Color:
    """The colours of `fold_variables`, in the order of ``names``."""
    return alt.Color("who:N", sort=list(names.values()), title=None, legend=alt.Legend(labelLimit=0))


def zero_line() -> alt.Chart:
    """A dotted rule at what it is told to encode, mostly 0."""
    rule: alt.Chart = alt.Chart(DATA).mark_rule(strokeDash=[2, 3], color="#94a3b8")
    return rule


def fill_figure(figure: Figure, data: xr.Dataset) -> dict[str, Any]:
    """The figure's spec with its numbers: one row per combination of the variables' dims; NaN rows become null."""
    chosen = data[list(figure.variables)]
    if figure.select:
        chosen = chosen.sel({dim: labels for dim, labels in figure.select.items()})
    frame = chosen.to_dataframe().reset_index()
    rows = json.loads(frame.to_json(orient="records", double_precision=9))
    return {**figure.spec, "datasets": {"data": rows}}


def _holds_key(part: Any, key: str) -> bool:
    if isinstance(part, Mapping):
        return key in part or any(_holds_key(value, key) for value in part.values())
    return isinstance(part, list) and any(_holds_key(value, key) for value in part)

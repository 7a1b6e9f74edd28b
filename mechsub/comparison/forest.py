"""The forest plot of a panel: every row's members, mean, interval and null; its difference; and what came out, in words."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import xarray as xr

from mechsub.comparison.panels import POOLED, Held, Panel
from mechsub.figures import DATA, Figure, chart_spec, zero_line

OF_RUN, OF_CONDITION = "another run", "another condition"
"""What a row can be held against."""
MOST_DRAWN = 36
"""Rows of a forest plot; more cannot be read."""
_COLORS = ("#c2410c", "#2563eb", "#7c3aed", "#059669", "#b45309", "#0e7490")
_NULL, _MUTED = "#94a3b8", "#5b6675"
_ROW_HEIGHT = 22
_MOST_SCOPES = 3


def say_kind(held: Held | None) -> str:
    """Whether a row is held against another run or another condition; empty where it is held against nothing."""
    return "" if held is None else OF_RUN if held.is_of_run else OF_CONDITION


def choose_drawn(panel: Panel) -> list[int]:
    """The places of the rows that the forest plot shows: those with a value, of too many the means over traits."""
    places = [place for place, row in enumerate(panel.rows) if row.has_value]
    pooled = [place for place in places if panel.rows[place].trait == POOLED]
    return (pooled if pooled and len(places) > MOST_DRAWN else places)[:MOST_DRAWN]


def draw_forest(panel: Panel, data: xr.Dataset, name: str) -> Figure:
    """Every row's members, mean, interval and null; beside it the difference with its margin; then what came out, in words."""
    places = choose_drawn(panel)
    rows = [str(data.row.values[place]) for place in places]
    look = _Look(rows, list(dict.fromkeys(panel.rows[place].run.name for place in places)))
    kinds = [kind for kind in (OF_RUN, OF_CONDITION) if kind in data.kind.values[places]]
    titles = {
        OF_RUN: f"difference from {panel.baseline[0].name}, same condition",
        OF_CONDITION: f"difference from {panel.baseline[1]}{', the baseline' if OF_RUN in kinds else ''}",
    }
    width = {0: 0, 1: 330}.get(len(kinds), 225)
    parts = [_draw_values(panel, look), *(_draw_differences(kind, titles[kind], look, width) for kind in kinds)]
    return Figure(
        name=f"forest_{name}",
        title=f"{_call(panel)}: every row, and its difference from what it is held against",
        caption=_caption(panel, len(places)),
        variables=(
            *("value", "estimate", "low", "high", "null_low", "null_high", "n", "own_verdict", "margin", "outcome", "kind"),
            *("difference", "difference_low", "difference_high", "against", "method", "verdict"),
        ),
        spec=chart_spec(alt.hconcat(*parts, _draw_words(look), spacing=16, data=DATA)),
        select={"row": rows},
        headline=True,
    )


@dataclass(frozen=True)
class _Look:
    """What the parts of a forest plot share."""

    rows: Sequence[str]
    runs: Sequence[str]

    @property
    def height(self) -> int:
        """All rows."""
        return _ROW_HEIGHT * len(self.rows)

    @property
    def color(self) -> Any:
        """A colour a run, where there are few of them; rows name their runs anyhow."""
        if not 1 < len(self.runs) <= len(_COLORS):
            return alt.value(_COLORS[0])
        scale = alt.Scale(domain=list(self.runs), range=list(_COLORS[: len(self.runs)]))
        return alt.Color("run:N", scale=scale, legend=None)

    @property
    def one_a_row(self) -> alt.Chart:
        """Without the members, each of which repeats what is of the row."""
        chart: alt.Chart = alt.Chart(DATA).transform_filter("datum.member == 0")
        return chart

    def y(self, *, labels: bool) -> alt.Y:
        """The rows, all of them in every part, with or without their names."""
        axis = alt.Axis(labelLimit=0, labels=labels, ticks=False, domain=False, labelPadding=8, labelFontSize=12)
        return alt.Y("row:N", title=None, scale=alt.Scale(domain=list(self.rows)), axis=axis)


def _draw_values(panel: Panel, look: _Look) -> Any:
    y, one, color = look.y(labels=True), look.one_a_row, look.color
    scale = alt.Scale(zero=False, nice=True, padding=6)
    x = alt.X("value:Q", title=f"{_call(panel).lower()} ({panel.unit})", scale=scale, axis=alt.Axis(tickCount=6))
    tooltip = ["run:N", "condition:N", "trait:N", *_tooltips("estimate", "low", "high"), "n:Q", "own_verdict:N"]
    chart: Any = alt.layer(
        zero_line().encode(x=alt.datum(0)),
        one.mark_rule(strokeWidth=9, opacity=0.4, color=_NULL).encode(x="null_low:Q", x2="null_high:Q", y=y),
        alt.Chart(DATA).mark_circle(size=26, opacity=0.32).encode(x=x, y=y, color=color),
        one.mark_rule(strokeWidth=2).encode(x="low:Q", x2="high:Q", y=y, color=color),
        one.mark_point(filled=True, size=70, opacity=1, shape="square").encode(
            x="estimate:Q", y=y, color=color, tooltip=tooltip
        ),
        data=DATA,
    )
    return chart.properties(width=380, height=look.height)


def _draw_differences(kind: str, title: str, look: _Look, width: int) -> Any:
    y, color = look.y(labels=False), look.color
    told = look.one_a_row.transform_filter(f"isValid(datum.difference) && datum.kind == '{kind}'")
    band = told.transform_filter("isValid(datum.margin)").transform_calculate(margin_low="-datum.margin")
    scale = alt.Scale(nice=True, padding=6)
    x = alt.X("difference:Q", title=title, scale=scale, axis=alt.Axis(tickCount=4, titleLimit=width + 40))
    numbers = _tooltips("difference", "difference_low", "difference_high")
    chart: Any = alt.layer(
        zero_line().encode(x=alt.datum(0)),
        band.mark_rule(strokeWidth=_ROW_HEIGHT, opacity=0.16, color=_NULL).encode(x="margin_low:Q", x2="margin:Q", y=y),
        told.mark_rule(strokeWidth=2).encode(x="difference_low:Q", x2="difference_high:Q", y=y, color=color),
        told.mark_point(filled=True, size=62, opacity=1).encode(
            x=x, y=y, color=color, tooltip=["row:N", "against:N", *numbers, "method:N", "verdict:N"]
        ),
        data=DATA,
    )
    return chart.properties(width=width, height=look.height)


def _draw_words(look: _Look) -> alt.Chart:
    text = look.one_a_row.mark_text(align="left", fontSize=12, color=_MUTED)
    words: alt.Chart = text.encode(x=alt.value(0), y=look.y(labels=False), text="outcome:N")
    return words.properties(width=220, height=look.height)


def _tooltips(*names: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(f"{name}:Q", format=".3f") for name in names]


def _call(panel: Panel) -> str:
    return panel.quantity.name.replace("_", " ").capitalize()


def _caption(panel: Panel, drawn: int) -> str:
    confidences = sorted({f"{100 * row.rules.confidence:g} %" for row in panel.rows})
    nulls = "; or ".join(dict.fromkeys(row.finding.null for row in panel.rows if row.finding))
    counts = sorted({row.interval.n for row in panel.rows if row.has_value})
    many = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    left = len(panel.rows) - drawn
    more = f" {left} more rows are in the file only, or have no value." if left else ""
    scopes = "; or ".join(list(dict.fromkeys(row.finding.scope for row in panel.rows if row.finding))[:_MOST_SCOPES])
    return (
        f"Left: {panel.formula or panel.quantity.variable}, {panel.unit}; {scopes}. Faint dots are members (n = {many}), the "
        f"square is their mean with its {' or '.join(confidences)} interval, the grey bar the row's own null: {nulls}. Then "
        "the difference of the values over their nulls, with its interval; the grey band is the margin, inside which "
        f"differences do not matter. At the right the verdict, and whether members are paired.{more}"
    )

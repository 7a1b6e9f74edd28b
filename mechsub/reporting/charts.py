"""Figures drawn to SVG, in one look, and the bundle that makes them live in a browser."""

import json
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import vl_convert
from markupsafe import Markup, escape

from mechsub.figures import Figure, fill_figure
from mechsub.results import Result

INK, MUTED, LINE, AXIS = "#1d2430", "#5b6675", "#e1e5eb", "#b8c0cc"
STUDENT, CONTROL = "#c2410c", "#64748b"

NEUTRALS = {"ink": INK, "muted": MUTED, "line": LINE, "axis": AXIS}
"""The colours that follow the page into dark mode, by their variable in its style."""

THEME: dict[str, Any] = {
    "background": "transparent",
    "font": "Arial",
    "view": {"stroke": None},
    "range": {"category": [STUDENT, CONTROL, "#2563eb", "#7c3aed", "#059669", "#b45309"]},
    "axis": {
        "labelColor": MUTED,
        "titleColor": MUTED,
        "titleFontWeight": "normal",
        "gridColor": LINE,
        "domainColor": AXIS,
        "tickColor": AXIS,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "labelLimit": 220,
    },
    "header": {"labelColor": INK, "labelFontSize": 12, "labelFontWeight": "bold"},
    "legend": {
        "labelColor": INK,
        "titleColor": MUTED,
        "labelFontSize": 12,
        "orient": "top",
        "symbolBaseFillColor": MUTED,
        "symbolBaseStrokeColor": MUTED,
        "symbolOpacity": 1,
        "symbolStrokeWidth": 3,
    },
}


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as the page shows it."""

    name: str
    title: str
    caption: str
    svg: Markup
    spec: Markup
    """The same figure as data, for the interactive view and for copying its numbers."""
    headline: bool


def draw_figure(figure: Figure, result: Result) -> DrawnFigure:
    """The figure as an SVG element that scales with the page, and as a spec with its numbers."""
    spec = fill_figure(figure, result.data)
    version = re.search(r"/v(\d+\.\d+)", str(spec.get("$schema", "")))
    svg: str = vl_convert.vegalite_to_svg(
        vl_spec=spec, vl_version=version.group(1) if version else None, config=THEME, show_warnings=False
    )
    drawn = _name_parts(_slim(svg[svg.index("<svg") :]), figure.name)
    drawn = drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(figure.title)}" ', 1)
    return DrawnFigure(figure.name, figure.title, figure.caption, Markup(drawn), _write_spec(spec), figure.headline)


def _slim(svg: str) -> str:
    """Without the labels of single marks, which role="img" hides anyhow, and to .01 of a pixel: a third of the length."""
    svg = re.sub(r' (?:role|aria-[a-z]+)="[^"]*"', "", svg)
    return re.sub(r' (?:d|transform)="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), svg)


def _name_parts(svg: str, figure: str) -> str:
    """Gradients and clips under names of the figure's own: pictures share a page, and their drawer numbers them anyhow."""
    for number, name in enumerate(re.findall(r'id="([^"]+)"', svg)):
        svg = svg.replace(f'id="{name}"', f'id="{figure}-{number}"').replace(f"#{name})", f"#{figure}-{number})")
    return svg


def _write_spec(spec: dict[str, Any]) -> Markup:
    """The spec as JSON for a script element.

    Its rows are lists under one line of names, and texts are places in a list of their column's: they would repeat in each.
    """
    rows = spec["datasets"]["data"]
    columns = list(rows[0]) if rows else []
    texts = {
        name: list(dict.fromkeys(row[name] for row in rows))
        for name in columns
        if any(isinstance(row[name], str) for row in rows)
    }
    places = {name: {text: place for place, text in enumerate(known)} for name, known in texts.items()}
    short = [[places[name][value] if name in places else value for name, value in row.items()] for row in rows]
    compact = {**spec, "config": THEME, "datasets": {"columns": columns, "texts": texts, "rows": short}}
    # "</" inside a script element would end it.
    return Markup(json.dumps(compact, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"))


@cache
def interactive_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script without any import: about 0.9 MB."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")

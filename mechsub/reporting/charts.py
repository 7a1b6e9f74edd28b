"""Figures drawn to SVG, in one look."""

import re
from typing import Any

import vl_convert

from mechsub.figures import Figure, fill_figure
from mechsub.results import Result

FONT = "Inter, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, GRID = "#1d2430", "#5b6675", "#e6e9ee"
STUDENT, CONTROL = "#c2410c", "#64748b"

THEME: dict[str, Any] = {
    "background": "transparent",
    "font": "Arial",
    "view": {"stroke": None},
    "range": {"category": [STUDENT, CONTROL, "#2563eb", "#7c3aed", "#059669", "#b45309"]},
    "axis": {
        "labelColor": MUTED,
        "titleColor": MUTED,
        "titleFontWeight": "normal",
        "gridColor": GRID,
        "domainColor": "#b8c0cc",
        "tickColor": "#b8c0cc",
        "labelFontSize": 11,
        "titleFontSize": 11,
        "labelLimit": 220,
    },
    "header": {"labelColor": INK, "labelFontSize": 12, "labelFontWeight": "bold"},
    "legend": {"labelColor": INK, "labelFontSize": 12, "orient": "top", "symbolOpacity": 1, "symbolStrokeWidth": 3},
}


def draw_figure(figure: Figure, result: Result) -> str:
    """The figure as an SVG element that scales with the page."""
    spec = fill_figure(figure, result.data)
    version = re.search(r"/v(\d+\.\d+)", str(spec.get("$schema", "")))
    svg: str = vl_convert.vegalite_to_svg(
        vl_spec=spec, vl_version=version.group(1) if version else None, config=THEME, show_warnings=False
    )
    return svg[svg.index("<svg") :]

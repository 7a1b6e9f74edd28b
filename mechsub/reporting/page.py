"""What every page has: the templates with their filters, and the script that makes figures live."""

import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mechsub.reporting.charts import NEUTRALS, interactive_bundle
from mechsub.statistics.intervals import format_bounds, format_number

_TONES = {
    "transferred": "strong",
    "above-null": "strong",
    "no-transfer": "calm",
    "equivalent-to-null": "calm",
    "reversed": "odd",
    "below-null": "odd",
    "larger": "strong",
    "no-difference": "calm",
    "smaller": "odd",
}
"""How loud a verdict is shown; every other one is an open question."""


def render_page(template: str, header: Mapping[str, Any], recipe: Mapping[str, Any], **content: Any) -> str:
    """One self-contained HTML file; nothing in it is fetched."""
    script = resources.files("mechsub.reporting") / "templates" / "interactive.js"
    return (
        _environment()
        .get_template(template)
        .render(
            header=header,
            recipe=recipe,
            name=recipe["name"],
            recipe_yaml=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
            swept=recipe.get("sweep", {}).get("fields", {}),
            neutrals=NEUTRALS,
            bundle=Markup(interactive_bundle()),
            script=Markup(script.read_text()),
            **content,
        )
    )


def format_interval(low: float, high: float) -> str:
    """``[low, high]``; empty where there is none."""
    return "" if not (math.isfinite(low) and math.isfinite(high)) else format_bounds(low, high)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mechsub.reporting"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=format_number, interval=format_interval, tone=lambda verdict: _TONES.get(verdict, "open"))
    environment.filters["words"] = lambda name: name.replace("_", " ")
    return environment

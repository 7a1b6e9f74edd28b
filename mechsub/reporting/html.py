"""The report: one self-contained HTML file that tells a newcomer what was run and what came out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mechsub.findings import Finding
from mechsub.reporting.charts import draw_figure
from mechsub.results import Result
from mechsub.statistics.intervals import format_number

_TONES = {
    "transferred": "strong",
    "above-null": "strong",
    "no-transfer": "calm",
    "equivalent-to-null": "calm",
    "reversed": "odd",
    "below-null": "odd",
}
"""How loud a verdict is shown; every other one is an open question."""

_NOT_SETUP = {"name", "description", "members", "conditions", "checkpoints", "callbacks", "threads"}
"""What the first screen says elsewhere, or leaves to the recipe at the end."""


@dataclass(frozen=True)
class DrawnFigure:
    """A figure as the page shows it."""

    name: str
    title: str
    caption: str
    svg: Markup
    headline: bool


def render_report(
    header: Mapping[str, Any], recipe: Mapping[str, Any], results: Mapping[str, Result], outgrown: Sequence[str] = ()
) -> str:
    """The whole page. Every number on it comes from the results, the recipe or the run's header.

    ``outgrown`` names the analyses whose results the run has outgrown; they are left out, and the page says so.
    """
    findings = [finding for result in results.values() for finding in result.findings]
    page = _environment().get_template("report.html")
    return page.render(
        header=header,
        recipe=recipe,
        recipe_yaml=yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True),
        setup=_setup(recipe),
        answers=_answers(findings),
        verdicts=_verdict_table(findings),
        conditions=_conditions(results),
        sections=[(name, result, _draw(result)) for name, result in results.items()],
        findings=findings,
        outgrown=outgrown,
    )


def _answers(findings: Sequence[Finding]) -> dict[str, list[str]]:
    """Verdict → conditions, for the quantity that answers the title's question: the first that has verdicts."""
    answers: dict[str, list[str]] = {}
    judged = [finding for finding in findings if finding.verdict]
    for finding in judged:
        if finding.quantity == judged[0].quantity:
            answers.setdefault(finding.verdict, []).append(finding.condition)
    return answers


def _setup(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The recipe in a line a part, for the first screen: what is off or zero is left out; all of it stands at the end."""
    shown = {name: value for name, value in recipe.items() if name not in _NOT_SETUP}
    return [(name, _say(value)) for name, value in shown.items()]


def _say(value: Any) -> str:
    if isinstance(value, Mapping):
        named = [str(value["name"])] if "name" in value else []
        settings = {name: inner for name, inner in value.items() if inner and name != "name"}
        return ", ".join(named + [f"{name.replace('_', ' ')} {_say(inner)}" for name, inner in settings.items()])
    return f"({', '.join(map(str, value))})" if isinstance(value, list) else str(value)


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


def format_interval(low: float, high: float) -> str:
    """``[low, high]``; empty where there is none."""
    return "" if not (math.isfinite(low) and math.isfinite(high)) else f"[{format_number(low)}, {format_number(high)}]"


def _verdict_table(findings: list[Finding]) -> dict[str, dict[str, Finding]]:
    """Condition → quantity → the finding that carries a verdict."""
    table: dict[str, dict[str, Finding]] = {}
    for finding in findings:
        if finding.verdict:
            table.setdefault(finding.condition, {})[finding.quantity] = finding
    return table


def _conditions(results: Mapping[str, Result]) -> dict[str, str]:
    """How each condition differs from the matched case, where an analysis says so."""
    said: dict[str, str] = {}
    for result in results.values():
        if "condition_difference" in result.data:
            described = result.data.condition_difference
            said |= dict(zip(map(str, described.condition.values), map(str, described.values), strict=True))
    return said


def _draw(result: Result) -> list[DrawnFigure]:
    return [
        DrawnFigure(figure.name, figure.title, figure.caption, Markup(draw_figure(figure, result)), figure.headline)
        for figure in result.figures
    ]

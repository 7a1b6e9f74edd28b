"""The report: one self-contained HTML file that tells a newcomer what was run and what came out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechsub.findings import Finding
from mechsub.reporting.charts import DrawnFigure, draw_figure
from mechsub.reporting.opening import build_opening
from mechsub.reporting.page import render_page
from mechsub.results import Result

_NOT_SETUP = {"name", "description", "members", "conditions", "checkpoints", "callbacks", "threads"}
"""What the first screen says elsewhere, or leaves to the recipe at the end."""
_MOST_SAID = 3


@dataclass(frozen=True)
class Section:
    """One analysis on the page."""

    name: str
    result: Result
    figures: Sequence[DrawnFigure]
    verdicts: Mapping[tuple[str, str], Mapping[str, Finding]]

    @property
    def places(self) -> Mapping[tuple[str, str, str], int]:
        """At how many scopes each quantity of a condition and trait is judged; the verdicts hold the first of them."""
        judged = [finding for finding in self.result.findings if finding.verdict]
        return Counter((finding.condition, finding.trait, finding.quantity) for finding in judged)


@dataclass(frozen=True)
class Glance:
    """The first judged quantity of one analysis, in all conditions."""

    analysis: str
    finding: Finding
    """One of them, for what is the same in all."""
    cells: Mapping[str, Mapping[str, Sequence[Finding]]]
    """Condition → verdict → the findings that have it, one a trait."""


def render_report(
    header: Mapping[str, Any],
    recipe: Mapping[str, Any],
    results: Mapping[str, Result],
    outgrown: Sequence[str] = (),
    left_out: Mapping[str, str] | None = None,
) -> str:
    """The whole page. Every number on it comes from the results, the recipe or the run's header.

    ``outgrown`` names the analyses whose results the run has outgrown; they are left out, and the page says so.
    ``left_out``: the analyses that the run could not feed, each with what to supply.
    """
    findings = [finding for result in results.values() for finding in result.findings]
    sections = [
        Section(name, result, [draw_figure(figure, result) for figure in result.figures], _verdict_table(result.findings))
        for name, result in results.items()
    ]
    first = next((section for section in sections if section.verdicts), None)
    glances = [_glance(section) for section in sections if section.verdicts and section is not first]
    return render_page(
        "report.html",
        {**header, "recipe": recipe},
        recipe,
        setup=_setup(recipe),
        opening=build_opening(recipe, findings, _describe_teachers(first)),
        verdicts=first.verdicts if first else {},
        glances=glances,
        glanced_conditions=list(dict.fromkeys(condition for glance in glances for condition in glance.cells)),
        num_conditions=len({finding.condition for finding in findings if finding.verdict and finding.condition}),
        replicates=_say_replicates(recipe["members"], findings),
        several_traits=len({finding.trait for finding in findings}) > 1,
        conditions=_conditions(results),
        sections=sections,
        first=first,
        findings=findings,
        outgrown=outgrown,
        left_out=left_out or {},
    )


def _say_replicates(members: int, findings: Sequence[Finding]) -> str:
    """What a member is a replicate of: not of the reference, where all share one."""
    references = min((finding.num_references for finding in findings), default=members)
    if references >= members:
        return "each an independent replicate"
    return f"replicates that share {references} reference{'s' if references > 1 else ''}: no claim is about another one"


def _describe_teachers(first: Section | None) -> list[str]:
    """What the analysis whose verdicts open the page says of references and teachers: a sentence a trait, of the first ones."""
    if first is None:
        return []
    said = [sentence for sentence in first.result.summary if "teachers" in sentence and "eferences" in sentence]
    return said[:_MOST_SAID]


def _setup(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The recipe in a line a part, for the first screen: what is off or zero is left out; all of it stands at the end."""
    shown = {name: value for name, value in recipe.items() if name not in _NOT_SETUP}
    return [(name.replace("_", " "), _say(value)) for name, value in shown.items() if value not in (None, "", [], {})]


def _say(value: Any) -> str:
    if isinstance(value, Mapping):
        named = [str(value["name"])] if "name" in value else []
        settings = {name: inner for name, inner in value.items() if inner and name not in {"name", "path"}}
        chosen = str(value.get("kind", "")).replace("-", "_")
        if isinstance(settings.get(chosen), Mapping):  # of what belongs to a kind, only its own says something
            settings = {name: inner for name, inner in settings.items() if name == chosen or not isinstance(inner, Mapping)}
        return ", ".join(named + [f"{name.replace('_', ' ')} {_say(inner)}" for name, inner in settings.items()])
    return f"({', '.join(map(str, value))})" if isinstance(value, list) else str(value)


def _glance(section: Section) -> Glance:
    judged = [finding for row in section.verdicts.values() for finding in row.values()]
    quantity = next(finding.quantity for finding in section.result.findings if finding.verdict)
    cells: dict[str, dict[str, list[Finding]]] = {}
    for finding in judged:
        if finding.quantity == quantity:
            cells.setdefault(finding.condition, {}).setdefault(str(finding.verdict), []).append(finding)
    return Glance(section.name, next(finding for finding in judged if finding.quantity == quantity), cells)


def _verdict_table(findings: Sequence[Finding]) -> dict[tuple[str, str], dict[str, Finding]]:
    """(Condition, trait) → quantity → the finding that carries a verdict, conditions together."""
    judged = [finding for finding in findings if finding.verdict]
    conditions = list(dict.fromkeys(finding.condition for finding in judged))
    table: dict[tuple[str, str], dict[str, Finding]] = {}
    for finding in sorted(judged, key=lambda finding: conditions.index(finding.condition)):
        table.setdefault((finding.condition, finding.trait), {}).setdefault(finding.quantity, finding)
    return table


def _conditions(results: Mapping[str, Result]) -> dict[str, str]:
    """How each condition differs from the matched case, where an analysis says so."""
    said: dict[str, str] = {}
    for result in results.values():
        if "condition_difference" in result.data:
            described = result.data.condition_difference
            said |= dict(zip(map(str, described.condition.values), map(str, described.values), strict=True))
    return said

"""One table over all runs of a sweep, and its dose–response figures; made from the runs' findings alone."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from mechsub.architecture_matrix import MATRIX_ANALYSIS
from mechsub.figures import DATA, Figure, chart_spec
from mechsub.findings import Finding
from mechsub.results import Result, label_variable, status_variable
from mechsub.statistics.verdicts import AGAINST_NULL, TRANSFER

DRAWN = {"trait_score": "trait score", "alignment": "alignment cos(Δ, Δ_T)"}
"""The quantities whose dose–response is drawn; the table holds all of them."""
_SHAPES = {
    TRANSFER.above: "circle",
    TRANSFER.equivalent: "square",
    TRANSFER.below: "triangle-down",
    AGAINST_NULL.above: "circle",
    AGAINST_NULL.equivalent: "square",
    AGAINST_NULL.below: "triangle-down",
    TRANSFER.undecided: "cross",
    TRANSFER.too_few: "diamond",
}
"""One shape for each outcome in every figure; an analysis's own words get the shapes that are left."""
_MOST_DASHES = 6
"""More lines cannot be told apart by their dashes; the live figure still names them."""
_NUMBERS = ("estimate", "low", "high", "null_low", "null_high")
_STATUS = ("ok", "run_not_analysed", "not_measured", "no_interval_or_null")
OK, NOT_ANALYSED, NOT_MEASURED, NONE = range(4)
_DIMS = ("run", "condition", "quantity")


@dataclass(frozen=True)
class SweptResults:
    """What one run of a sweep has so far."""

    results: Mapping[str, Result]
    missing: str
    """What it lacks, in words; empty where it lacks nothing."""

    @property
    def findings(self) -> dict[tuple[str, str], Finding]:
        """By (condition, quantity): the first scope and context that an analysis gives, which are the widest and the judged.

        Where a run has several traits, a condition is one with its trait.
        """
        every = [finding for result in self.results.values() for finding in result.findings if finding.condition]
        several = len({finding.trait for finding in every}) > 1
        found: dict[tuple[str, str], Finding] = {}
        for finding in every:
            name = f"{finding.condition} ({finding.trait})" if several else finding.condition
            found.setdefault((name, finding.quantity), finding)
        return found


def build_table(vary: str, settings: Mapping[str, Mapping[str, Any]], results: Mapping[str, SweptResults]) -> Result:
    """The findings of every run as [run, condition, quantity], each over its widest scope; the settings; the figures over them.

    Findings that are of no condition stay in ``findings.json``.
    """
    findings = {run: found.findings for run, found in results.items()}
    keys = dict.fromkeys(key for found in findings.values() for key in found)
    conditions, quantities = ([*dict.fromkeys(part)] for part in zip(*keys, strict=True))
    variables = _finding_variables(findings, conditions, quantities) | _setting_variables(vary, settings)
    fields = list(next(iter(settings.values())))
    coords = {"run": list(settings), "condition": conditions, "quantity": quantities, "field": fields}
    percents = sorted({f"{100 * finding.confidence:g} %" for found in findings.values() for finding in found.values()})
    data = xr.Dataset(variables, coords, {"confidence": " or ".join(percents)})
    drawn = [(field, quantity) for field in fields for quantity in DRAWN if quantity in quantities]
    figures = [_dose_response(data, vary, field, quantity) for field, quantity in drawn]
    return Result(data, [], [figure for figure in figures if figure is not None], _sentences(findings, vary))


def name_missing_analyses(results: Mapping[str, SweptResults]) -> dict[str, SweptResults]:
    """The same, with every analysis named that a run lacks and another run has."""
    every = dict.fromkeys(name for found in results.values() for name in found.results)
    named = {}
    for run, found in results.items():
        lacking = [name for name in every if name not in found.results]
        words = [found.missing] * bool(found.missing) + [f"not analysed: {', '.join(lacking)}"] * bool(lacking)
        named[run] = SweptResults(found.results, "; ".join(words))
    return named


def _finding_variables(
    findings: Mapping[str, Mapping[tuple[str, str], Finding]], conditions: Sequence[str], quantities: Sequence[str]
) -> dict[str, xr.Variable]:
    shape = (len(findings), len(conditions), len(quantities))
    values = {name: np.full(shape, np.nan) for name in _NUMBERS}
    status = {name: np.full(shape, NOT_MEASURED, dtype=np.int8) for name in _NUMBERS}
    members = np.zeros(shape, dtype=np.int64)
    words = {name: np.full(shape, "", dtype=object) for name in ("verdict", "leading_verdict", "leading_quantity", "rule")}
    for row, found in enumerate(findings.values()):
        for column, condition in enumerate(conditions):
            for place, quantity in enumerate(quantities):
                cell = (row, column, place)
                finding = found.get((condition, quantity))
                for name in _NUMBERS:
                    values[name][cell] = getattr(finding, name, np.nan)
                    status[name][cell] = _explain(values[name][cell], finding, bool(found))
                if finding is not None:
                    members[cell] = finding.n
                    leading = _leading(found, finding)
                    words["verdict"][cell] = finding.verdict
                    words["rule"][cell] = finding.rule
                    words["leading_verdict"][cell] = leading.verdict
                    words["leading_quantity"][cell] = leading.quantity if leading.verdict else ""
    descriptions = {
        "estimate": "mean over the run's members",
        "low": "lower bound of its interval",
        "high": "upper bound of its interval",
        "null_low": "lower bound of its null",
        "null_high": "upper bound of its null",
    }
    variables = {
        name: label_variable(values[name], _DIMS, description=descriptions[name], unit="that of the quantity")
        for name in _NUMBERS
    }
    variables |= {f"{name}_status": status_variable(status[name], _DIMS, _STATUS, name) for name in _NUMBERS}
    variables["n"] = label_variable(members, _DIMS, description="members behind the estimate", unit="members")
    described = {
        "verdict": "verdict; Holm's correction within its run",
        "rule": "what would have counted for each verdict, and what was seen",
        "leading_verdict": "the first verdict of the same analysis and condition",
        "leading_quantity": "what that verdict is on",
    }
    for name, description in described.items():
        variables[name] = label_variable(words[name], _DIMS, description=description, unit="word")
    for name in ("unit", "formula", "null", "scope"):
        texts = np.array([_join_words(findings, quantity, name) for quantity in quantities], dtype=object)
        variables[f"quantity_{name}"] = label_variable(texts, ["quantity"], description=f"{name} of the quantity", unit="word")
    return variables


def _join_words(findings: Mapping[str, Mapping[tuple[str, str], Finding]], quantity: str, field: str) -> str:
    """What the runs say of a quantity; where a swept field makes them differ, each of it."""
    said = [
        getattr(finding, field) for found in findings.values() for finding in found.values() if finding.quantity == quantity
    ]
    return " or ".join(dict.fromkeys(said))


def _explain(value: float, finding: Finding | None, is_analysed: bool) -> int:
    if np.isfinite(value):
        return OK
    if finding is not None:
        return NONE
    return NOT_MEASURED if is_analysed else NOT_ANALYSED


def _leading(found: Mapping[tuple[str, str], Finding], finding: Finding) -> Finding:
    """The first finding of the same analysis, condition and trait that has a verdict; the finding itself where it has one."""
    if finding.verdict:
        return finding
    case = (finding.analysis, finding.condition, finding.trait)
    same = (other for other in found.values() if (other.analysis, other.condition, other.trait) == case)
    return next((other for other in same if other.verdict), finding)


def _setting_variables(vary: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, xr.Variable]:
    """Each run's value of each field, as text and as a number; and the series that it belongs to along that field."""
    fields = list(next(iter(settings.values())))
    numbers = [[float(run[field]) if _is_number(run[field]) else np.nan for field in fields] for run in settings.values()]
    texts = [[_write(run[field]) for field in fields] for run in settings.values()]
    dims = ("run", "field")
    return {
        "setting": label_variable(
            np.array(texts, dtype=object), dims, description="value of the field", unit="as in the recipe"
        ),
        "setting_number": label_variable(numbers, dims, description="value of the field", unit="as in the recipe"),
        "setting_number_status": status_variable(np.isnan(numbers), dims, ("ok", "not_a_number"), "setting_number"),
        "series": label_variable(
            np.array(_series(vary, settings, fields), dtype=object),
            dims,
            description="the other fields' values where at least two runs share them, else empty",
            unit="as in the recipe",
        ),
    }


def _series(vary: str, settings: Mapping[str, Mapping[str, Any]], fields: Sequence[str]) -> list[list[str]]:
    if vary == "zip":
        return [["all"] * len(fields) for _ in settings]
    columns = []
    for field in fields:
        others = [
            ", ".join(f"{name}={_write(run[name])}" for name in fields if name != field) or "all" for run in settings.values()
        ]
        shared = Counter(others)
        columns.append([text if shared[text] > 1 else "" for text in others])
    return [list(row) for row in zip(*columns, strict=True)]


def _dose_response(data: xr.Dataset, vary: str, field: str, quantity: str) -> Figure | None:
    """A quantity against one field, with its null; nothing where no two runs differ in this field alone."""
    numbers = data.setting_number.sel(field=field).values
    in_series = data.series.sel(field=field).values != ""
    has_numbers = bool(np.isfinite(data.estimate.sel(quantity=quantity)).any())
    if len(set(data.setting.sel(field=field).values[in_series])) < 2 or not has_numbers:
        return None
    x = _setting_axis(field, numbers, list(dict.fromkeys(data.setting.sel(field=field).values)))
    names = {"student": "student", "null": "control (null)"}
    chart = (
        alt.Chart(DATA)
        .transform_filter("datum.series != '' && isValid(datum.estimate)")
        .transform_calculate(
            null_middle="(datum.null_low + datum.null_high) / 2", **{who: f"'{name}'" for who, name in names.items()}
        )
    )
    y = alt.Y("estimate:Q", title=DRAWN[quantity], scale=alt.Scale(zero=False))
    student, null = (alt.Color(f"{who}:N", title=None, scale=alt.Scale(domain=list(names.values()))) for who in names)
    present = [name for name in _SHAPES if name in data.leading_verdict.sel(quantity=quantity).values]
    scale = alt.Scale(domain=list(_SHAPES), range=list(_SHAPES.values()))
    shape = alt.Shape("leading_verdict:N", title="verdict", scale=scale, legend=alt.Legend(values=present))
    tooltip = ["run:N", "setting:N", "series:N", alt.Tooltip("estimate:Q", format=".3f"), "leading_verdict:N", "n:Q"]
    series = {str(name) for name in data.series.sel(field=field).values} - {""}
    by_series: Any = {"detail": "series:N"}
    if 1 < len(series) <= _MOST_DASHES:
        by_series = {"strokeDash": alt.StrokeDash("series:N", title="the other fields")}
    layers = [
        chart.mark_rule(strokeWidth=5, opacity=0.35).encode(x=x, y="null_low:Q", y2="null_high:Q", color=null),
        chart.mark_line(strokeWidth=1, opacity=0.6).encode(x=x, y="null_middle:Q", color=null, **by_series),
        chart.mark_line(strokeWidth=1.5).encode(x=x, y=y, color=student, **by_series),
        chart.mark_rule(strokeWidth=1.5).encode(x=x, y="low:Q", y2="high:Q", color=student),
        chart.mark_point(filled=True, size=65, opacity=1).encode(x=x, y=y, color=student, shape=shape, tooltip=tooltip),
    ]
    facets = (
        alt.layer(*layers, data=DATA)
        .properties(width=150, height=125)
        .facet(facet=alt.Facet("condition:N", sort=list(map(str, data.condition.values)), title=None), columns=3)
    )
    return Figure(
        name=f"{quantity}-by-{field}".replace(".", "-").replace("_", "-"),
        title=f"{DRAWN[quantity][0].upper()}{DRAWN[quantity][1:]} against {field}",
        caption=_caption(data, quantity, vary),
        variables=(*_NUMBERS, "leading_verdict", "n", "setting", "setting_number", "series"),
        spec=chart_spec(facets),
        select={"quantity": [quantity], "field": [field]},
        headline=True,
    )


def _caption(data: xr.Dataset, quantity: str, vary: str) -> str:
    of = data.sel(quantity=quantity)
    members = sorted({int(n) for n in of.n.values.flat if n})
    many = f"{members[0]}" if len(members) == 1 else f"{members[0]} to {members[-1]}"
    leading = ", ".join(sorted({str(name) for name in of.leading_quantity.values.flat if name})).replace("_", " ")
    shape = "its verdict" if leading == quantity else f"the verdict on the {leading}, which is paired"
    lines = (
        "Lines join runs in which all fields change together."
        if vary == "zip"
        else "Lines join runs that differ in nothing else that is swept."
    )
    shared = "" if "seed" in data.field.values else " Runs share their members' seeds: the points are not independent."
    return (
        f"{of.quantity_formula.item()}, {of.quantity_unit.item()}, {of.quantity_scope.item()}; each point is one run, its "
        f"mean over n = {many} members with its {of.attrs['confidence']} interval. Null (grey): {of.quantity_null.item()}. "
        f"The shape is {shape}, corrected within its run only. {lines}{shared}"
    )


def _setting_axis(field: str, numbers: np.ndarray, texts: list[str]) -> alt.X:
    if np.isnan(numbers).any():
        return alt.X("setting:N", title=field, sort=texts, axis=alt.Axis(labelAngle=0))
    is_wide = numbers.min() > 0 and numbers.max() / numbers.min() >= 8
    scale = alt.Scale(type="log", nice=False, padding=12) if is_wide else alt.Scale(zero=False, padding=12)
    return alt.X("setting_number:Q", title=field, scale=scale, axis=alt.Axis(values=sorted(set(numbers.tolist())), grid=False))


def _sentences(findings: Mapping[str, Mapping[tuple[str, str], Finding]], vary: str) -> list[str]:
    judged = {
        run: [one.verdict for one in found.values() if one.verdict and one.analysis != MATRIX_ANALYSIS]
        for run, found in findings.items()
    }
    counted = Counter(verdict for verdicts in judged.values() for verdict in verdicts)
    listed = ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common())
    num_judged = sum(map(bool, judged.values()))
    ways = {
        "each": "Each field is varied by itself, the others as in the run called base.",
        "product": "Every combination of the values is a run.",
        "zip": "All fields change together, so that no effect can be put down to one of them.",
    }
    has_matrix = any(one.analysis == MATRIX_ANALYSIS for found in findings.values() for one in found.values())
    if not counted:
        return [ways[vary]]
    return [
        ways[vary],
        f"{counted.total()} verdicts in {num_judged} of {len(findings)} runs: {listed}. Holm's correction runs here within "
        "each run, not over the runs: among so many verdicts some are expected to be wrong at the level of each run."
        + has_matrix
        * " Of the matrix of architectures the verdicts to quote are those above: they are corrected over all of it.",
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _write(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

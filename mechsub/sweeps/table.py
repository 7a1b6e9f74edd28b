"""One table over all runs of a sweep, and its dose–response figures; made from the runs' findings alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr

from mechsub.figures import DATA, Figure, chart_spec
from mechsub.findings import Finding
from mechsub.results import Result, label_variable, status_variable

DRAWN = {"trait_score": "trait score", "alignment": "alignment cos(Δ, Δ_T)"}
"""The quantities whose dose–response is drawn; the table holds all of them."""
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
        """By (condition, quantity): the first scope that an analysis gives, which is the widest."""
        found: dict[tuple[str, str], Finding] = {}
        for result in self.results.values():
            for finding in result.findings:
                if finding.condition:
                    found.setdefault((finding.condition, finding.quantity), finding)
        return found


def build_table(vary: str, settings: Mapping[str, Mapping[str, Any]], results: Mapping[str, SweptResults]) -> Result:
    """Every finding of every run as [run, condition, quantity], with the settings of each run, and the figures over them."""
    findings = {run: found.findings for run, found in results.items()}
    keys = dict.fromkeys(key for found in findings.values() for key in found)
    conditions, quantities = ([*dict.fromkeys(part)] for part in zip(*keys, strict=True))
    variables = _finding_variables(findings, conditions, quantities) | _setting_variables(vary, settings)
    fields = list(next(iter(settings.values())))
    coords = {"run": list(settings), "condition": conditions, "quantity": quantities, "field": fields}
    data = xr.Dataset(variables, coords)
    drawn = [(field, quantity) for field in fields for quantity in DRAWN if quantity in quantities]
    figures = [_dose_response(data, settings, field, quantity) for field, quantity in drawn]
    return Result(data, [], [figure for figure in figures if figure is not None], _sentences(findings, vary))


def _finding_variables(
    findings: Mapping[str, Mapping[tuple[str, str], Finding]], conditions: Sequence[str], quantities: Sequence[str]
) -> dict[str, xr.Variable]:
    shape = (len(findings), len(conditions), len(quantities))
    values = {name: np.full(shape, np.nan) for name in _NUMBERS}
    status = {name: np.full(shape, NOT_MEASURED, dtype=np.int8) for name in _NUMBERS}
    members = np.zeros(shape, dtype=np.int64)
    verdicts = {name: np.full(shape, "", dtype=object) for name in ("verdict", "leading_verdict")}
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
                    verdicts["verdict"][cell] = finding.verdict
                    verdicts["leading_verdict"][cell] = _leading_verdict(found, finding)
    words = {
        "estimate": "mean over the run's members",
        "low": "lower bound of its interval",
        "high": "upper bound of its interval",
        "null_low": "lower bound of its null",
        "null_high": "upper bound of its null",
    }
    variables = {
        name: label_variable(values[name], _DIMS, description=words[name], unit="that of the quantity") for name in _NUMBERS
    }
    variables |= {f"{name}_status": status_variable(status[name], _DIMS, _STATUS, name) for name in _NUMBERS}
    variables["n"] = label_variable(members, _DIMS, description="members behind the estimate", unit="members")
    variables["verdict"] = label_variable(verdicts["verdict"], _DIMS, description="verdict; Holm within its run", unit="word")
    variables["leading_verdict"] = label_variable(
        verdicts["leading_verdict"], _DIMS, description="the first verdict of the same analysis and condition", unit="word"
    )
    first = {finding.quantity: finding for found in reversed(list(findings.values())) for finding in found.values()}
    for name in ("unit", "formula", "null", "scope"):
        texts = np.array([getattr(first[quantity], name) for quantity in quantities], dtype=object)
        variables[f"quantity_{name}"] = label_variable(texts, ["quantity"], description=f"{name} of the quantity", unit="word")
    return variables


def _explain(value: float, finding: Finding | None, is_analysed: bool) -> int:
    if np.isfinite(value):
        return OK
    if finding is not None:
        return NONE
    return NOT_MEASURED if is_analysed else NOT_ANALYSED


def _leading_verdict(found: Mapping[tuple[str, str], Finding], finding: Finding) -> str:
    judged = (
        other.verdict
        for other in found.values()
        if other.verdict and (other.analysis, other.condition) == (finding.analysis, finding.condition)
    )
    return next(judged, "")


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
    others = [
        [", ".join(f"{other}={_write(run[other])}" for other in fields if other != field) or "all" for field in fields]
        for run in settings.values()
    ]
    if vary == "zip":
        return [["all"] * len(fields) for _ in settings]
    shared = [[row[column] for row in others].count(row[column]) > 1 for row in others for column in range(len(fields))]
    kept = iter(shared)
    return [[text if next(kept) else "" for text in row] for row in others]


def _dose_response(data: xr.Dataset, settings: Mapping[str, Mapping[str, Any]], field: str, quantity: str) -> Figure | None:
    """A quantity against one field, with its null; nothing where no two runs differ in this field alone."""
    numbers = data.setting_number.sel(field=field).values
    in_series = data.series.sel(field=field).values != ""
    if len(set(data.setting.sel(field=field).values[in_series])) < 2:
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
    shape = alt.Shape("leading_verdict:N", title="verdict")
    tooltip = ["run:N", "setting:N", alt.Tooltip("estimate:Q", format=".3f"), "leading_verdict:N", "n:Q"]
    layers = [
        chart.mark_rule(strokeWidth=5, opacity=0.35).encode(x=x, y="null_low:Q", y2="null_high:Q", color=null),
        chart.mark_line(strokeWidth=1, opacity=0.6).encode(x=x, y="null_middle:Q", detail="series:N", color=null),
        chart.mark_line(strokeWidth=1.5).encode(x=x, y=y, detail="series:N", color=student),
        chart.mark_rule(strokeWidth=1.5).encode(x=x, y="low:Q", y2="high:Q", color=student),
        chart.mark_point(filled=True, size=65, opacity=1).encode(x=x, y=y, color=student, shape=shape, tooltip=tooltip),
    ]
    facets = (
        alt.layer(*layers, data=DATA)
        .properties(width=150, height=125)
        .facet(facet=alt.Facet("condition:N", sort=list(map(str, data.condition.values)), title=None), columns=3)
    )
    labels = {
        name: str(data[f"quantity_{name}"].sel(quantity=quantity).values) for name in ("formula", "unit", "scope", "null")
    }
    members = sorted({int(n) for n in data.n.sel(quantity=quantity).values.flat if n})
    many = f"{members[0]}" if len(members) == 1 else f"{members[0]} to {members[-1]}"
    return Figure(
        name=f"{quantity}-by-{field}".replace(".", "-").replace("_", "-"),
        title=f"{DRAWN[quantity].capitalize()} against {field}",
        caption=(
            f"{labels['formula']}, {labels['unit']}, {labels['scope']}; each point is one run, its mean over "
            f"n = {many} members with its interval. Null (grey): {labels['null']}. "
            "The shape is the verdict of the same analysis, corrected within its run only. Lines join runs that differ in "
            "nothing else that is swept."
        ),
        variables=(*_NUMBERS, "leading_verdict", "n", "setting", "setting_number", "series"),
        spec=chart_spec(facets),
        select={"quantity": [quantity], "field": [field]},
        headline=True,
    )


def _setting_axis(field: str, numbers: np.ndarray, texts: list[str]) -> alt.X:
    if np.isnan(numbers).any():
        return alt.X("setting:N", title=field, sort=texts, axis=alt.Axis(labelAngle=0))
    is_wide = numbers.min() > 0 and numbers.max() / numbers.min() >= 8
    scale = alt.Scale(type="log", nice=False, padding=12) if is_wide else alt.Scale(zero=False, padding=12)
    return alt.X("setting_number:Q", title=field, scale=scale, axis=alt.Axis(values=sorted(set(numbers.tolist())), grid=False))


def _sentences(findings: Mapping[str, Mapping[tuple[str, str], Finding]], vary: str) -> list[str]:
    judged = [finding for found in findings.values() for finding in found.values() if finding.verdict]
    table = pd.Series([finding.verdict for finding in judged], dtype=object).value_counts()
    listed = ", ".join(f"{count} {verdict}" for verdict, count in table.items())
    ways = {
        "each": "Each field is varied by itself, the others as in the run called base.",
        "product": "Every combination of the values is a run.",
        "zip": "All fields change together, so that no effect can be put down to one of them.",
    }
    return [
        ways[vary],
        f"{len(judged)} verdicts in {len(findings)} runs: {listed}. Holm's correction runs within each run, not over the runs: "
        "among so many verdicts some are expected to be wrong at the level of each run.",
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _write(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""A panel as a section of the page and of the file: labelled arrays, findings, the forest plot, and sentences."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mechsub.comparison.differences import SOURCE
from mechsub.comparison.forest import draw_forest, say_kind
from mechsub.comparison.panels import Held, Panel, Row
from mechsub.findings import Finding, interval_fields
from mechsub.results import Result, label_variable, status_variable

ANALYSIS = "comparison"
BASELINE, NOTHING = "baseline", "nothing to hold it against"
"""In the place of an outcome."""


@dataclass(frozen=True)
class Section:
    """One part of a comparison; its data is a group of the file by the section's name."""

    name: str
    title: str
    result: Result


def build_sections(panels: Sequence[Panel]) -> list[Section]:
    """A section a panel; a quantity that has several units has the unit in its sections' names."""
    times = Counter(panel.quantity.name for panel in panels)
    return [_build_section(panel, times[panel.quantity.name] > 1) for panel in panels]


def _build_section(panel: Panel, names_unit: bool) -> Section:
    unit = "".join(letter if letter.isalnum() else "_" for letter in panel.unit)
    name = f"{panel.quantity.name}_in_{unit}" if names_unit else panel.quantity.name
    data = _label(panel)
    findings = [_finding(panel, one) for one in panel.held if one is not None]
    result = Result(data, findings, [draw_forest(panel, data, name)], list(_sentences(panel)))
    return Section(name, f"{panel.quantity.title}{f' in {panel.unit}' if names_unit else ''}", result)


def _label(panel: Panel) -> xr.Dataset:
    """All numbers of a panel as [row, member] and [row]."""
    rows, most = panel.rows, max(len(row.value.values) for row in panel.rows)
    labels = panel.labels
    names = {id(row): label for row, label in zip(rows, labels, strict=True)}
    variables: dict[str, Any] = {}
    for name, description in (("value", "the value"), ("over_null", "the value less its own null")):
        measured = [getattr(row, name) for row in rows]
        values = np.full((len(rows), most), np.nan)
        why = [[*one.why, *["no such member"] * (most - len(one.why))] for one in measured]
        for place, one in enumerate(measured):
            values[place, : len(one.values)] = one.values
        variables |= _explained(name, ("row", "member"), values, why, description, panel.unit, panel.formula, panel.source)
    variables |= _label_intervals(panel)
    variables["n"] = _column([row.interval.n for row in rows], "members with a value", "members")
    variables["confidence"] = _column([row.rules.confidence for row in rows], "of the row's interval", "probability")
    variables |= _label_differences(panel, names)
    texts = {
        "place": ("where it was measured, of what may differ between rows", [row.place for row in rows]),
        "own_verdict": ("the run's own verdict", [row.finding.verdict if row.finding else "" for row in rows]),
        "null": ("the row's null", [_null_words(row) for row in rows]),
    }
    variables |= {
        name: _column(np.array(words, dtype=object), description, "word") for name, (description, words) in texts.items()
    }
    coords = {"row": labels, "member": np.arange(most)}
    coords |= {part: ("row", [row.parts[part] for row in rows]) for part in ("run", "condition", "trait")}
    return xr.Dataset(variables, coords)


def _label_intervals(panel: Panel) -> dict[str, xr.Variable]:
    """The mean of each row with its interval and its null."""
    few = [{0: "no member has a value", 1: "one member has no interval"}.get(row.interval.n, "") for row in panel.rows]
    none = [words if row.interval.n == 0 else "" for words, row in zip(few, panel.rows, strict=True)]
    without = ["" if np.isfinite(row.null[0]) else "no null" for row in panel.rows]
    columns: tuple[tuple[str, Callable[[Row], float], Sequence[str], str], ...] = (
        ("estimate", lambda row: row.interval.estimate, none, "mean of the value over members"),
        ("low", lambda row: row.interval.low, few, "lower bound of its interval"),
        ("high", lambda row: row.interval.high, few, "upper bound of its interval"),
        ("null_low", lambda row: row.null[0], without, "lower bound of its null"),
        ("null_high", lambda row: row.null[1], without, "upper bound of its null"),
    )
    variables: dict[str, xr.Variable] = {}
    for name, compute, why, description in columns:
        variables |= _explained(name, ("row",), [compute(row) for row in panel.rows], why, description, panel.unit)
    return variables


def _label_differences(panel: Panel, names: Mapping[int, str]) -> dict[str, xr.Variable]:
    """What each row is held against, and what came out."""
    held = panel.held
    absent = ["" if one is not None else NOTHING for one in held]
    variables: dict[str, xr.Variable] = {}
    for name, part, words in (
        ("difference", "estimate", "difference of the values over their nulls"),
        ("difference_low", "low", "lower bound of its interval"),
        ("difference_high", "high", "upper bound of its interval"),
    ):
        values = [np.nan if one is None else getattr(one.interval, part) for one in held]
        why = [lacks or ("" if np.isfinite(value) else "too few members") for lacks, value in zip(absent, values, strict=True)]
        variables |= _explained(name, ("row",), values, why, words, panel.unit, source=SOURCE)
    for name, words in (("above", "≤ 0"), ("equivalent", "outside of the margin"), ("below", "≥ 0")):
        values = [getattr(one.judgement.p, name) if one is not None and one.judgement else np.nan for one in held]
        why = ["" if np.isfinite(value) else "no verdict" for value in values]
        description = f"one-sided p of 'the difference is {words}', after Holm's correction"
        variables |= _explained(f"p_{name}", ("row",), values, why, description, "probability")
    margins = [np.nan if one is None or one.unjudged else one.against.rules.margin for one in held]
    why = ["" if np.isfinite(margin) else "no verdict" for margin in margins]
    variables |= _explained("margin", ("row",), margins, why, "differences under this do not matter", panel.unit)
    sizes = [(0, 0) if one is None else one.difference.sizes for one in held]
    variables["n_here"] = _column([size[0] for size in sizes], "members of the row in the difference", "members")
    variables["n_against"] = _column([size[1] for size in sizes], "members that they are held against", "members")
    texts = {
        "against": ("the row that it is held against", [names[id(one.against)] if one else "" for one in held]),
        "method": ("paired over members, or Welch", [one.difference.method if one else "" for one in held]),
        "verdict": ("verdict on the difference", [one.judgement.verdict if one and one.judgement else "" for one in held]),
        "reason": ("what it stands on, or why there is none", [_say_reason(one) for one in held]),
        "rule": ("what would have counted", [one.judgement.rule if one and one.judgement else "" for one in held]),
        "outcome": ("the verdict, how and with how many", [_say_outcome(panel, place) for place in range(len(held))]),
        "kind": ("whether it is held against another run or another condition", [say_kind(one) for one in held]),
    }
    return variables | {
        name: _column(np.array(words, dtype=object), description, "word") for name, (description, words) in texts.items()
    }


def _column(values: Any, description: str, unit: str) -> xr.Variable:
    return label_variable(values, ["row"], description=description, unit=unit)


def _explained(
    name: str,
    dims: Sequence[str],
    values: Any,
    why: Sequence[Any],
    description: str,
    unit: str,
    formula: str = "",
    source: str = "",
) -> dict[str, xr.Variable]:
    """A variable with its status; ``why``: the reason of each NaN, empty where there is a value."""
    reasons = np.array(why, dtype=object)
    meanings = ["ok", *dict.fromkeys(str(reason).replace(" ", "_") for reason in reasons.flat if reason)]
    codes = np.array([meanings.index(str(reason).replace(" ", "_") or "ok") for reason in reasons.flat]).reshape(reasons.shape)
    labelled = label_variable(
        np.asarray(values, dtype=float), dims, description=description, unit=unit, formula=formula, source=source
    )
    return {name: labelled, f"{name}_status": status_variable(codes, dims, meanings, name)}


def _null_words(row: Row) -> str:
    return row.finding.null if row.finding else "that of the traits, their mean"


def _say_reason(one: Held | None) -> str:
    if one is None:
        return ""
    return f"no verdict: {one.unjudged}" if one.judgement is None else one.judgement.reason


def _say_outcome(panel: Panel, place: int) -> str:
    one, row = panel.held[place], panel.rows[place]
    if one is None:
        return BASELINE if row.condition == panel.baseline[1] else NOTHING
    if one.difference.n == 0:
        return "no value"
    return f"{one.judgement.verdict if one.judgement else 'no verdict'} ({one.how})"


def _finding(panel: Panel, one: Held) -> Finding:
    row, judgement = one.row, one.judgement
    references = [finding.num_references for finding in (row.finding, one.against.finding) if finding]
    return Finding(
        analysis=ANALYSIS,
        quantity=f"difference_in_{panel.quantity.name}",
        condition=row.condition,
        trait=row.trait,
        context=f"({row.words}) − ({one.against.words}); {one.how}",
        step=row.finding.step if row.finding else 0,
        scope=row.place or (row.finding.scope if row.finding else "all parameters"),
        unit=panel.unit,
        null="0: no difference",
        null_low=0.0,
        null_high=0.0,
        num_references=min(references, default=one.interval.n),
        verdict=judgement.verdict if judgement else "",
        reason=_say_reason(one),
        rule=judgement.rule if judgement else "",
        margin=one.against.rules.margin if judgement else float("nan"),
        formula=f"difference of means of {panel.formula or panel.quantity.variable}, each less its own null",
        source=SOURCE,
        **interval_fields(one.interval),
    )


def _sentences(panel: Panel) -> Iterator[str]:
    first, condition = panel.baseline
    several = len({id(row.run) for row in panel.rows}) > 1
    if several:
        yield (
            f"Every run is held against {first.name}, condition by condition. The conditions of {first.name} itself, and those "
            f"that it does not have, are held against the baseline, {condition}."
        )
    else:
        yield f"Every condition is held against the baseline, {condition}."
    counted = Counter(one.judgement.verdict for one in panel.held if one is not None and one.judgement)
    if counted:
        listed = ", ".join(f"{count} {verdict}" for verdict, count in counted.most_common())
        over = " and, apart, over ".join(map(str, panel.families))
        yield (
            f"{counted.total()} differences are judged: {listed}. Holm's correction runs over {over}; intervals are not "
            "widened by it."
        )
    methods = Counter(one.difference.method for one in panel.held if one is not None and one.difference.n)
    if several and methods:
        listed = ", ".join(f"{count} {method}" for method, count in methods.items())
        yield f"By method: {listed}; paired where the members of both rows are the same replicates."
    unjudged = sum(one is not None and one.judgement is None and one.difference.n > 0 for one in panel.held)
    if unjudged:
        yield f"{unjudged} differences are drawn without a verdict; the table says why."

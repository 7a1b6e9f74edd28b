"""The matrix of architectures: every teacher against every student, by what they share at the start; a verdict in every cell.

A null is only as good as its power, and one of many cells is expected to mislead: all cells are judged together.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsub.figures import DATA, Figure, chart_spec
from mechsub.findings import Finding, interval_fields
from mechsub.results import Result, label_variable, status_variable
from mechsub.statistics.diagonal import (
    EXCESS_FORMULA,
    MINIMUM_TRAITS,
    LabelPermutation,
    diagonal_excess,
    permute_taught,
    permute_traits,
)
from mechsub.statistics.intervals import Interval
from mechsub.statistics.verdicts import (
    TRANSFER,
    WITHOUT_CONTROL,
    WITHOUT_TRAIT,
    Judgement,
    Rules,
    judge_effects,
    void_without_control,
    void_without_trait,
)

MATRIX_ANALYSIS = "cross_architecture"
"""The analysis that measures the cells of one run."""
EFFECT, EXCESS = "effect_over_traits", "diagonal_excess"
FORMULAS = {
    EFFECT: "score(student) − score(control) of the teacher's trait, mean over traits, member by member, at the last step",
    EXCESS: EXCESS_FORMULA,
}
SOURCE = "null: Cloud et al., arXiv:2507.14805; shared parts and MLP → CNN: Brockers, arXiv:2605.23645"
_COLORS = {
    TRANSFER.above: "#fdba74",
    TRANSFER.equivalent: "#93c5fd",
    TRANSFER.below: "#d8b4fe",
    TRANSFER.undecided: "#e5e7eb",
    TRANSFER.too_few: "#f3f4f6",
    WITHOUT_TRAIT: "#d6d3d1",
    WITHOUT_CONTROL: "#d6d3d1",
}
NO_POSITIVE_CONTROL = "has no positive control"
"""In the sentences on teachers whose nulls say little."""
_STATUS = ("ok", "one_member_has_no_interval", "no_member_has_a_value")
_MEMBER_STATUS = ("ok", "no_control_or_not_measured")


@dataclass(frozen=True)
class Cell:
    """One condition of one run, as a cell of the matrix."""

    condition: str
    teacher: str
    """Architecture of the teacher."""
    student: str
    """Architecture of the student."""
    shared: str
    """What the student's start shares with its teacher's."""
    effects: Float[np.ndarray, "member taught scored"]
    """Student − control on every trait, of the student of every trait's teacher; NaN where that is not known."""
    has_control: bool = True
    run: str = ""
    """Of several runs: which one."""

    @property
    def own_effects(self) -> Float[np.ndarray, " member"]:
        """On the teacher's own trait, mean over traits."""
        own: np.ndarray = self.trait_effects.mean(0)
        return own

    @property
    def trait_effects(self) -> Float[np.ndarray, "trait member"]:
        """On the teacher's own trait, by trait."""
        own: np.ndarray = np.einsum("mtt->tm", self.effects)
        return own

    @property
    def name(self) -> str:
        """What sets it apart from all other cells."""
        return f"{self.run}: {self.condition}" if self.run else self.condition


@dataclass(frozen=True)
class JudgedCell:
    """What is said of one cell."""

    effect: Judgement
    excess: Judgement | None
    """Of several traits: whether students lean to their own trait; None where there is one."""
    within: LabelPermutation | None
    """The same by permuting labels within members: a claim about these traits."""
    over_traits: LabelPermutation | None
    """By permuting labels in all members alike: a claim about traits in general."""


def judge_cells(
    cells: Sequence[Cell], gains: Mapping[str, Float[np.ndarray, "_trait _member"]], rules: Rules
) -> dict[str, JudgedCell]:
    """Judge all cells together, by name, with Holm's correction over them.

    A cell of several traits is ``no-transfer`` only where the effect on each of them is: one trait that passes does not hide
    behind others that do not. ``gains``: by run, every teacher's own gain over its reference: where one of them is not shown to
    be over the margin its run's cells have no verdict; nor has a cell without a control. A ``no-transfer`` of a teacher none
    of whose cells is ``transferred`` has no positive control, and says so in its reason.
    """
    of_teachers = judge_effects(
        {(run, place): gain for run, by in gains.items() for place, gain in enumerate(by)}, rules, TRANSFER
    )
    teachers = {
        run: min((of_teachers[run, place] for place in range(len(by))), key=lambda judged: judged.interval.estimate)
        for run, by in gains.items()
    }
    effects = judge_effects(
        {cell.name: cell.own_effects for cell in cells},
        rules,
        TRANSFER,
        parts={cell.name: cell.trait_effects for cell in cells if cell.effects.shape[-1] > 1},
    )
    several = [cell for cell in cells if cell.has_control and cell.effects.shape[-1] > 1]
    excesses = judge_effects({cell.name: diagonal_excess(cell.effects) for cell in several}, rules, TRANSFER)
    judged = {}
    for cell in cells:
        if not cell.has_control:
            judged[cell.name] = JudgedCell(void_without_control(effects[cell.name]), None, None, None)
            continue
        teacher, excess = teachers[cell.run], excesses.get(cell.name)
        judged[cell.name] = JudgedCell(
            void_without_trait(teacher, effects[cell.name]),
            None if excess is None else void_without_trait(teacher, excess),
            None if excess is None else permute_taught(cell.effects, rules.confidence),
            None if excess is None else permute_traits(cell.effects, rules.confidence),
        )
    return _with_doubts(cells, judged)


def _with_doubts(cells: Sequence[Cell], judged: Mapping[str, JudgedCell]) -> dict[str, JudgedCell]:
    """The same, where every null of a teacher whose trait is not shown to pass anywhere says so: it has no positive control."""
    told = dict(judged)
    for quantity in ("effect", "excess"):
        for cell in _without_positive_control(cells, judged, quantity):
            doubted: dict[str, Any] = {quantity: _doubt(getattr(judged[cell.name], quantity))}
            told[cell.name] = replace(told[cell.name], **doubted)
    return told


def _without_positive_control(
    cells: Sequence[Cell], judged: Mapping[str, JudgedCell], quantity: Literal["effect", "excess"]
) -> list[Cell]:
    """The nulls of teachers none of whose cells is shown to pass."""
    verdicts = {cell.name: found.verdict for cell in cells if (found := getattr(judged[cell.name], quantity)) is not None}
    passing = {(cell.run, cell.teacher) for cell in cells if verdicts.get(cell.name) == TRANSFER.above}
    nulls = [cell for cell in cells if verdicts.get(cell.name) == TRANSFER.equivalent]
    return [cell for cell in nulls if (cell.run, cell.teacher) not in passing]


def _doubt(judgement: Judgement) -> Judgement:
    return replace(
        judgement, reason=f"{judgement.reason}; no positive control: this teacher's trait is not shown to pass anywhere"
    )


def label_cells(cells: Sequence[Cell], judged: Mapping[str, JudgedCell], unit: str) -> xr.Dataset:
    """Every cell's effects by member, their interval and verdict, and the diagonal excess, as [cell] and [cell, member]."""
    most = max(len(cell.own_effects) for cell in cells)
    members = np.full((len(cells), most), np.nan)
    for row, cell in enumerate(cells):
        members[row, : len(cell.own_effects)] = cell.own_effects
    variables: dict[str, Any] = {
        "cell_effect": label_variable(
            members,
            ["cell", "member"],
            description="effect, mean over traits",
            unit=unit,
            formula=FORMULAS[EFFECT],
            source=SOURCE,
        ),
        "cell_effect_status": status_variable(np.isnan(members), ["cell", "member"], _MEMBER_STATUS, "cell_effect"),
    }
    for quantity, judgements in (
        (EFFECT, [judged[cell.name].effect for cell in cells]),
        (EXCESS, [judged[cell.name].excess for cell in cells]),
    ):
        if all(judgement is None for judgement in judgements):
            continue
        variables |= _label_judgements(quantity, judgements, unit)
    names = {"cell": [cell.name for cell in cells]}
    described = {
        f"{field}_of_cell": ("cell", np.array([getattr(cell, field) for cell in cells], dtype=object))
        for field in ("run", "condition", "teacher", "student", "shared")
    }
    return xr.Dataset(variables, {**names, **described, "member": np.arange(most)})


def _label_judgements(quantity: str, judgements: Sequence[Judgement | None], unit: str) -> dict[str, Any]:
    nothing = Interval(np.nan, np.nan, np.nan, 0, 0.95)
    intervals = [nothing if judgement is None else judgement.interval for judgement in judgements]
    few = [{0: 2, 1: 1}.get(interval.n, 0) for interval in intervals]
    none = [2 if interval.n == 0 else 0 for interval in intervals]
    labelled: dict[str, Any] = {}
    for part, codes in (("estimate", none), ("low", few), ("high", few)):
        name = f"{quantity}_{part}"
        values = [getattr(interval, part) for interval in intervals]
        labelled[name] = label_variable(
            values, ["cell"], description=name.replace("_", " "), unit=unit, formula=FORMULAS[quantity]
        )
        labelled[f"{name}_status"] = status_variable(codes, ["cell"], _STATUS, name)
    words = ["" if judgement is None else judgement.verdict for judgement in judgements]
    labelled[f"{quantity}_verdict"] = ("cell", np.array(words, dtype=object))
    labelled[f"{quantity}_n"] = ("cell", [interval.n for interval in intervals])
    return labelled


def draw_matrix(cells: Sequence[Cell], judged: Mapping[str, JudgedCell], unit: str, members: str, margin: float) -> Figure:
    """Teachers side by side; in each, students across and what they share at the start down."""
    teachers, students, shared = (list(dict.fromkeys(getattr(cell, field) for cell in cells)) for field in _AXES)
    verdicts = [verdict for verdict in _COLORS if verdict in {one.effect.verdict for one in judged.values()}]
    x = alt.X("student_of_cell:N", sort=students, title="student", axis=alt.Axis(labelAngle=0, orient="top", labelLimit=0))
    y = alt.Y("shared_of_cell:N", sort=shared, title="shared at the start", axis=alt.Axis(labelLimit=260))
    color = alt.Color(
        f"{EFFECT}_verdict:N",
        scale=alt.Scale(domain=verdicts, range=[_COLORS[verdict] for verdict in verdicts]),
        title="verdict",
        legend=alt.Legend(orient="top", labelLimit=0),
    )
    base = alt.Chart(DATA).encode(x=x, y=y)
    tiles = base.mark_rect(stroke="white", strokeWidth=2).encode(
        color=color,
        tooltip=[
            "cell:N",
            f"{EFFECT}_verdict:N",
            *(f"{EFFECT}_{part}:Q" for part in ("estimate", "low", "high")),
            f"{EFFECT}_n:Q",
        ],
    )
    number = f"isValid(datum.{EFFECT}_estimate) ? replace(format(datum.{EFFECT}_estimate, '+.2f'), '-', '−') : '–'"
    bounds = (
        f"isValid(datum.{EFFECT}_low) ? '[' + {_write_bound(f'{EFFECT}_low')} + ', ' + "
        f"{_write_bound(f'{EFFECT}_high')} + ']' : ''"
    )
    texts = base.transform_calculate(number=number, bounds=bounds, verdict=f"datum.{EFFECT}_verdict")
    weights: list[tuple[str, int, int, Literal["bold", "normal"]]] = [
        ("number", -13, 13, "bold"),
        ("bounds", 2, 10, "normal"),
        ("verdict", 15, 10, "normal"),
    ]
    lines = [
        texts.mark_text(dy=dy, fontSize=size, fontWeight=weight, color="#111827").encode(text=f"{field}:N")
        for field, dy, size, weight in weights
    ]
    chart = (
        alt.layer(tiles, *lines, data=DATA)
        .properties(width=alt.Step(112), height=alt.Step(50))
        .facet(column=alt.Column("teacher_of_cell:N", sort=teachers, title="teacher", header=alt.Header(labelFontSize=13)))
    )
    fields = tuple(f"{EFFECT}_{part}" for part in ("estimate", "low", "high", "verdict", "n"))
    return Figure(
        name="matrix",
        title="Which architecture passes its trait to which, and from which start?",
        caption=(
            f"Effect ({unit}): {FORMULAS[EFFECT]}. Mean over members ({members}) with its interval. The null is no effect, 0: "
            f"the student scores as its own control, trained alike by a neutral teacher. Verdicts, with margin {margin:g}, are "
            f"corrected (Holm) over the {len(cells)} cells. Where there is no tile there is no result."
        ),
        variables=fields,
        spec=chart_spec(chart),
        headline=True,
    )


def _write_bound(field: str) -> str:
    """In Vega's language: with its sign even where it rounds to 0."""
    return f"(datum.{field} < 0 ? '−' : '') + format(abs(datum.{field}), '.2f')"


_AXES = ("teacher", "student", "shared")
_OF_CELL = ("trait", "context", "step", "scope", "unit", "num_references", "margin")


def matrix_findings(
    cells: Sequence[Cell], judged: Mapping[str, JudgedCell], describe: Callable[[Cell], Mapping[str, Any]]
) -> list[Finding]:
    """The effect of every cell over its traits, and where there are several traits the diagonal excess, with their verdicts.

    ``describe``: the other fields of a cell's `Finding`.
    """
    findings = []
    for cell in cells:
        found = judged[cell.name]
        fields = {**describe(cell), "analysis": MATRIX_ANALYSIS, "condition": cell.name, "source": SOURCE}
        findings.append(
            Finding(**fields, quantity=EFFECT, null="no effect: the student scores as its own control does", null_low=0.0,
                    null_high=0.0, formula=FORMULAS[EFFECT], **_judged(found.effect))
        )  # fmt: skip
        if found.excess is None or found.within is None or found.over_traits is None:
            continue
        over = found.over_traits
        wide = f"p = {over.p_above:.2g}" if np.isfinite(over.p_above) else over.reason
        reason = f"{found.excess.reason}; within members p = {found.within.p_above:.2g}, over traits in general {wide}"
        findings.append(
            Finding(**fields, quantity=EXCESS, null="students who could swap teachers: taught labels permuted within members",
                    null_low=found.within.null_low, null_high=found.within.null_high, formula=FORMULAS[EXCESS],
                    **{**_judged(found.excess), "reason": reason})
        )  # fmt: skip
    return findings


def _judged(judgement: Judgement) -> dict[str, Any]:
    fields = {"verdict": judgement.verdict, "reason": judgement.reason, "rule": judgement.rule}
    return {**fields, **interval_fields(judgement.interval)}


def say_matrix(cells: Sequence[Cell], judged: Mapping[str, JudgedCell]) -> list[str]:
    """Which cells have which verdict, and what decides those that are open."""
    sentences = []
    for verdict in _COLORS:
        named = [_say_cell(cell) for cell in cells if judged[cell.name].effect.verdict == verdict]
        if named:
            sentences.append(f"{verdict} ({len(named)} of {len(cells)} cells): {'; '.join(named)}.")
    for teacher in dict.fromkeys(cell.teacher for cell in _without_positive_control(cells, judged, "effect")):
        sentences.append(
            f"{teacher} {NO_POSITIVE_CONTROL}: its trait is not shown to pass to any student here. That its "
            "cells are no-transfer says little of what students must share with it."
        )
    over = [one.over_traits for one in judged.values() if one.over_traits is not None]
    if over and not np.isfinite(over[0].p_above):
        sentences.append(f"Nothing is claimed of traits in general: that takes {MINIMUM_TRAITS} traits or more.")
    return sentences


def _say_cell(cell: Cell) -> str:
    return f"{cell.teacher} → {cell.student}, shared {cell.shared}"


def join_matrices(results: Mapping[str, Result], rules: Mapping[str, Rules]) -> Result | None:
    """One matrix of several runs' `cross_architecture` results, judged anew over all their cells.

    ``results`` and ``rules`` by run. Runs that differ from the first one in traits, in what these are scored on, or in the
    rules of verdicts are left out, and a sentence says so. None where no run has a matrix.
    """
    if not results:
        return None
    first = next(iter(results))
    asked = {name: _what_is_asked(result, rules[name]) for name, result in results.items()}
    unit = str(results[first].data.effect_on.attrs["units"])
    kept = [name for name in results if asked[name] == asked[first]]
    left = [name for name in results if asked[name] != asked[first]]
    cells = [cell for name in kept for cell in read_cells(results[name].data, name)]
    runs_of_teachers = Counter(teacher for teacher, _ in {(cell.teacher, cell.run) for cell in cells})
    if max(runs_of_teachers.values()) > 1:  # all of them, so that no teacher stands there under two names
        cells = [replace(cell, teacher=f"{cell.teacher} of {cell.run}") for cell in cells]
    gains = {name: results[name].data.teacher_gain.transpose("taught", "member").values for name in kept}
    judged = judge_cells(cells, gains, rules[first])
    counts = sorted({judged[cell.name].effect.interval.n for cell in cells})
    members = f"n = {counts[0]}" if len(counts) == 1 else f"n = {counts[0]} to {counts[-1]}"

    def describe(cell: Cell) -> dict[str, Any]:
        own = next(one for one in results[cell.run].findings if (one.quantity, one.condition) == (EFFECT, cell.condition))
        return {name: getattr(own, name) for name in _OF_CELL}

    sentences = say_matrix(cells, judged)
    sentences += [
        f"Not in this matrix: {name}, of other {'; '.join(_say_differences(asked[name], asked[first]))}." for name in left
    ]
    return Result(
        label_cells(cells, judged, unit),
        matrix_findings(cells, judged, describe),
        [draw_matrix(cells, judged, unit, members, rules[first].margin)],
        sentences,
    )


def _what_is_asked(result: Result, rules: Rules) -> dict[str, str]:
    """What two runs must have in common to stand in one matrix, in words."""
    return {
        "unit": str(result.data.effect_on.attrs["units"]),
        "traits": ", ".join(map(str, result.data.taught.values)),
        "scored context": result.findings[0].context,
        "rules": f"margin {rules.margin:g}, {rules.minimum_members} members at least, confidence {rules.confidence:g}, "
        f"equivalence level {rules.equivalence_level:g}",
    }


def _say_differences(own: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    return [f"{name}: {own[name]}, not {other[name]}" for name in own if own[name] != other[name]]


def read_cells(data: xr.Dataset, run: str = "") -> list[Cell]:
    """The cells of a `cross_architecture` result; conditions that would share a cell have their names in it."""
    cells = [
        Cell(
            condition=str(name),
            teacher=str(data.teacher_architecture.values),
            student=str(data.student_architecture.sel(condition=name).values),
            shared=str(data.shared_start.sel(condition=name).values),
            effects=data.effect_on.sel(condition=name).transpose("member", "taught", "trait").values,
            has_control=bool(data.has_control.sel(condition=name).values),
            run=run,
        )
        for name in data.condition.values
    ]
    places = Counter(map(_place, cells))
    return [replace(cell, shared=f"{cell.shared} ({cell.condition})") if places[_place(cell)] > 1 else cell for cell in cells]


def _place(cell: Cell) -> tuple[str, str, str]:
    """Where a cell stands in the matrix."""
    return cell.teacher, cell.student, cell.shared

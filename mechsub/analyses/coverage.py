"""Coverage: does the student's very first update already point along its teacher's displacement?"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from mechsub.analyses.registry import analysis
from mechsub.cases import (
    CaseName,
    build_case,
    count_members,
    label_random_cosines,
    list_cases,
    list_directions,
    scope_coordinates,
)
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, fold_variables, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.parameters.alignment import MODEL, SHARED_SUPPORT, STATUS, DirectionAlgebra, Missing, Scopes
from mechsub.parameters.blocks import list_blocks
from mechsub.parameters.gram import describe_not_finite, stream_gram
from mechsub.parameters.quantities import QUANTITIES, Quantity
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.permutation import flip_signs
from mechsub.statistics.verdicts import AGAINST_NULL, SIGN_FLIP, Judgement, judge_effects

SOURCE = "coverage: Madl, arXiv:2606.22019"
FIRST = 1
"""The step of the first update; it is always kept."""
_DIMS = ("condition", "taught", "member", "scope")
_CLEAR_OF_ROUNDING = 10
"""How many times the rounding floor an update should be long."""
_ALIGNMENT = {quantity.name: quantity for quantity in QUANTITIES}


def _of_first_update(measure: str, name: str, formula: str, null: str | None = None) -> Quantity:
    """A measure of alignment, of displacements at step 1."""
    return replace(_ALIGNMENT[measure], name=name, formula=formula, null=null)


_AT_FIRST = (
    _of_first_update("alignment", "coverage", "cos(θ_S(1) − θ_S(0), Δ_T)", "coverage_of_control"),
    _of_first_update("alignment_of_control", "coverage_of_control", "cos(θ_C(1) − θ_C(0), Δ_T)"),
    _of_first_update("specific_alignment", "specific_coverage", "cos(θ_S(1) − θ_C(1), Δ_T − Δ_N)"),
    _of_first_update("sham_alignment", "sham_coverage", "cos(θ_C′(1) − θ_C(1), Δ_T − Δ_N), C′ a control with its own draws"),
    _of_first_update("student_norm", "first_update_norm", "‖θ_S(1) − θ_S(0)‖"),
    _of_first_update("control_norm", "first_update_norm_of_control", "‖θ_C(1) − θ_C(0)‖"),
    _of_first_update(
        "student_rounding_floor",
        "first_update_rounding_floor",
        "√Σ ulp² / 12: the norm if rounding in storage were all there is",
    ),
)
_AT_LAST = (_of_first_update("student_norm", "displacement_norm", "‖Δ_S‖ at the student's last step"),)
_MEASURED = _AT_FIRST + _AT_LAST
_CLAIMED = tuple(quantity for quantity in _AT_FIRST if quantity.null_words)


@analysis
def coverage(run: Run) -> Result:
    """How far the student's first update covers its teacher's displacement, against another teacher's student."""
    blocks = list_blocks(run.reference.spec.tensors)
    directions = [
        direction
        for direction in list_directions(run)
        if all(step in {0, FIRST, lineage.last} for lineage, step, _ in direction.terms)
    ]
    gram = stream_gram(directions, blocks, (), device=run.device)
    algebra = DirectionAlgebra(gram, Scopes.of(blocks))
    data = _measure(run, algebra)
    judgements = _judge(run, data)
    findings = [
        _finding(run, data, quantity, case, scope, judgements.get((quantity.name, case)) if scope == MODEL else None)
        for quantity, case in product(_CLAIMED, list_cases(run))
        if _is_measured(data, quantity.name, case)
        for scope in ((MODEL, SHARED_SUPPORT) if quantity.name == "coverage" else (MODEL,))
    ]
    sentences = [*_sentences(run, data), *_rounding_sentences(run, data), *describe_not_finite(gram.not_finite)]
    return Result(data, findings, [_condition_figure(run, data), _scope_figure(run, data)], sentences)


def _measure(run: Run, algebra: DirectionAlgebra) -> xr.Dataset:
    """Every quantity as [condition, taught, member, scope], with why a value is NaN."""
    scopes = algebra.scopes
    shape = (len(run.conditions), len(run.traits), run.recipe.members, len(scopes.names))
    values = {quantity.name: np.full(shape, np.nan) for quantity in _MEASURED}
    status = {quantity.name: np.full(shape, Missing.NOT_RUN, dtype=np.int8) for quantity in _MEASURED}
    for (row, condition), (place, trait) in product(enumerate(run.conditions), enumerate(run.traits)):
        student = run.student(condition, trait)
        measured = ((_AT_FIRST, FIRST, _has_first_update(run, condition, trait)), (_AT_LAST, student.last, student.last > 0))
        for quantities, step, is_there in measured:
            if not run.is_comparable(condition):
                for quantity in quantities:
                    status[quantity.name][row, place] = Missing.INCOMPARABLE
            elif is_there:
                case = build_case(run, algebra, condition, trait, step)
                for quantity in quantities:
                    found = quantity.measure(case)
                    if found is not None:
                        values[quantity.name][row, place] = found
                        status[quantity.name][row, place] = quantity.explain(case, found)
        run.report_progress(run.num_checkpoints * (row + 1) // len(run.conditions))
    return _label(run, values, status, scopes)


def _has_first_update(run: Run, condition: str, trait: str) -> bool:
    """Whether a student's step 1 is kept and is one: of adopted checkpoints without a number nobody knows their steps."""
    student = run.student(condition, trait)
    return FIRST in student.steps and bool(student.spec.model.get("steps_are_known", True))


def _label(run: Run, values: Mapping[str, np.ndarray], status: Mapping[str, np.ndarray], scopes: Scopes) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for quantity in _MEASURED:
        variables[quantity.name] = label_variable(
            values[quantity.name],
            _DIMS,
            description=quantity.name.replace("_", " "),
            unit=quantity.unit,
            formula=quantity.formula,
            source=SOURCE,
        )
        variables[f"{quantity.name}_status"] = status_variable(status[quantity.name], _DIMS, STATUS, quantity.name)
    variables |= label_random_cosines(scopes)
    coords = scope_coordinates(run, scopes)
    return xr.Dataset(variables, coords)


def _values(data: xr.Dataset, name: str, case: CaseName, scope: str = MODEL) -> np.ndarray:
    """A variable of one case, member by member."""
    found: np.ndarray = data[name].sel(condition=case[0], taught=case[1], scope=scope).values
    return found


def _is_measured(data: xr.Dataset, name: str, case: CaseName) -> bool:
    """Whether there is anything that could have moved: not where it was not run, or students have other tensors."""
    status = _values(data, f"{name}_status", case)
    return not bool(np.isin(status, (Missing.NOT_RUN, Missing.INCOMPARABLE)).all())


def _judge(run: Run, data: xr.Dataset) -> dict[tuple[str, CaseName], Judgement]:
    """Verdicts over the whole model, by (quantity, case); Holm runs over the conditions and traits."""
    rules = run.rules(run.recipe.verdict.gradient_margin)
    judgements: dict[tuple[str, CaseName], Judgement] = {}
    for quantity in (quantity for quantity in _CLAIMED if quantity.judged):
        effects = {}
        for case in list_cases(run):
            if _is_measured(data, quantity.name, case) and (quantity.null is None or run.control(case[0]) is not None):
                against = 0.0 if quantity.null is None else _values(data, quantity.null, case)
                effects[case] = _values(data, quantity.name, case) - against
        judged = judge_effects(effects, rules, AGAINST_NULL, SIGN_FLIP if quantity.judged == "swap" else None)
        judgements |= {(quantity.name, case): judgement for case, judgement in judged.items()}
    return judgements


def _finding(
    run: Run, data: xr.Dataset, quantity: Quantity, case: CaseName, scope: str, judgement: Judgement | None
) -> Finding:
    verdict = run.recipe.verdict
    values = _values(data, quantity.name, case, scope)
    null_words = quantity.null_words
    reason = "the verdict is given over all parameters" if quantity.judged else quantity.why_unjudged
    if quantity.null is None:
        swapped = flip_signs(values, verdict.confidence)
        null_low, null_high = swapped.null_low, swapped.null_high
    else:
        against = student_interval(_values(data, quantity.null, case, scope), verdict.confidence)
        null_low, null_high = against.low, against.high
        if run.control(case[0]) is None:
            null_words, reason = "none: no control was given", "without its null a cosine says nothing; give --control"
    return Finding(
        analysis="coverage",
        quantity=quantity.name,
        condition=case[0],
        trait=case[1],
        context="parameters",
        step=FIRST,
        scope="all parameters" if scope == MODEL else "tensors that both moved",
        unit=quantity.unit,
        null=null_words,
        null_low=null_low,
        null_high=null_high,
        num_references=run.recipe.num_references(case[0]),
        **judgement_fields(judgement, verdict.gradient_margin, reason),
        formula=quantity.formula,
        source=SOURCE,
        **interval_fields(student_interval(values, verdict.confidence)),
    )


_STUDENT_AND_NULL = {"coverage": "student", "coverage_of_control": "control (null)"}


def _dots(x: str, y: alt.Y) -> alt.Chart:
    """One dot per member, students beside controls."""
    dots: alt.Chart = (
        fold_variables("cosine", _STUDENT_AND_NULL)
        .mark_circle(size=36, opacity=0.55)
        .encode(
            x=alt.X("cosine:Q", title=x),
            y=y,
            color=color_by_who(_STUDENT_AND_NULL),
            tooltip=["condition:N", "scope:N", "taught:N", "who:N", "member:O", alt.Tooltip("cosine:Q", format=".3f")],
        )
    )
    return dots


def _condition_figure(run: Run, data: xr.Dataset) -> Figure:
    dots = _dots("cos(first update, Δ_T)", alt.Y("condition:N", sort=run.conditions, title=None)).encode(
        yOffset=alt.YOffset("who:N", sort=list(_STUDENT_AND_NULL.values()))
    )
    spread = {"upper": "2 * datum.random_cosine_sd", "lower": "-2 * datum.random_cosine_sd"}
    rule = alt.Chart(DATA).transform_calculate(**spread).mark_rule(color="#2563eb", strokeDash=[1, 2])
    random = [rule.encode(x=f"mean({side}):Q") for side in ("upper", "lower")]
    chart = alt.layer(zero_line().encode(x=alt.datum(0)), *random, dots, data=DATA).properties(width=640, height=alt.Step(16))
    return Figure(
        name="coverage_by_condition",
        title="Coverage: the first update against the teacher's whole displacement",
        caption=(
            f"cos(θ_S(1) − θ_S(0), Δ_T) over all parameters, no unit; each dot is one of {count_members(run)}. The null is its "
            f"control, the first update of a student of {run.neutral_name} from the same start. Updates are the optimizer's "
            "own, not gradients. Between the blue lines lie 95 % of random directions (±2/√d): a line to read by, not the null."
        ),
        variables=(*_STUDENT_AND_NULL, "random_cosine_sd"),
        spec=chart_spec(chart),
        select={"scope": [MODEL], "condition": _drawn(run, data)},
        headline=True,
    )


def _scope_figure(run: Run, data: xr.Dataset) -> Figure:
    scopes = [str(name) for name, kind in zip(data.scope.values, data.scope_kind.values, strict=True) if kind != "tensor"]
    dots = _dots("cos(first update, Δ_T)", alt.Y("scope:N", sort=scopes, title=None))
    facets = (
        alt.layer(zero_line().encode(x=alt.datum(0)), dots, data=DATA)
        .properties(width=195, height=alt.Step(15))
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=3)
    )
    return Figure(
        name="coverage_by_scope",
        title="Where the first update covers the teacher's displacement",
        caption=(
            "cos(θ_S(1) − θ_S(0), Δ_T), no unit, of every layer and module kind and the model (tensors are in the results); "
            f"each dot is one of {count_members(run)}; the null is its control. A scope without dots has no shared support: "
            "the first update and the teacher moved no tensor of it together."
        ),
        variables=tuple(_STUDENT_AND_NULL),
        spec=chart_spec(facets),
        select={"scope": scopes, "condition": _drawn(run, data)},
    )


def _drawn(run: Run, data: xr.Dataset) -> list[str]:
    """The conditions with a value of any trait."""
    return [name for name in run.conditions if any(_is_measured(data, "coverage", (name, trait)) for trait in run.traits)]


def _sentences(run: Run, data: xr.Dataset) -> list[str]:
    """What was found of each condition, or why nothing was."""
    sentences = []
    for condition in run.conditions:
        student = run.student(condition, run.traits[0])
        if not run.is_comparable(condition):
            sentences.append(f"{condition}: incomparable, {run.why_incomparable(condition)}; no coverage exists.")
        elif not _has_first_update(run, condition, run.traits[0]):
            why = "nothing is trained" if student.last == 0 else "no checkpoint is known to be that of step 1"
            sentences.append(f"{condition}: {why}, so there is no first update.")
        else:
            sentences.append(_summarise(run, data, condition))
    adapters = [name for name in run.conditions if run.student(name, run.traits[0]).spec.is_adapter]
    if adapters:
        sentences.append(
            f"Students of {', '.join(adapters)} are adapters. Where B = 0 at step 0 (LoRA as it is published) A has no "
            "gradient there: the first update moves B only, and the coverage sees no more of the teacher than lies in the rows "
            "of the A that was drawn."
        )
    return sentences


def _summarise(run: Run, data: xr.Dataset, condition: str) -> str:
    found = {name: _mean(run, data, name, condition) for name in ("coverage", "coverage_of_control", "specific_coverage")}
    cells = [(condition, trait) for trait in run.traits]
    if found["coverage"].n == 0:
        codes = {int(code) for cell in cells for code in _values(data, "coverage_status", cell)} - {int(Missing.OK)}
        return f"{condition}: no coverage ({', '.join(STATUS[code].replace('_', ' ') for code in sorted(codes))})."
    if run.control(condition) is None:
        return (
            f"{condition}: coverage {found['coverage']}; there is no control, so nothing says what any such update would have."
        )
    sham = ""
    if run.sham(condition) is not None:
        sham = f", its sham {_mean(run, data, 'sham_coverage', condition)}"
    return (
        f"{condition}: coverage {found['coverage']} beside its control's {found['coverage_of_control']}; specific "
        f"{found['specific_coverage']}{sham}."
    )


def _mean(run: Run, data: xr.Dataset, name: str, condition: str) -> Interval:
    """Over members, of each member's mean over traits."""
    values = np.mean([_values(data, name, (condition, trait)) for trait in run.traits], axis=0)
    return student_interval(values, run.recipe.verdict.confidence)


def _rounding_sentences(run: Run, data: xr.Dataset) -> Sequence[str]:
    """First updates that are not far over what rounding in storage alone could give; see `Gram.rounding`."""
    sentences = []
    for case in list_cases(run):
        norms, floors = (_values(data, f"first_update_{what}", case) for what in ("norm", "rounding_floor"))
        close = np.isfinite(norms) & (norms > 0) & (norms < _CLEAR_OF_ROUNDING * floors)
        if close.any():
            ratio = float((norms[close] / floors[close]).min())
            sentences.append(
                f"Warning: the first update of {run.student(*case).name} is only {ratio:.1f} times "
                f"what rounding of its stored weights could give (under {_CLEAR_OF_ROUNDING} times in {close.sum()} of "
                f"{len(close)} members): its coverage is pulled to 0 by that noise; store checkpoints in float32."
            )
    return sentences

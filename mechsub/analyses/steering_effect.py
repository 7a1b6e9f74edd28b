"""Steering effect: do steering directions give the trait to a model that lacks it, and does taking them out take it away?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsub.analyses.registry import analysis
from mechsub.cases import count_members
from mechsub.figures import DATA, Figure, chart_spec, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.pooling import distinct_members, label_means, pool_traits, pooled_name, say_statuses
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, fieller_interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects
from mechsub.steered.editor import measure_edits
from mechsub.steered.edits import (
    ADD,
    ALL_LAYERS,
    DOSES,
    JUDGED_DOSE,
    OK,
    OTHER_STUDENTS,
    OTHER_TEACHERS,
    OTHERS_TAKEN_OUT,
    OUT,
    OWN_LENGTH,
    OWN_STUDENT,
    OWN_TEACHER,
    RANDOM,
    REPLACE,
    STATUS,
    VECTORS,
    ByMember,
    Measured,
)

SOURCE = "adding and removing steering directions: Blank, arXiv:2606.00995; Turner et al., arXiv:2308.10248"


@analysis(needs=["traits", "hook_points"], reads_activations=True)
def steering_effect(run: Run) -> Result:
    """Whether steering directions are enough for the trait in the reference, and needed for it in the student."""
    measured = measure_edits(run)
    data = _label(run, measured)
    judgements = _judge(run, measured)
    figures = [_necessity_figure(run, measured), *_dose_figures(run, measured)]
    return Result(data, list(_findings(run, measured, judgements)), figures, list(_sentences(run, measured, judgements)))


def _label(run: Run, measured: Measured) -> xr.Dataset:
    unit = _unit(run)
    dims = ("condition", "taught", "member", "edit")
    described = {
        "effect": (
            measured.effects,
            "change of the student's own trait's score by one edit",
            unit,
            "score(edited) − score(unedited)",
        ),
        "control_effect": (
            measured.control_effects,
            "change of the control's score by the same edit of what is taken out",
            unit,
            "score(edited control) − score(control)",
        ),
        "specific_effect": (
            measured.specific_effects,
            "change by one edit of what the student has over its control; of what is added, to the origin of both",
            unit,
            "effect − control_effect of what is taken out, effect of what is added",
        ),
        "damage": (measured.damage, "how much else the edit changes, on neutral inputs", "nats", "KL(p ‖ p_edited)"),
    }
    variables: dict[str, Any] = {}
    for name, (values, description, own_unit, formula) in described.items():
        variables[name] = label_variable(values, dims, description=description, unit=own_unit, formula=formula, source=SOURCE)
        variables[f"{name}_status"] = status_variable(_status(measured, name, values), dims, STATUS, name)
    for name, formula in (("student", "score(student) − score(control)"), ("teacher", "score(teacher) − score(reference)")):
        values = measured.totals[name]
        variables[f"{name}_effect"] = label_variable(
            values, dims[:3], description=f"what the {name} has of its trait", unit=unit, formula=formula
        )
        missing = status_variable(np.isnan(values), dims[:3], ("ok", "no_control_or_score"), f"{name}_effect")
        variables[f"{name}_effect_status"] = missing
    variables |= label_means(variables, ("specific_effect", "damage", "student_effect"))
    coords: dict[str, Any] = {
        "condition": run.conditions,
        "taught": run.traits,
        "member": np.arange(run.recipe.members),
        "edit": [edit.name for edit in measured.edits],
    }
    for field_name in ("kind", "vector", "window", "dose"):
        coords[field_name] = ("edit", np.array([getattr(edit, field_name) for edit in measured.edits], dtype=object))
    numbers = [float(edit.dose) if edit.dose not in ("", OWN_LENGTH) else np.nan for edit in measured.edits]
    coords["alpha"] = ("edit", numbers)
    return xr.Dataset(variables, coords)


def _status(measured: Measured, name: str, values: np.ndarray) -> np.ndarray:
    """Why a value is missing: for the student's own reason, or else for the control's."""
    if name == "control_effect":
        return measured.control_status
    if name != "specific_effect":
        return measured.status
    either = np.where(measured.status == OK, measured.control_status, measured.status)
    return np.where(np.isnan(values), either, OK)


@dataclass(frozen=True)
class _Claim:
    """A judged comparison: an edit with a student's own direction, less the same with others'."""

    quantity: str
    kind: str
    own: str
    others: str
    dose: str
    sign: float
    """−1 where taking something out is to lower the score."""
    formula: str


_CLAIMS = (
    _Claim(
        "sufficiency_of_teacher_direction", ADD, OWN_TEACHER, OTHER_TEACHERS, str(JUDGED_DOSE), 1.0,
        "score(origin + Σ_l (α/L) ‖h_l‖ v̂_T,l) − score(origin), l the L hook points of the window",
    ),
    _Claim(
        "sufficiency_of_student_direction", ADD, OWN_STUDENT, OTHER_STUDENTS, str(JUDGED_DOSE), 1.0,
        "score(origin + Σ_l (α/L) ‖h_l‖ v̂_S,l) − score(origin), l the L hook points of the window",
    ),
    _Claim(
        "necessity_of_teacher_direction", REPLACE, OWN_TEACHER, OTHER_TEACHERS, "", -1.0,
        "D − D with the origin's component along v̂_T in both, D = score(student) − score(control)",
    ),
    _Claim(
        "necessity_of_student_direction", REPLACE, OWN_STUDENT, OTHER_STUDENTS, "", -1.0,
        "D − D with the origin's component along v̂_S in both, D = score(student) − score(control)",
    ),
    _Claim(
        "loss_without_teacher_direction", OUT, OWN_TEACHER, OTHER_TEACHERS, "", -1.0,
        "D − D with v̂_T projected out of both, D = score(student) − score(control)",
    ),
    _Claim(
        "loss_without_student_direction", OUT, OWN_STUDENT, OTHER_STUDENTS, "", -1.0,
        "D − D with v̂_S projected out of both, D = score(student) − score(control)",
    ),
)  # fmt: skip


def _null_words(run: Run, claim: _Claim) -> str:
    """Whose directions the null is; of one trait there are only the neutral teacher's and the control's."""
    how = {ADD: ", as long", REPLACE: ", both pushed along it by as much", OUT: ", projected out of both"}[claim.kind]
    is_teachers = claim.others == OTHER_TEACHERS
    if len(run.traits) == 1:
        return f"the {'neutral teacher' if is_teachers else 'control'}'s direction{how}"
    count = len(run.traits) - 1 if claim.kind == ADD else min(OTHERS_TAKEN_OUT, len(run.traits) - 1)
    others = "all other traits" if claim.kind == ADD else f"the next {count} of the recipe's list"
    return f"other {'teachers' if is_teachers else 'students'}' directions{how}; mean over {others}"


def _windows(measured: Measured, kind: str) -> list[str]:
    """By depth; then windows of several hook points, all layers last. The last comes first where one stands for all."""
    found = dict.fromkeys(edit.window for edit in measured.edits if edit.kind == kind)
    return sorted(found, key=lambda window: (window not in _single_windows(measured), window == ALL_LAYERS))


def _single_windows(measured: Measured) -> list[str]:
    """Those of one hook point."""
    return list(dict.fromkeys(edit.window for edit in measured.edits if len(edit.points) == 1))


Claimed = tuple[str, str, str]
"""A claim's quantity, a condition and a window."""


def _judge(run: Run, measured: Measured) -> dict[Claimed, Judgement]:
    """Verdicts on the mean over traits; Holm over conditions and windows of each claim."""
    judgements: dict[Claimed, Judgement] = {}
    for claim in _CLAIMS:
        effects = {}
        for condition, window in product(run.conditions, _windows(measured, claim.kind)):
            own, others = _compare(measured, claim, condition, window)
            if np.isfinite(own - others).any():
                effects[claim.quantity, condition, window] = own - others
        judgements |= judge_effects(effects, run.rules(run.recipe.verdict.margin), AGAINST_NULL)
    return judgements


def _compare(measured: Measured, claim: _Claim, condition: str, window: str) -> tuple[ByMember, ByMember]:
    """The own effect and others', mean over traits."""
    edits = (measured.find(claim.kind, vector, window, claim.dose) for vector in (claim.own, claim.others))
    own, others = (claim.sign * measured.pooled(condition, edit) for edit in edits)
    run = measured.run
    if claim.kind == ADD and claim.own == OWN_TEACHER and len(np.unique(others)) == 1:
        own = distinct_members(run, own, run.reference, *map(run.teacher, run.traits))
    return own, others[: len(own)]


def _findings(run: Run, measured: Measured, judgements: Mapping[Claimed, Judgement]) -> Iterator[Finding]:
    verdict = run.recipe.verdict
    for claim, condition in product(_CLAIMS, run.conditions):
        for window in _windows(measured, claim.kind)[::-1]:
            own, others = _compare(measured, claim, condition, window)
            if not np.isfinite(own).any():
                continue
            against = student_interval(others, verdict.confidence)
            split = " in equal parts over its hook points" if window not in _single_windows(measured) else ""
            dose = f", α = {claim.dose}{split}" if claim.dose else ""
            yield Finding(
                analysis="steering_effect",
                quantity=claim.quantity,
                condition=condition,
                trait=pool_traits(run, condition)[1],
                context=next(iter(run.family.contexts)),
                step=run.student(condition, run.traits[0]).last,
                scope=f"{window}, all positions{dose}",
                unit=_unit(run),
                null=_null_words(run, claim) if np.isfinite(against.estimate) else "none: there is no other direction",
                null_low=against.low,
                null_high=against.high,
                num_references=run.recipe.num_references(condition),
                **judgement_fields(judgements.get((claim.quantity, condition, window)), verdict.margin, "it has no null here"),
                formula=claim.formula,
                source=SOURCE,
                **interval_fields(student_interval(own, verdict.confidence)),
            )


_COLORS = alt.Color(
    "vector:N",
    sort=list(VECTORS),
    title=None,
    scale=alt.Scale(domain=list(VECTORS), range=["#ea580c", "#fdba74", "#2563eb", "#93c5fd", "#64748b", "#cbd5e1"]),
)


def _told(run: Run, measured: Measured) -> list[str]:
    """The conditions in which something was edited."""
    return [name for row, name in enumerate(run.conditions) if (measured.status[row] == OK).any()]


def _necessity_figure(run: Run, measured: Measured) -> Figure:
    windows = _windows(measured, OUT)
    edits = [edit.name for edit in measured.edits if edit.kind != ADD]
    base = alt.Chart(DATA).encode(
        y=alt.Y("window:N", sort=windows, title=None), yOffset=alt.YOffset("vector:N", sort=list(VECTORS)), color=_COLORS
    )
    dots = base.mark_circle(size=20, opacity=0.6).encode(
        x=alt.X(f"{pooled_name('specific_effect')}:Q", title=f"change of what the student took over ({_unit(run)})"),
        tooltip=["vector:N", "member:O", f"{pooled_name('specific_effect')}:Q"],
    )
    total = (
        alt.Chart(DATA)
        .transform_aggregate(total=f"mean({pooled_name('student_effect')})", groupby=["condition", "kind"])
        .transform_calculate(removed="-datum.total")
        .mark_rule(strokeDash=[4, 3], color="#0f172a")
        .encode(x="removed:Q")
    )
    facets = (
        alt.layer(zero_line().encode(x=alt.datum(0)), total, dots, data=DATA)
        .properties(width=230, height=alt.Step(8))
        .facet(
            row=alt.Row("condition:N", sort=run.conditions, title=None),
            column=alt.Column("kind:N", sort=[OUT, REPLACE], title=None),
        )
    )
    return Figure(
        name="steering_necessity",
        title="What is left of the trait without a steering direction",
        caption=(
            "Change of what the student has over its control, in its own trait's score, when one direction is taken out of the "
            "activations of both at every position: projected out, or replaced by what their origin has there. Each dot is the "
            f"mean over traits of one of {count_members(run)}. The null is other teachers' or students' directions; they and "
            "random ones are projected out, or both are pushed along them by as much as the own one takes. "
            f"Dashed: all that the student took over, − (score − control), in {_unit(run)}."
        ),
        variables=(pooled_name("specific_effect"), pooled_name("student_effect")),
        spec=chart_spec(facets),
        select={"edit": edits, "condition": _told(run, measured)},
        headline=True,
    )


def _unit(run: Run) -> str:
    return next(iter(run.family.measures.values())).unit


def _dose_figures(run: Run, measured: Measured) -> list[Figure]:
    edits = [edit.name for edit in measured.edits if edit.kind == ADD and edit.dose != OWN_LENGTH and len(edit.points) == 1]
    figures = []
    for figure, name, y, title, measure in (
        (
            "steering_doses",
            "specific_effect",
            f"effect ({_unit(run)})",
            "What steering directions give to the model that students start from",
            "Score of the own trait",
        ),
        (
            "steering_damage",
            "damage",
            "damage (nats)",
            "What else they do there: the price of each dose",
            "KL(p ‖ p′) on neutral inputs",
        ),
    ):
        x = alt.X("alpha:Q", title="α: length over that of the activations", axis=alt.Axis(grid=False, values=list(DOSES)))
        chart = alt.Chart(DATA).transform_filter(f"isValid(datum.{pooled_name(name)})")
        members = chart.mark_line(opacity=0.25, strokeWidth=1).encode(
            x=x, y=alt.Y(f"{pooled_name(name)}:Q", title=y), color=_COLORS, detail="member:N"
        )
        mean = chart.mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=18)).encode(
            x=x, y=f"mean({pooled_name(name)}):Q", color=_COLORS
        )
        facets = (
            alt.layer(zero_line().encode(y=alt.datum(0)), members, mean, data=DATA)
            .properties(width=230, height=130)
            .facet(
                row=alt.Row("condition:N", sort=run.conditions, title=None),
                column=alt.Column("window:N", sort=_single_windows(measured), title=None),
            )
        )
        figures.append(
            Figure(
                name=figure,
                title=title,
                caption=(
                    f"{measure} after α ‖h‖ v̂ is "
                    "added at every position of one hook point, less that of the origin; ‖h‖ is the mean norm there. Thin "
                    f"lines: {count_members(run)}, mean over traits; thick: their mean. The null is other teachers' and "
                    "students' directions, as long; so is a random one."
                ),
                variables=(pooled_name(name),),
                spec=chart_spec(facets),
                select={"edit": edits, "condition": _told(run, measured)},
            )
        )
    return figures


def _sentences(run: Run, measured: Measured, judgements: Mapping[Claimed, Judgement]) -> Iterator[str]:
    yield (
        "Directions are estimated on the trait's prompts at the position that they are read at, and added or taken out at "
        "every position of other prompts, on which the score is taken. A direction is one mean vector: a trait that is another "
        "answer to every input, as reading digits is, need not have one."
    )
    for condition in run.conditions:
        if condition not in _told(run, measured):
            why = say_statuses(measured.status[run.conditions.index(condition)].flat, STATUS)
            yield f"{condition}: nothing was edited ({why})."
            continue
        yield _tell_sufficiency(run, measured, judgements, condition)
        yield _tell_necessity(run, measured, judgements, condition)
        if run.starts_elsewhere(run.student(condition, run.traits[0])) or not run.is_comparable(condition):
            yield (
                f"{condition}: its students start from another base, and teachers' directions are not rotated onto it here, so "
                "only their own are tried."
            )


def _tell_sufficiency(run: Run, measured: Measured, judgements: Mapping[Claimed, Judgement], condition: str) -> str:
    """What half a length of the directions gives where it gives most, beside what teacher and student have."""
    parts = []
    for claim in _CLAIMS[:2]:
        windows = [window for window in _windows(measured, ADD) if (claim.quantity, condition, window) in judgements]
        if windows:
            effects = {window: _compare(measured, claim, condition, window) for window in windows}
            most = max(windows, key=lambda window: np.nan_to_num(effects[window][0].mean(), nan=-np.inf))
            own, others = (_interval(run, values) for values in effects[most])
            counts = _count([judgements[claim.quantity, condition, window].verdict for window in windows])
            prices = (measured.price(condition, measured.find(ADD, one, most, claim.dose)) for one in (claim.own, RANDOM))
            price, random = (_interval(run, values) for values in prices)
            told = (
                f"{claim.own} gives {own} at {most}, where it gives most, uncorrected for that choice (others {others}), at a "
                f"price of {price} nats on neutral inputs (a random one {random})"
            )
            parts.append(f"{told}; {counts} hook points and windows")
    teacher, given = _interval(run, _taught(measured, condition)), "; ".join(parts) or "nothing was judged"
    return (
        f"{condition}: added to where students start, {JUDGED_DOSE:g} ‖h‖ long: {given}. The teacher itself gained {teacher}, "
        f"the student {_interval(run, measured.total(condition))} over its control ({_unit(run)})."
    )


def _taught(measured: Measured, condition: str) -> Float[np.ndarray, " distinct"]:
    run = measured.run
    return distinct_members(run, measured.taught(condition), run.reference, *map(run.teacher, run.traits))


def _count(verdicts: Sequence[str]) -> str:
    return ", ".join(f"{name} at {verdicts.count(name)} of {len(verdicts)}" for name in dict.fromkeys(verdicts))


def _tell_necessity(run: Run, measured: Measured, judgements: Mapping[Claimed, Judgement], condition: str) -> str:
    """What share of the transferred trait goes with each direction: over all layers, and of single ones where most does."""
    if not np.isfinite(measured.total(condition)).any():
        return f"{condition}: what is taken out has no control to be told against, so that no share of anything is given."
    if not _interval(run, measured.total(condition)).low > 0:
        return f"{condition}: what its students took over is not told from 0, so no share of it is given."
    parts = []
    for claim in _CLAIMS[2:]:
        shares = {
            window: share
            for window in _windows(measured, claim.kind)
            if np.isfinite((share := _share(run, measured, condition, claim, claim.own, window)).estimate)
        }
        if shares:
            single = [window for window in shares if window in _single_windows(measured)]
            shown = dict.fromkeys([*(set(shares) & {ALL_LAYERS}), max(single, key=lambda window: shares[window].estimate)])
            told = [
                f"{shares[one]} at {one} (others {_share(run, measured, condition, claim, claim.others, one)})" for one in shown
            ]
            keys = [(claim.quantity, condition, one) for one in shares]
            counts = _count([judgements[key].verdict for key in keys if key in judgements])
            done = "replaced by the origin's component" if claim.kind == REPLACE else "projected out"
            parts.append(f"{claim.own} {done}: {', '.join(told)}; {counts} windows")
    return (
        f"{condition}: share of the transferred trait that goes. {'. '.join(parts)}. The single hook point is the one where "
        "most goes, its interval not corrected for that choice. Both student and control are edited; under 0 the "
        "student is further from its control than before, over 1 the order is turned round."
    )


def _share(run: Run, measured: Measured, condition: str, claim: _Claim, vector: str, window: str) -> Interval:
    removed = -measured.pooled(condition, measured.find(claim.kind, vector, window))
    return fieller_interval(removed, measured.total(condition), run.recipe.verdict.confidence)


def _interval(run: Run, values: ByMember) -> Interval:
    return student_interval(values, run.recipe.verdict.confidence)

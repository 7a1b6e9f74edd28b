"""Steering directions: do the student's activations move where its own teacher's did, more than where other teachers' did?"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsub.activations.hook_points import HookPoint, main_stream
from mechsub.activations.stored import DIRECTIONS_GROUP, store_directions
from mechsub.analyses.registry import analysis
from mechsub.cases import CaseName, count_members, label_last_steps, list_cases
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, diverging_scale, fold_variables, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.pooling import distinct_members, label_means, list_traits, pool_traits, pooled_name, say_statuses
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects
from mechsub.steered.alignments import (
    ADJUSTED,
    ADJUSTED_OTHERS,
    BARE,
    BARE_NULL,
    INCOMPARABLE,
    NO_MAP,
    NOT_RUN,
    OK,
    QUANTITIES,
    RAW,
    RAW_CONTROL,
    RAW_OTHERS,
    SPECIFIC,
    STATUS,
    Cell,
)
from mechsub.steered.records import Recorded, Recorder

SOURCE = "steering directions of teacher and student: Blank, arXiv:2606.00995; Morgulis & Hewitt, arXiv:2604.25783"
_DIMS = ("condition", "taught", "member", "step", "point", "group")


@analysis(needs=["traits", "hook_points"], reads_activations=True)
def steering_directions(run: Run) -> Result:
    """Whether students' activations move along their own teachers' steering directions, layer by layer and step by step."""
    recorded = Recorder(run).record_all()
    data = _measure(run, recorded)
    judgements = _judge(run, data, recorded)
    figures = [make(run, data, recorded) for make in (_layer_figure, _training_figure, _group_figure)]
    directions = store_directions(recorded.vectors, recorded.points, recorded.groups)
    return Result(
        data,
        list(_findings(run, data, recorded, judgements)),
        figures,
        list(_sentences(run, data, recorded, judgements)),
        {DIRECTIONS_GROUP: directions},
    )


def _measure(run: Run, recorded: Recorded) -> xr.Dataset:
    """Every quantity as [condition, taught, member, step, point, group], with why a value is NaN."""
    steps = sorted({step for case in list_cases(run) for step in run.student(*case).steps})
    points, groups = recorded.points, recorded.groups
    shape = (len(run.conditions), len(run.traits), run.recipe.members, len(steps), len(points), len(groups))
    values = {quantity.name: np.full(shape, np.nan) for quantity in QUANTITIES}
    status = {quantity.name: np.full(shape, NOT_RUN, dtype=np.int8) for quantity in QUANTITIES}
    for (row, condition), (place, trait) in product(enumerate(run.conditions), enumerate(run.traits)):
        student = run.student(condition, trait)
        for (column, step), (depth, point) in product(enumerate(steps), enumerate(points)):
            if step not in student.steps:
                continue
            where = (row, place, slice(None), column, depth)
            why = _why_not(run, recorded, condition, point)
            cell = None if why else _build_cell(run, recorded, condition, trait, step, point)
            for quantity in QUANTITIES:
                found = why if cell is None else quantity.measure(cell)
                if isinstance(found, int):
                    status[quantity.name][where] = found
                elif cell is not None:
                    values[quantity.name][where] = found
                    status[quantity.name][where] = cell.explain(found)
    return _label(run, recorded, values, status, steps)


def _why_not(run: Run, recorded: Recorded, condition: str, point: HookPoint) -> int:
    """The status of a condition whose directions cannot be held against the teachers'; 0 where they can."""
    if not run.is_comparable(condition):
        return INCOMPARABLE
    return OK if recorded.has_map(run.student(condition, run.traits[0]), point) else NO_MAP


def _build_cell(run: Run, recorded: Recorded, condition: str, trait: str, step: int, point: HookPoint) -> Cell:
    student, control = run.student(condition, trait), run.control(condition)
    beside = None if control is None else run.paired_step(control, student, step)
    other_traits = [other for other in run.traits if other != trait]
    neutral = None if run.neutral is None else recorded.stack(run.neutral, run.neutral.last, point)
    others = [recorded.stack(run.teacher(other), run.teacher(other).last, point) for other in other_traits]
    own_readout = recorded.stack_readout(trait, point)
    readouts = [own_readout, *(recorded.stack_readout(other, point) for other in other_traits)]
    if not others and neutral is not None:
        others, readouts = [neutral], [own_readout, own_readout]
    return Cell(
        student=recorded.stack(student, step, point),
        teacher=recorded.stack(run.teacher(trait), run.teacher(trait).last, point),
        others=others,
        readout=readouts,
        control=None if control is None or beside is None else recorded.stack(control, beside, point),
        neutral=neutral,
        origin_norm=recorded.stack_norms(student, point),
        shuffles=recorded.stack_shuffles(student, step, point) if step == student.last else None,
        lacks=recorded.lacks([student, control, run.neutral, *map(run.teacher, run.traits)]),
    )


def _label(
    run: Run, recorded: Recorded, values: Mapping[str, np.ndarray], status: Mapping[str, np.ndarray], steps: Sequence[int]
) -> xr.Dataset:
    variables: dict[str, Any] = {"last_step": label_last_steps(run)}
    for quantity in QUANTITIES:
        name = quantity.name
        variables[name] = label_variable(
            values[name],
            _DIMS,
            description=name.replace("_", " "),
            unit=quantity.unit,
            formula=quantity.formula,
            source=SOURCE,
        )
        variables[f"{name}_status"] = status_variable(status[name], _DIMS, STATUS, name)
    widths = np.array([point.width for point in recorded.points])
    variables["random_cosine_sd"] = label_variable(
        1 / np.sqrt(widths),
        ["point"],
        description="standard deviation of random directions' cosine",
        unit="cosine",
        formula="1/√d",
    )
    variables |= _label_maps(run, recorded) | label_means(variables, (RAW, RAW_OTHERS, RAW_CONTROL))
    coords = {
        "condition": run.conditions,
        "taught": run.traits,
        "member": np.arange(run.recipe.members),
        "step": steps,
        "point": [point.name for point in recorded.points],
        "layer": ("point", [point.layer for point in recorded.points]),
        "site": ("point", [point.site for point in recorded.points]),
        "group": list(recorded.groups),
    }
    return xr.Dataset(variables, coords)


def _label_maps(run: Run, recorded: Recorded) -> dict[str, xr.Variable]:
    """How well students' bases were mapped onto the teachers'."""
    found = np.full((len(run.conditions), run.recipe.members, len(recorded.points)), np.nan)
    for (row, condition), member in product(enumerate(run.conditions), range(run.recipe.members)):
        maps = recorded.maps.get((run.student(condition, run.traits[0]).name, member), {})
        for depth, point in enumerate(recorded.points):
            if point.name in maps:
                found[row, member, depth] = maps[point.name].correlation
    dims, name = ("condition", "member", "point"), "map_correlation"
    described = "correlation of where students start, rotated onto the references, with these, on prompts not fitted on"
    return {
        name: label_variable(
            found, dims, description=described, unit="correlation", formula="⟨X R, Y⟩ / (‖X‖ ‖Y‖)", source="Schönemann 1966"
        ),
        f"{name}_status": status_variable(np.isnan(found), dims, ("ok", "no_map_is_needed_or_fitted"), name),
    }


def _judged_points(recorded: Recorded) -> list[HookPoint]:
    """The points whose verdicts count: what adds to the stream is in the results only."""
    return main_stream(recorded.points)


ByPoint = tuple[CaseName, str]
"""A case at a hook point; of the mean over traits the case's trait says so."""


def _judge(run: Run, data: xr.Dataset, recorded: Recorded) -> dict[ByPoint, Judgement]:
    """Verdicts at students' last steps, of several traits on cos(v_S − v_C, v_T) less the same with other teachers.

    With one trait there is no other teacher but the neutral one, whose student is the control: v_S − v_C would hold what
    the control took over from it. There it is cos(v_S, v_T) less the control's. Where a student could as well be its control,
    either is as often under 0 as over it.
    Of the mean over traits Holm runs over conditions and layers, of single traits over conditions, traits and layers.
    """
    by_trait: dict[ByPoint, np.ndarray] = {}
    pooled: dict[ByPoint, np.ndarray] = {}
    for condition, point in product(run.conditions, (point.name for point in _judged_points(recorded))):
        for cases, found in (([(condition, trait) for trait in run.traits], by_trait), ([pool_traits(run, condition)], pooled)):
            for case in cases:
                own, null = (_values(run, data, name, case, point) for name in _judged(run))
                effect = own - null
                if np.isfinite(effect).any():
                    found[case, point] = effect
    rules = run.rules(run.recipe.verdict.alignment_margin)
    return judge_effects(by_trait, rules, AGAINST_NULL) | judge_effects(pooled, rules, AGAINST_NULL)


def _judged(run: Run) -> tuple[str, str]:
    """The quantity that is judged, and the one that is its null."""
    return (ADJUSTED, ADJUSTED_OTHERS) if len(run.traits) > 1 else (RAW, RAW_CONTROL)


_NO_OTHERS = "none: the only other teacher is the neutral one, whose student the control is"
_OF_ONE_TRAIT = {
    RAW: (RAW_CONTROL, "the control: cos(v_C, v_T)", ""),
    ADJUSTED: ("", _NO_OTHERS, "the student's cosine against its control's is judged"),
    BARE: ("", _NO_OTHERS, "whole vectors are judged"),
    SPECIFIC: (
        "",
        "0: a student that is exchangeable with its control",
        "the student's cosine against its control's is judged",
    ),
    "student_shift": ("control_shift", "the control's own shift", "a size, not a direction"),
}
_OF_TRAITS = {
    ADJUSTED: (ADJUSTED_OTHERS, "other teachers from the same θ₀: cos(v_S − v_C, v_T′)", ""),
    BARE: (BARE_NULL, "other teachers, without their own targets' unembedding", "whole vectors are judged"),
    SPECIFIC: ("", "0: a student that is exchangeable with its control", "the cosine with other teachers as null is judged"),
    RAW: (RAW_OTHERS, "other teachers from the same θ₀: cos(v_S, v_T′)", "it holds the drift that any carrier causes"),
    "student_shift": ("control_shift", "the control's own shift", "a size, not a direction"),
}
"""By quantity: the variable that is its null, the null in words, and why it has no verdict."""


def _reported(run: Run) -> Mapping[str, tuple[str, str, str]]:
    return _OF_TRAITS if len(run.traits) > 1 else _OF_ONE_TRAIT


def _findings(run: Run, data: xr.Dataset, recorded: Recorded, judgements: Mapping[ByPoint, Judgement]) -> Iterator[Finding]:
    """Of the mean over traits all reported quantities, of single traits the judged one; the last hook point first.

    What is read there is what the answer is made of: tables that show one finding of a kind show that one.
    """
    for condition, point in product(run.conditions, reversed(_judged_points(recorded))):
        for name in _reported(run):
            cases = [pool_traits(run, condition)]
            if name == ADJUSTED and len(run.traits) > 1:
                cases += [(condition, trait) for trait in run.traits]
            for case in cases:
                if np.isfinite(_values(run, data, name, case, point.name)).any():
                    yield _finding(run, data, recorded, name, case, point, judgements.get((case, point.name)))


def _finding(
    run: Run, data: xr.Dataset, recorded: Recorded, name: str, case: CaseName, point: HookPoint, judgement: Judgement | None
) -> Finding:
    verdict = run.recipe.verdict
    null, null_words, reason = _reported(run)[name]
    against = student_interval(_values(run, data, null, case, point.name), verdict.confidence) if null else None
    if against is not None and not np.isfinite(against.estimate):
        null_words = "none: no control or no other teacher"
    students = [run.student(case[0], trait) for trait in list_traits(run, case)]
    quantity = next(one for one in QUANTITIES if one.name == name)
    mapped = ", rotated by a fit of both starts on neutral and trait prompts" if run.starts_elsewhere(students[0]) else ""
    return Finding(
        analysis="steering_directions",
        quantity=name,
        condition=case[0],
        trait=case[1],
        context="activations",
        step=max(student.last for student in students),
        scope=f"{point.name}, {recorded.groups[0]}{mapped}",
        unit=quantity.unit,
        null=null_words,
        null_low=np.nan if against is None else against.low,
        null_high=np.nan if against is None else against.high,
        num_references=run.recipe.num_references(case[0]),
        **judgement_fields(
            judgement if name == _judged(run)[0] else None, verdict.alignment_margin, reason or "no control or no other teacher"
        ),
        formula=quantity.formula,
        source=SOURCE,
        **interval_fields(student_interval(_values(run, data, name, case, point.name), verdict.confidence)),
    )


def _values(run: Run, data: xr.Dataset, name: str, case: CaseName, point: str) -> Float[np.ndarray, " member"]:
    """A variable at students' last steps, on the first group's prompts, member by member; of all traits their mean."""
    found = []
    for trait in list_traits(run, case):
        last = int(data.last_step.sel(condition=case[0], taught=trait))
        chosen = data[name].sel(condition=case[0], taught=trait, step=last, point=point).isel(group=0)
        found.append(chosen.values)
    mean: np.ndarray = np.mean(found, axis=0)
    return mean


def _judged_who(run: Run) -> dict[str, str]:
    """The lines of what is judged, by variable."""
    words = ("own teacher's v_T", "other teachers' (null)") if len(run.traits) > 1 else ("student", "control (null)")
    return dict(zip(_judged(run), words, strict=True))


def _raw_who(run: Run) -> dict[str, str]:
    """The lines of what is drawn along training, by variable."""
    names = (pooled_name(RAW), pooled_name(RAW_OTHERS), pooled_name(RAW_CONTROL))
    of_traits = ("own teacher's v_T", "other teachers' (null)", "control with that teacher's")
    of_one = ("own teacher's v_T", "neutral teacher's v_N", "control with v_T (null)")
    return dict(zip(names, of_traits if len(run.traits) > 1 else of_one, strict=True))


def _judged_words(run: Run) -> str:
    """What is judged and its null, for captions."""
    if len(run.traits) > 1:
        return "cos(v_S − v_C, v_T); the null is the same with other teachers' v_T, from the same θ₀"
    return "cos(v_S, v_T); the null is the control's, cos(v_C, v_T)"


def _told(run: Run, data: xr.Dataset) -> list[str]:
    """The conditions with a value."""
    return [name for name in run.conditions if np.isfinite(data[RAW].sel(condition=name).values).any()]


def _layer_figure(run: Run, data: xr.Dataset, recorded: Recorded) -> Figure:
    points = [point.name for point in recorded.points]
    dots = (
        fold_variables("cosine", _judged_who(run))
        .mark_circle(size=22, opacity=0.45)
        .encode(
            x=alt.X("cosine:Q", title="cosine of steering directions"),
            y=alt.Y("point:N", sort=points, title=None),
            yOffset=alt.YOffset("who:N", sort=list(_judged_who(run).values())),
            color=color_by_who(_judged_who(run)),
            tooltip=["condition:N", "point:N", "taught:N", "who:N", "member:O", alt.Tooltip("cosine:Q", format=".3f")],
        )
        .transform_filter("datum.step == datum.last_step")
    )
    facets = (
        alt.layer(zero_line().encode(x=alt.datum(0)), dots, data=DATA)
        .properties(width=260, height=alt.Step(9))
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=2)
    )
    return Figure(
        name="steering_alignment_by_layer",
        title="Do students' activations move where their own teachers' did?",
        caption=(
            f"{_judged_words(run)}. At students' last steps, no unit, at every hook point; v is the mean activation less that "
            f"of the lineage's own origin over {recorded.groups[0]} ({_describe_prompts(run)}). Each dot is one of "
            f"{count_members(run)}. Random directions would scatter about 0 "
            f"by {float(data.random_cosine_sd.max()):.2f} (1/√d), students of shuffled labels by {_shuffled_words(run, data)}: "
            "lines to read by, not nulls."
        ),
        variables=(*_judged_who(run), "last_step"),
        spec=chart_spec(facets),
        select={"condition": _told(run, data), "group": [recorded.groups[0]]},
        headline=True,
    )


def _describe_prompts(run: Run) -> str:
    return run.family.prompts(run.reference, 0).estimate["trait"].description


def _shuffled_words(run: Run, data: xr.Dataset) -> str:
    spread = data.shuffled_steering_alignment_sd.values
    return f"{np.nanmedian(spread):.2f}" if np.isfinite(spread).any() else "– (none drawn)"


def _training_figure(run: Run, data: xr.Dataset, recorded: Recorded) -> Figure:
    points = [point.name for point in _judged_points(recorded)]
    chart, color = fold_variables("cosine", _raw_who(run)), color_by_who(_raw_who(run))
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="symlog"), axis=alt.Axis(grid=False))
    members = chart.mark_line(opacity=0.3, strokeWidth=1).encode(
        x=x, y=alt.Y("cosine:Q", title="cosine"), detail="member:N", color=color
    )
    mean = chart.mark_line(strokeWidth=2.5).encode(x=x, y="mean(cosine):Q", color=color)
    facets = (
        alt.layer(zero_line().encode(y=alt.datum(0)), members, mean, data=DATA)
        .properties(width=165, height=110)
        .facet(
            row=alt.Row("condition:N", sort=run.conditions, title=None), column=alt.Column("point:N", sort=points, title=None)
        )
    )
    return Figure(
        name="steering_alignment_training",
        title="When it comes: the same along the students' training",
        caption=(
            f"cos(v_S(t), v_T), no unit, over {recorded.groups[0]}, in the residual stream or hidden layers. Thin lines "
            f"are {count_members(run)}, their means over traits; thick ones the mean of all. The null is marked; the control's "
            "line is the drift that any carrier causes. At step 0 nothing has moved."
        ),
        variables=tuple(_raw_who(run)),
        spec=chart_spec(facets),
        select={"condition": _told(run, data), "group": [recorded.groups[0]], "point": points},
    )


def _group_figure(run: Run, data: xr.Dataset, recorded: Recorded) -> Figure:
    points, told = [point.name for point in recorded.points], _told(run, data)
    lasts = sorted({int(step) for step in data.last_step.values.flat})
    own, null = _judged(run)
    shown = (data[own] - data[null]).sel(condition=told, step=lasts).mean(["member", "taught"])
    chart = (
        alt.Chart(DATA)
        .transform_filter(f"datum.step == datum.last_step && isValid(datum.{own}) && isValid(datum.{null})")
        .transform_calculate(difference=f"datum.{own} - datum.{null}")
        .mark_rect()
        .encode(
            x=alt.X("group:N", sort=list(recorded.groups), title=None, axis=alt.Axis(labelAngle=-35)),
            y=alt.Y("point:N", sort=points, title=None),
            color=alt.Color(
                "mean(difference):Q",
                title="cos − its null",
                scale=diverging_scale(shown.values),
                legend=alt.Legend(orient="top", gradientLength=180, gradientThickness=10),
            ),
            tooltip=["point:N", "group:N", alt.Tooltip("mean(difference):Q", format=".3f", title="cos − its null")],
        )
        .properties(width=alt.Step(26), height=alt.Step(16))
    )
    return Figure(
        name="steering_alignment_prompts",
        title="Where it shows: on which prompts, at which positions and hook points",
        caption=(
            f"{_judged_words(run)}. The first less the second, no unit, mean over {count_members(run)}, at students' last "
            "steps. Every kind of prompts has its own directions of student and teacher."
        ),
        variables=(own, null, "last_step"),
        spec=chart_spec(chart.facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=2)),
        select={"condition": told, "step": lasts},
    )


def _sentences(run: Run, data: xr.Dataset, recorded: Recorded, judgements: Mapping[ByPoint, Judgement]) -> Iterator[str]:
    """What was found of each condition, or why nothing was."""
    prompts = run.family.prompts(run.reference, 0)
    kinds = "; ".join(f"{kind}: {prompt_set.description}" for kind, prompt_set in prompts.estimate.items())
    yield f"Directions are estimated on {kinds}. Verdicts on scores are taken on other questions or images."
    for condition in run.conditions:
        if not run.is_comparable(condition):
            yield f"{condition}: incomparable, {run.why_incomparable(condition)}; its activations have other coordinates."
        elif condition not in _told(run, data) and run.starts_elsewhere(run.student(condition, run.traits[0])):
            yield (
                f"{condition}: its students start from another base, which no rotation takes to the teachers' "
                f"({_map_words(run, data, condition)} on prompts not fitted on): directions cannot be compared."
            )
        elif condition in _told(run, data):
            yield _summarise(run, data, recorded, judgements, condition)
        else:
            yield f"{condition}: no steering direction can be held against the teacher's ({_why(data, condition)})."


def _summarise(run: Run, data: xr.Dataset, recorded: Recorded, judgements: Mapping[ByPoint, Judgement], condition: str) -> str:
    case, points = pool_traits(run, condition), _judged_points(recorded)
    told = [point.name for point in points if np.isfinite(_values(run, data, RAW, case, point.name)).any()]
    if not told:
        return f"{condition}: there is no cosine at students' last steps ({_why(data, condition)})."
    verdicts = [judgements[case, name].verdict for name in told if (case, name) in judgements]
    counts = ", ".join(f"{verdict} at {verdicts.count(verdict)} of {len(points)}" for verdict in dict.fromkeys(verdicts))
    last = told[-1]

    def mean(name: str) -> Interval:
        return student_interval(_values(run, data, name, case, last), run.recipe.verdict.confidence)

    elsewhere = ""
    if run.starts_elsewhere(run.student(condition, run.traits[0])):
        unmapped = f"; no sound map at the {len(points) - len(told)} other" if len(told) < len(points) else ""
        elsewhere = f"; rotated onto the teachers' base ({_map_words(run, data, condition)} on prompts not fitted on){unmapped}"
    if np.isnan(mean(ADJUSTED).estimate):
        return (
            f"{condition}: at {last} v_S has cosine {mean(RAW)} with its own teacher's v_T; there is no control to judge it by."
        )
    judged = judgements.get((case, last))
    difference = "" if judged is None else f" (difference {judged.interval}, n = {judged.interval.n})"
    if len(run.traits) > 1:
        bare = mean(BARE)
        without = f"; without the target's unembedding {bare} and {mean(BARE_NULL)}" if np.isfinite(bare.estimate) else ""
        told_last = (
            f"v_S − v_C has cosine {mean(ADJUSTED)} with its own teacher's v_T, {mean(ADJUSTED_OTHERS)} with other "
            f"teachers'{difference}{without}; v_S alone {mean(RAW)} and {mean(RAW_OTHERS)}"
        )
    else:
        told_last = (
            f"v_S has cosine {mean(RAW)} with its teacher's v_T, the control's v_C {mean(RAW_CONTROL)}{difference}; v_S − v_C "
            f"{mean(ADJUSTED)}"
        )
    teachers = map(run.teacher, run.traits)
    length = distinct_members(run, _values(run, data, "teacher_shift", case, last), run.reference, *teachers)
    return (
        f"{condition}: {counts or 'not judged'} hook points. At {last}, the last that can be compared, {told_last}{elsewhere}. "
        f"‖v_S‖ is {mean('student_shift')} of ‖h‖, ‖v_T‖ {student_interval(length, run.recipe.verdict.confidence)}."
    )


def _why(data: xr.Dataset, condition: str) -> str:
    """Why there is no cosine on the first kind of prompts, in words."""
    return say_statuses(data[f"{RAW}_status"].sel(condition=condition).isel(group=0).values.flat, STATUS)


def _map_words(run: Run, data: xr.Dataset, condition: str) -> str:
    found = data.map_correlation.sel(condition=condition).values
    known = found[np.isfinite(found)]
    return f"correlation {known.min():.2f} to {known.max():.2f} over layers and members" if known.size else "too few rows"

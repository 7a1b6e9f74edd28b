"""Parameter alignment: did the student's weights move where its teacher's did, more than another's would have?"""

from collections.abc import Mapping, Sequence
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
    label_last_steps,
    label_random_cosines,
    last_displacement,
    last_steps,
    list_cases,
    list_directions,
    scope_coordinates,
)
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, diverging_scale, fold_variables, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.parameters.alignment import MODEL, SHARED_SUPPORT, STATUS, DirectionAlgebra, Missing, Scopes
from mechsub.parameters.blocks import list_blocks
from mechsub.parameters.gram import describe_not_finite, stream_gram
from mechsub.parameters.quantities import NEUTRAL, QUANTITIES, SWAPPED, Quantity
from mechsub.parameters.stored import GRAM_GROUP, store_gram
from mechsub.relations import relate_students, relate_trajectories
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.permutation import flip_signs
from mechsub.statistics.verdicts import AGAINST_NULL, SIGN_FLIP, Judgement, judge_effects

SOURCE = "displacement cosines: Ilharco et al., arXiv:2212.04089; Cloud et al., arXiv:2507.14805, Theorem 1"
_DIMS = ("condition", "taught", "member", "step", "scope")
_CLEAR_OF_ROUNDING = 10
"""How many times the rounding floor a displacement should be long."""
_NEEDS = {quantity.name: quantity.needs for quantity in QUANTITIES}
_MOST_TENSORS = 16
"""With more, figures show layers and the model; every tensor is in the results."""


@analysis
def parameter_alignment(run: Run) -> Result:
    """How far students move along their teacher's displacement, per tensor, layer and model, against another teacher."""
    blocks = list_blocks(run.reference.spec.tensors)
    anchors = [last_displacement(run.teacher(trait)) for trait in run.traits]
    gram = stream_gram(list_directions(run), blocks, anchors, device=run.device)
    algebra = DirectionAlgebra(gram, Scopes.of(blocks))
    students = [run.student(condition, trait) for condition in run.conditions for trait in run.traits]
    data = _measure(run, algebra, sorted({step for student in students for step in student.steps}))
    data = xr.merge([data, relate_trajectories(run, algebra), relate_students(run, algebra)])
    judgements = _judge(run, data)
    findings = _findings(run, data, judgements) + _norm_findings(run, data)
    figures = [_training_figure(run), _heat_map_figure(run, data), _scope_figure(run, data), _specific_figure(run, data)]
    figures += [_trajectory_figure(run, data), _students_figure(run, data)]
    sentences = [*_sentences(run, data), *_rounding_sentences(run, data), *describe_not_finite(gram.not_finite)]
    return Result(data, findings, figures, sentences, {GRAM_GROUP: store_gram(algebra, blocks)})


def _measure(run: Run, algebra: DirectionAlgebra, steps: Sequence[int]) -> xr.Dataset:
    """Every quantity as [condition, taught, member, step, scope], with why a value is NaN."""
    scopes = algebra.scopes
    shape = (len(run.conditions), len(run.traits), run.recipe.members, len(steps), len(scopes.names))
    values = {quantity.name: np.full(shape, np.nan) for quantity in QUANTITIES}
    status = {quantity.name: np.full(shape, Missing.NOT_RUN, dtype=np.int8) for quantity in QUANTITIES}
    for row, condition in enumerate(run.conditions):
        comparable = run.is_comparable(condition)
        for (place, trait), (column, step) in product(enumerate(run.traits), enumerate(steps)):
            cell = (row, place, slice(None), column)
            if not comparable:
                for quantity in QUANTITIES:
                    status[quantity.name][cell] = Missing.INCOMPARABLE
            elif step in run.student(condition, trait).steps:
                case = build_case(run, algebra, condition, trait, step)
                for quantity in QUANTITIES:
                    found = quantity.measure(case)
                    if found is not None:
                        values[quantity.name][cell] = found
                        status[quantity.name][cell] = quantity.explain(case, found)
        run.report_progress(run.num_checkpoints * (row + 1) // len(run.conditions))
    return _label(run, values, status, steps, scopes)


def _label(
    run: Run, values: Mapping[str, np.ndarray], status: Mapping[str, np.ndarray], steps: Sequence[int], scopes: Scopes
) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for quantity in QUANTITIES:
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
    coords = scope_coordinates(run, scopes) | {"step": list(steps)}
    variables["last_step"] = label_last_steps(run)
    return xr.Dataset(variables, coords=coords)


def _final(run: Run, data: xr.Dataset, name: str, case: CaseName, scope: str = MODEL) -> np.ndarray:
    return _final_scopes(run, data, name, case)[:, list(data.scope.values).index(scope)]


def _final_scopes(run: Run, data: xr.Dataset, name: str, case: CaseName) -> np.ndarray:
    """A variable at the student's last step as [member, scope]."""
    condition, trait = case
    found: np.ndarray = data[name].sel(condition=condition, taught=trait, step=run.student(condition, trait).last).values
    return found


def _judge(run: Run, data: xr.Dataset) -> dict[tuple[str, CaseName], Judgement]:
    """Verdicts at the last step over the whole model, by (quantity, case); Holm runs over the conditions and traits."""
    rules = run.rules(run.recipe.verdict.alignment_margin)
    judgements: dict[tuple[str, CaseName], Judgement] = {}
    for quantity in QUANTITIES:
        if not quantity.judged:
            continue
        effects = {}
        for case in list_cases(run):
            if quantity.null and run.control(case[0]) is None:
                continue
            values = _final(run, data, quantity.name, case)
            if quantity.judged == "paired" and quantity.null:
                values = values - _final(run, data, quantity.null, case)
            if _is_measured(run, data, quantity.name, case):
                effects[case] = values
        swap_test = SIGN_FLIP if quantity.judged == "swap" else None
        judged = judge_effects(effects, rules, AGAINST_NULL, swap_test)
        judgements |= {(quantity.name, case): judgement for case, judgement in judged.items()}
    return judgements


def _is_measured(run: Run, data: xr.Dataset, name: str, case: CaseName) -> bool:
    """Whether there is anything that could have moved: not where a quantity was not run, or students have other tensors."""
    status = _final(run, data, f"{name}_status", case)
    return not bool(np.isin(status, (Missing.NOT_RUN, Missing.INCOMPARABLE)).all()) and run.student(*case).last > 0


def _findings(run: Run, data: xr.Dataset, judgements: Mapping[tuple[str, CaseName], Judgement]) -> list[Finding]:
    found = []
    for quantity in (quantity for quantity in QUANTITIES if quantity.null_words):
        for case in list_cases(run):
            if not _is_measured(run, data, quantity.name, case):
                continue
            found.append(_finding(run, data, quantity, case, MODEL, "all parameters", judgements.get((quantity.name, case))))
            if quantity.name == "alignment":
                found.append(_finding(run, data, quantity, case, SHARED_SUPPORT, "tensors that both moved", None))
    return found


def _finding(
    run: Run,
    data: xr.Dataset,
    quantity: Quantity,
    case: CaseName,
    scope: str,
    scope_words: str,
    judgement: Judgement | None,
) -> Finding:
    confidence = run.recipe.verdict.confidence
    values = _final(run, data, quantity.name, case, scope)
    if quantity.null is not None:
        against = student_interval(_final(run, data, quantity.null, case, scope), confidence)
        null_low, null_high = against.low, against.high
    elif quantity.judged or quantity.null_words == SWAPPED:
        swapped = flip_signs(values, confidence)
        null_low, null_high = swapped.null_low, swapped.null_high
    else:
        null_low = null_high = float("nan")
    reason = "the verdict is given over all parameters" if quantity.judged else quantity.why_unjudged
    null_words = quantity.null_words
    if quantity.null is not None and run.control(case[0]) is None:
        null_words, reason = "none: no control was given", "without its null a cosine says nothing; give --control"
    elif quantity.null is not None and run.neutral is None and NEUTRAL in _NEEDS[quantity.null]:
        null_words = "none: no neutral teacher was given"
    return Finding(
        quantity=quantity.name,
        condition=case[0],
        trait=case[1],
        step=run.student(*case).last,
        scope=scope_words,
        unit=quantity.unit,
        null=null_words,
        null_low=null_low,
        null_high=null_high,
        **judgement_fields(judgement, run.recipe.verdict.alignment_margin, reason),
        formula=quantity.formula,
        **interval_fields(student_interval(values, confidence)),
        **_common(run, case[0]),
    )


def _common(run: Run, condition: str | None = None) -> dict[str, Any]:
    return {
        "analysis": "parameter_alignment",
        "context": "parameters",
        "num_references": run.recipe.num_references(condition),
        "source": SOURCE,
    }


def _norm_findings(run: Run, data: xr.Dataset) -> list[Finding]:
    """Whether the neutral teacher moved as far as each teacher: a control that moved less is a weaker one."""
    condition = next(iter(_comparable(run)), None)
    if condition is None or run.neutral is None:
        return []
    findings = []
    for trait in run.traits:
        neutral, teacher = (_final(run, data, f"{who}_norm", (condition, trait)) for who in ("neutral", "teacher"))
        ratio = neutral / np.where(teacher > 0, teacher, np.nan)
        moved = bool(np.isfinite(ratio).any())
        findings.append(
            Finding(
                quantity="neutral_norm_ratio",
                condition="",
                trait=trait,
                step=run.neutral.last,
                scope="all parameters",
                unit="ratio",
                null="none: it describes the control; near 1 it moved as far as the teacher",
                null_low=float("nan"),
                null_high=float("nan"),
                verdict="",
                reason="a description of the neutral teacher, not a claim" if moved else "the teacher has no displacement",
                rule="",
                margin=float("nan"),
                formula="‖Δ_N‖ / ‖Δ_T‖",
                **interval_fields(student_interval(ratio, run.recipe.verdict.confidence)),
                **_common(run),
            )
        )
    return findings


_STUDENT_AND_NULL = {"alignment": "student", "alignment_of_control": "control (null)"}
_BAR = alt.Legend(orient="top", gradientLength=180, gradientThickness=10)
_ZERO = zero_line()


def _training_figure(run: Run) -> Figure:
    chart, color = fold_variables("cosine", _STUDENT_AND_NULL), color_by_who(_STUDENT_AND_NULL)
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(grid=False))
    y = alt.Y("cosine:Q", title="cos(Δ, Δ_T)")
    detail = ["member:N", "taught:N"]
    members = chart.mark_line(opacity=0.25, strokeWidth=1).encode(x=x, y=y, detail=detail, color=color)
    mean = chart.mark_line(strokeWidth=2.5).encode(x=x, y="mean(cosine):Q", color=color)
    spread = {"upper": "2 * datum.random_cosine_sd", "lower": "-2 * datum.random_cosine_sd"}
    line = alt.Chart(DATA).transform_calculate(**spread).mark_rule(color="#2563eb", strokeDash=[1, 2])
    random = [line.encode(y=f"mean({side}):Q") for side in ("upper", "lower")]
    facets = (
        alt.layer(*random, members, mean, data=DATA)
        .properties(width=132, height=118)
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)
    )
    return Figure(
        name="alignment_training",
        title="Alignment with the teacher's displacement along training",
        caption=(
            f"cos(Δ_S, Δ_T) over all parameters, no unit, against cos(Δ_C, Δ_T) of its control, a student of "
            f"{run.neutral_name} from the same start (the null). Thin lines are {count_members(run)}, thick ones their mean. "
            f"Between the blue lines lie 95 % of random directions (±2/√d): a line to read by, not the null.{_no_control(run)}"
        ),
        variables=("alignment", "alignment_of_control", "random_cosine_sd"),
        spec=chart_spec(facets),
        select={"scope": [MODEL], "condition": _comparable(run)},
        headline=True,
    )


def _heat_map_figure(run: Run, data: xr.Dataset) -> Figure:
    chosen = data.sel(condition=_comparable(run), scope=_drawn_scopes(data))
    shown = (chosen.alignment - chosen.alignment_of_control).mean(["member", "taught"])
    chart = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.alignment) && isValid(datum.alignment_of_control)")
        .transform_calculate(difference="datum.alignment - datum.alignment_of_control")
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="optimizer step", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("scope:N", sort=_drawn_scopes(data), title=None),
            color=alt.Color("mean(difference):Q", title="cos − its null", scale=diverging_scale(shown.values), legend=_BAR),
            tooltip=["scope:N", "step:O", alt.Tooltip("mean(difference):Q", format=".3f", title="cos − its null")],
        )
        .properties(width=165, height=alt.Step(16))
    )
    return Figure(
        name="alignment_heat_map",
        title="Layer by step: where and when the alignment rises over its null",
        caption=(
            f"cos(Δ_S, Δ_T) − cos(Δ_C, Δ_T), no unit, mean over {count_members(run)}, of every {_scope_words(data)}, "
            "the model and the shared support, at every checkpoint after the start. The null, the control's cosine, is "
            "subtracted from each member's own. In an empty cell student and teacher moved nothing together."
        ),
        variables=("alignment", "alignment_of_control"),
        spec=chart_spec(chart.facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)),
        select={"scope": _drawn_scopes(data), "condition": _comparable(run)},
    )


def _scope_figure(run: Run, data: xr.Dataset) -> Figure:
    dots = (
        fold_variables("cosine", _STUDENT_AND_NULL)
        .transform_filter("datum.step == datum.last_step")
        .mark_circle(size=22, opacity=0.5)
        .encode(
            x=alt.X("cosine:Q", title="cos(Δ, Δ_T)"),
            y=alt.Y("scope:N", sort=_drawn_scopes(data), title=None),
            color=color_by_who(_STUDENT_AND_NULL),
            tooltip=["scope:N", "taught:N", "member:O", alt.Tooltip("cosine:Q", format=".3f")],
        )
    )
    facets = (
        alt.layer(_ZERO.encode(x=alt.datum(0)), dots, data=DATA)
        .properties(width=195, height=alt.Step(15))
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=3)
    )
    spread = float(data.random_cosine_sd.sel(scope=MODEL))
    return Figure(
        name="alignment_scopes",
        title="Where the alignment lies: every part and the whole model",
        caption=(
            f"cos(Δ_S, Δ_T), no unit, at the last step, of every {_scope_words(data)}; each dot is one of "
            f"{count_members(run)}; the null is its control. A scope without dots has no shared support: student and teacher "
            "moved no tensor of it together. Random directions of all parameters would scatter about 0 with a standard "
            f"deviation of 1/√d = {spread:.4f}: a line to read by, not the null.{_no_control(run)}"
        ),
        variables=("alignment", "alignment_of_control", "last_step"),
        spec=chart_spec(facets),
        select={"step": last_steps(data), "scope": _drawn_scopes(data), "condition": _comparable(run)},
    )


def _specific_figure(run: Run, data: xr.Dataset) -> Figure:
    names = {"specific_alignment": "student − control", "sham_alignment": "control − control"}
    dots = (
        fold_variables("cosine", names)
        .transform_filter("datum.step == datum.last_step")
        .mark_circle(size=40, opacity=0.55)
        .encode(
            x=alt.X("cosine:Q", title="cos(θ_S − θ_C, Δ_T − Δ_N)"),
            y=alt.Y("condition:N", sort=run.conditions, title=None),
            yOffset=alt.YOffset("who:N", sort=list(names.values())),
            color=color_by_who(names),
            tooltip=["condition:N", "taught:N", "who:N", "member:O", alt.Tooltip("cosine:Q", format=".3f")],
        )
    )
    return Figure(
        name="specific_alignment",
        title="Specific alignment: does the student lean to its own teacher rather than to another?",
        caption=(
            "cos(θ_S − θ_C, Δ_T − Δ_N) over all parameters at the last step, no unit; each dot is one of "
            f"{count_members(run)}. Its null is 0: students who could swap teachers would scatter about it, as two "
            "controls in the students' places (the sham) should."
        ),
        variables=(*names, "last_step"),
        spec=chart_spec(alt.layer(_ZERO.encode(x=alt.datum(0)), dots, data=DATA).properties(width=640, height=alt.Step(16))),
        select={"scope": [MODEL], "step": last_steps(data), "condition": _comparable(run)},
    )


def _trajectory_figure(run: Run, data: xr.Dataset) -> Figure:
    shown = data.trajectory_alignment.sel(condition=_comparable(run)).mean(["member", "taught"])
    chart = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.trajectory_alignment)")
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="student's optimizer step", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("teacher_step:O", title="teacher's optimizer step", sort="descending"),
            color=alt.Color(
                "mean(trajectory_alignment):Q",
                title="cos(Δ_S(t), Δ_T(t′))",
                scale=diverging_scale(shown.values),
                legend=_BAR,
            ),
            tooltip=["step:O", "teacher_step:O", alt.Tooltip("mean(trajectory_alignment):Q", format=".3f", title="cosine")],
        )
        .properties(width=150, height=110)
    )
    return Figure(
        name="alignment_trajectories",
        title="Which part of its teacher's way does the student go?",
        caption=(
            f"cos(Δ_S(t), Δ_T(t′)) over all parameters, no unit, mean over {count_members(run)}: the student at each of its "
            "checkpoints against its teacher at each of the teacher's. No null is subtracted: the row of the teacher's last "
            "step is the alignment, which has one."
        ),
        variables=("trajectory_alignment",),
        spec=chart_spec(chart.facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)),
        select={"condition": _comparable(run)},
    )


def _students_figure(run: Run, data: xr.Dataset) -> Figure:
    names = {
        "alignment_between_students": "students, cos(Δ_S, Δ_S′)",
        "alignment_between_controls": "their controls, cos(Δ_C, Δ_C′)",
        "adjusted_alignment_between_students": "students less controls, cos(θ_S − θ_C, θ_S′ − θ_C′)",
    }
    students = [str(name) for name in data.student.values[np.isin(data.student_condition.values, _comparable(run))]]
    chart = (
        fold_variables("cosine", names)
        .mark_rect()
        .encode(
            x=alt.X("other_student:N", sort=students, title=None, axis=alt.Axis(labelAngle=-40)),
            y=alt.Y("student:N", sort=students, title=None),
            color=alt.Color("mean(cosine):Q", title="cosine", scale=diverging_scale(np.ones(1)), legend=_BAR),
            tooltip=["student:N", "other_student:N", alt.Tooltip("mean(cosine):Q", format=".3f", title="cosine")],
        )
        .properties(width=alt.Step(22), height=alt.Step(22))
    )
    return Figure(
        name="alignment_between_students",
        title="Do students of one member move together?",
        caption=(
            f"Cosines of two students' displacements over all parameters at their last steps, no unit, mean over "
            f"{count_members(run)}. Beside them the same of their controls, the null of such a pair (what any two such "
            "trainings share), and of what is left of each student less its control; two students of one control have no cell "
            "there."
        ),
        variables=tuple(names),
        spec=chart_spec(chart.facet(facet=alt.Facet("who:N", sort=list(names.values()), title=None), columns=3)),
        select={"scope": [MODEL], "student": students, "other_student": students},
    )


def _comparable(run: Run) -> list[str]:
    """The conditions that figures show: those whose students have the teachers' parameters and were trained."""
    return [name for name in run.conditions if run.is_comparable(name) and _is_trained(run, name)]


def _is_trained(run: Run, condition: str) -> bool:
    return run.student(condition, run.traits[0]).last > 0


def _drawn_scopes(data: xr.Dataset) -> list[str]:
    kinds = data.scope_kind.values
    keeps_tensors = (kinds == "tensor").sum() <= _MOST_TENSORS
    return [str(name) for name, kind in zip(data.scope.values, kinds, strict=True) if keeps_tensors or kind != "tensor"]


def _scope_words(data: xr.Dataset) -> str:
    return "tensor and layer" if len(_drawn_scopes(data)) == len(data.scope) else "layer (tensors are in the results)"


def _no_control(run: Run) -> str:
    """For captions that speak of a control."""
    without = [name for name in _comparable(run) if run.control(name) is None]
    return f" No control was given for {', '.join(without)}: there is no null." if without else ""


def _sentences(run: Run, data: xr.Dataset) -> list[str]:
    sentences = _untold_sentences(run)
    for condition in _comparable(run):
        if all(run.teacher(trait).last > 0 for trait in run.traits):
            sentences.append(_summarise(run, data, condition))
        origin = run.student(condition, run.traits[0]).spec.origin
        if origin.is_same_function and not origin.is_reference:
            sentences.append(
                f"{condition} has alignment {_mean(run, data, 'alignment', condition)}: its students start as the same "
                "function that their teacher started as, but with weights stored in other coordinates, so that the same "
                "change of the function is a change of other weights, and a cosine compares weight by weight; a low alignment "
                "there says nothing against a transfer."
            )
    # Where no trait is scored, nobody else says where the run's data came from.
    notes = list(run.family.notes) if run.lacks("traits") else []
    return sentences + _unshared_sentences(run, data) + notes


def _summarise(run: Run, data: xr.Dataset, condition: str) -> str:
    """What the numbers of one condition show, in a sentence; means over traits within members."""
    raw, adjusted, specific = (
        _mean(run, data, name, condition) for name in ("alignment", "control_adjusted_alignment", "specific_alignment")
    )
    if run.control(condition) is None:
        return f"{condition}: raw alignment {raw}; there is no control, so nothing says what any such training would have."
    null = _mean(run, data, "alignment_of_control", condition)
    parts = [
        f"raw alignment {raw} ({_sign(raw)}) beside its control's {null}",
        f"control-adjusted {adjusted} ({_sign(adjusted)})",
    ]
    if len(run.traits) > 1:
        others = _mean(run, data, "control_adjusted_alignment_of_other_traits", condition)
        parts[-1] += f", where other traits' students have {others} ({_sign(others)})"
    parts.append(f"specific {specific} ({_sign(specific)})")
    if run.sham(condition) is not None:
        parts[-1] += f", its sham {_mean(run, data, 'sham_alignment', condition)}"
    if len(run.traits) > 1:
        between = _mean(run, data, "specific_alignment_between_traits", condition)
        parts.append(f"specific between traits {between} ({_sign(between)})")
    return f"{condition}: {'; '.join(parts)}."


def _mean(run: Run, data: xr.Dataset, name: str, condition: str) -> Interval:
    values = np.mean([_final(run, data, name, (condition, trait)) for trait in run.traits], axis=0)
    return student_interval(values, run.recipe.verdict.confidence)


def _sign(interval: Interval) -> str:
    if interval.low > 0:
        return "interval over 0"
    return "interval under 0" if interval.high < 0 else "not told from 0"


def _untold_sentences(run: Run) -> list[str]:
    """What has no alignment, and why."""
    sentences = []
    unmoved = [trait for trait in run.traits if run.teacher(trait).last == 0]
    if unmoved:
        sentences.append(
            f"The teachers of {', '.join(unmoved)} were told their trait by a system prompt: their weights did not move, so "
            "there is no displacement to align with."
        )
    other = [name for name in run.conditions if not run.is_comparable(name)]
    if other:
        sentences.append(
            f"Incomparable: students of {', '.join(other)} are of another model than the teachers, so no alignment exists; the "
            f"results hold NaN with that reason. Of {other[0]}: {run.why_incomparable(other[0])}."
        )
    untrained = [name for name in run.conditions if not _is_trained(run, name)]
    if untrained:
        sentences.append(f"Nothing is trained in {', '.join(untrained)}: no displacement, so no alignment.")
    return sentences


def _rounding_sentences(run: Run, data: xr.Dataset) -> list[str]:
    """Displacements that are not far over what rounding in storage alone could give; see `Gram.rounding`."""
    sentences = []
    for condition, trait in product(_comparable(run), run.traits):
        for who, name in (("student", run.student(condition, trait).name), ("teacher", run.teacher(trait).name)):
            norms, floors = (_final(run, data, f"{who}_{what}", (condition, trait)) for what in ("norm", "rounding_floor"))
            close = np.isfinite(norms) & (norms > 0) & (norms < _CLEAR_OF_ROUNDING * floors)
            if close.any():
                ratio = float((norms[close] / floors[close]).min())
                sentences.append(
                    f"Warning: the displacement of {name} is only {ratio:.1f} times what rounding of its stored weights could "
                    f"give (under {_CLEAR_OF_ROUNDING:g} times in {close.sum()} of {len(close)} members): its alignments are "
                    "pulled to 0 by that noise; store checkpoints in float32."
                )
    return list(dict.fromkeys(sentences))


def _unshared_sentences(run: Run, data: xr.Dataset) -> list[str]:
    unshared: dict[str, list[str]] = {}
    for condition in _comparable(run):
        status = np.concatenate([_final_scopes(run, data, "alignment_status", (condition, trait)) for trait in run.traits])
        scopes = [
            str(name)
            for name, codes in zip(data.scope.values, status.T, strict=True)
            if (codes == Missing.NO_SHARED_SUPPORT).all()
        ]
        if scopes:
            unshared.setdefault(", ".join(scopes), []).append(condition)
    return [f"No shared support, so no alignment, in {scopes}: {', '.join(names)}." for scopes, names in unshared.items()]

"""Parameter alignment: did the student's weights move where its teacher's did, more than another's would have?"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from mechsub.analyses.registry import analysis
from mechsub.figures import DATA, Figure, chart_spec
from mechsub.findings import Finding, interval_fields
from mechsub.parameters.alignment import MODEL, SHARED_SUPPORT, ByScope, Combination, DirectionAlgebra, Scopes
from mechsub.parameters.gram import (
    Direction,
    difference_label,
    displacement,
    displacement_difference,
    displacement_label,
    origin_direction,
    origin_label,
    stream_gram,
)
from mechsub.parameters.quantities import QUANTITIES, Case, Quantity
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import student_interval
from mechsub.statistics.permutation import flip_signs
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, Rules, SuperiorityTest, judge_effects

SOURCE = "displacement cosines: Ilharco et al., arXiv:2212.04089; Cloud et al., arXiv:2507.14805, Theorem 1"
_STATUS = ("ok", "zero_displacement", "no_shared_support", "not_run")
OK, ZERO, UNSHARED, NOT_RUN = range(4)
_DIMS = ("condition", "member", "step", "scope")


@analysis
def parameter_alignment(run: Run) -> Result:
    """How far students move along their teacher's displacement, per tensor, layer and model, against another teacher."""
    table = run.lineages["reference"].spec.tensors
    scopes = Scopes.of([name for name, info in table.items() if info.tied_to is None], table)
    anchor = displacement_label("teacher", run.lineages["teacher"].steps[-1])
    algebra = DirectionAlgebra(stream_gram(list_directions(run), dict(table), anchor, device=run.device), scopes)
    steps = sorted({step for name in run.conditions for step in run.lineages[f"student.{name}"].steps})
    data = _measure(run, algebra, steps)
    judgements = _judge(run, data)
    findings = _findings(run, data, judgements) + _norm_findings(run, data)
    return Result(
        data,
        findings,
        [_training_figure(run), _heat_map_figure(run, data), _scope_figure(run, data), _specific_figure(run, data)],
        _sentences(run, data),
    )


def list_directions(run: Run) -> list[Direction]:
    """θ₀, the teachers' last displacements, every student's at every step, their differences, and every other origin."""
    teacher, neutral = run.lineages["teacher"], run.lineages[run.neutral]
    directions = [origin_direction(run.lineages["reference"])]
    directions += [displacement(lineage, lineage.steps[-1]) for lineage in (teacher, neutral)]
    directions.append(displacement_difference(teacher, neutral, teacher.steps[-1]))
    for condition in run.conditions:
        control = run.lineages[f"control.{condition}"]
        for role in ("control", "student", "sham"):
            lineage = run.lineages.get(f"{role}.{condition}")
            if lineage is None:
                continue
            moved = [step for step in lineage.steps if step > 0]
            directions += [displacement(lineage, step) for step in moved]
            if lineage is not control:
                directions += [displacement_difference(lineage, control, step) for step in moved]
            if not lineage.spec.origin.is_reference:
                directions.append(origin_direction(lineage))
    return directions


def _case(run: Run, algebra: DirectionAlgebra, condition: str, step: int) -> Case:
    """The directions of one condition at one step; at step 0 nothing has moved, and they are empty sums."""
    student = run.lineages[f"student.{condition}"]
    control, sham = f"control.{condition}", f"sham.{condition}"
    last = run.lineages["teacher"].steps[-1]

    def when_moved(label: str) -> Combination:
        return {label: 1.0} if step > 0 else {}

    return Case(
        algebra=algebra,
        student=when_moved(displacement_label(student.name, step)),
        control=when_moved(displacement_label(control, step)),
        difference=when_moved(difference_label(student.name, control, step)),
        sham_difference=when_moved(difference_label(sham, control, step)) if sham in run.lineages else None,
        teacher={displacement_label("teacher", last): 1.0},
        neutral={displacement_label(run.neutral, last): 1.0},
        teacher_difference={difference_label("teacher", run.neutral, last): 1.0},
        student_origin={origin_label("reference" if student.spec.origin.is_reference else student.name): 1.0},
        teacher_origin={origin_label("reference"): 1.0},
        partners=student.spec.origin.members,
    )


def _measure(run: Run, algebra: DirectionAlgebra, steps: Sequence[int]) -> xr.Dataset:
    """Every quantity as [condition, member, step, scope], with why a value is NaN."""
    scopes = algebra.scopes
    shape = (len(run.conditions), run.recipe.members, len(steps), len(scopes.names))
    values = {quantity.name: np.full(shape, np.nan) for quantity in QUANTITIES}
    status = {quantity.name: np.full(shape, ZERO, dtype=np.int8) for quantity in QUANTITIES}
    for row, condition in enumerate(run.conditions):
        for column, step in enumerate(steps):
            case = _case(run, algebra, condition, step)
            for quantity in QUANTITIES:
                found = quantity.compute(case)
                if found is None:
                    status[quantity.name][row, :, column] = NOT_RUN
                    continue
                values[quantity.name][row, :, column] = found
                status[quantity.name][row, :, column] = _explain(found, scopes)
        run.report_progress(run.num_checkpoints * (row + 1) // len(run.conditions))
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
        variables[f"{quantity.name}_status"] = status_variable(status[quantity.name], _DIMS, _STATUS, quantity.name)
    spread = scopes.random_cosine_sd()
    variables["random_cosine_sd"] = label_variable(
        spread, ["scope"], description="standard deviation of random directions' cosine", unit="cosine", formula="1/√d"
    )
    variables["random_cosine_sd_status"] = status_variable(
        np.isnan(spread), ["scope"], ("ok", "not_one_set_of_parameters"), "random_cosine_sd"
    )
    coords = {
        "condition": run.conditions,
        "member": np.arange(run.recipe.members),
        "step": list(steps),
        "scope": list(scopes.names),
        "scope_kind": ("scope", list(scopes.kinds)),
    }
    return xr.Dataset(variables, coords=coords)


def _explain(values: ByScope, scopes: Scopes) -> np.ndarray:
    """Why a value is NaN: nothing moved at all, or the two moved nothing in common in this scope."""
    moved = np.isfinite(values[:, scopes.names.index(MODEL)])[:, None]
    return np.where(np.isfinite(values), OK, np.where(moved, UNSHARED, ZERO)).astype(np.int8)


def _final(run: Run, data: xr.Dataset, name: str, condition: str, scope: str = MODEL) -> np.ndarray:
    return _final_scopes(run, data, name, condition)[:, list(data.scope.values).index(scope)]


def _final_scopes(run: Run, data: xr.Dataset, name: str, condition: str) -> np.ndarray:
    """A variable at the student's last step as [member, scope]."""
    found: np.ndarray = data[name].sel(condition=condition, step=run.lineages[f"student.{condition}"].steps[-1]).values
    return found


def _judge(run: Run, data: xr.Dataset) -> dict[tuple[str, str], Judgement]:
    """Verdicts at the last step over the whole model, by (quantity, condition); Holm runs over the conditions."""
    verdict = run.recipe.verdict
    rules = Rules(verdict.alignment_margin, verdict.minimum_members, verdict.confidence, verdict.equivalence_level)
    judgements: dict[tuple[str, str], Judgement] = {}
    for quantity in QUANTITIES:
        if not quantity.judged:
            continue
        effects = {}
        for condition in run.conditions:
            values = _final(run, data, quantity.name, condition)
            if quantity.judged == "paired" and quantity.null:
                values = values - _final(run, data, quantity.null, condition)
            if not _not_run(run, data, quantity.name, condition):
                effects[condition] = values
        swap_test = (
            SuperiorityTest(lambda values: flip_signs(values).p_above, lambda n: 2.0**-n, "sign-flip")
            if quantity.judged == "swap"
            else None
        )
        judged = judge_effects(effects, rules, AGAINST_NULL, swap_test)
        judgements |= {(quantity.name, condition): judgement for condition, judgement in judged.items()}
    return judgements


def _not_run(run: Run, data: xr.Dataset, name: str, condition: str) -> bool:
    return bool((_final(run, data, f"{name}_status", condition) == NOT_RUN).all())


def _findings(run: Run, data: xr.Dataset, judgements: Mapping[tuple[str, str], Judgement]) -> list[Finding]:
    found = []
    for quantity in (quantity for quantity in QUANTITIES if quantity.null_words):
        for condition in run.conditions:
            if _not_run(run, data, quantity.name, condition):
                continue
            judgement = judgements.get((quantity.name, condition))
            scope = "all parameters"
            found.append(_finding(run, data, quantity, condition, MODEL, scope, judgement))
            if quantity.name == "alignment":
                found.append(_finding(run, data, quantity, condition, SHARED_SUPPORT, "tensors that both moved", None))
    return found


def _finding(
    run: Run,
    data: xr.Dataset,
    quantity: Quantity,
    condition: str,
    scope: str,
    scope_words: str,
    judgement: Judgement | None,
) -> Finding:
    confidence = run.recipe.verdict.confidence
    values = _final(run, data, quantity.name, condition, scope)
    if quantity.null is not None:
        against = student_interval(_final(run, data, quantity.null, condition, scope), confidence)
        null_low, null_high = against.low, against.high
    else:
        swapped = flip_signs(values, confidence)
        null_low, null_high = swapped.null_low, swapped.null_high
    reason = "the verdict is given over all parameters" if quantity.judged else quantity.why_unjudged
    if judgement is not None:
        reason = f"difference from the null {judgement.interval}: {judgement.reason}"
    return Finding(
        analysis="parameter_alignment",
        quantity=quantity.name,
        condition=condition,
        trait=next(iter(run.family.traits)),
        context="parameters",
        step=run.lineages[f"student.{condition}"].steps[-1],
        scope=scope_words,
        unit=quantity.unit,
        null=quantity.null_words,
        null_low=null_low,
        null_high=null_high,
        num_references=run.recipe.members,
        verdict=judgement.verdict if judgement else "",
        reason=reason,
        rule=f"Of the difference from the null. {judgement.rule}" if judgement else "",
        margin=run.recipe.verdict.alignment_margin if judgement else float("nan"),
        formula=quantity.formula,
        source=SOURCE,
        **interval_fields(student_interval(values, confidence)),
    )


def _norm_findings(run: Run, data: xr.Dataset) -> list[Finding]:
    """Whether the neutral teacher moved as far as the teacher: a control that moved less is a weaker one."""
    condition = run.conditions[0]
    ratio = _final(run, data, "neutral_norm", condition) / _final(run, data, "teacher_norm", condition)
    return [
        Finding(
            analysis="parameter_alignment",
            quantity="neutral_norm_ratio",
            condition="",
            trait=next(iter(run.family.traits)),
            context="parameters",
            step=run.lineages[run.neutral].steps[-1],
            scope="all parameters",
            unit="ratio",
            null="none: it describes the control; near 1 it moved as far as the teacher",
            null_low=float("nan"),
            null_high=float("nan"),
            num_references=run.recipe.members,
            verdict="",
            reason="a description of the neutral teacher, not a claim",
            rule="",
            margin=float("nan"),
            formula="‖Δ_N‖ / ‖Δ_T‖",
            source=SOURCE,
            **interval_fields(student_interval(ratio, run.recipe.verdict.confidence)),
        )
    ]


def _long_form(names: Mapping[str, str]) -> alt.Chart:
    """The variables ``names`` as rows of one column ``cosine``, with who they belong to in ``who``; missing ones dropped."""
    return (
        alt.Chart(DATA)
        .transform_fold(list(names), as_=["which", "cosine"])
        .transform_filter("isValid(datum.cosine)")
        .transform_calculate(who=f"{json.dumps(dict(names), ensure_ascii=False)}[datum.which]")
    )


def _who(names: Mapping[str, str]) -> alt.Color:
    return alt.Color("who:N", sort=list(names.values()), title=None)


_STUDENT_AND_NULL = {"alignment": "student", "alignment_of_control": "control (null)"}
_BAR = alt.Legend(orient="top", gradientLength=180, gradientThickness=10)
_ZERO = alt.Chart(DATA).mark_rule(strokeDash=[2, 3], color="#94a3b8")


def _training_figure(run: Run) -> Figure:
    chart, color = _long_form(_STUDENT_AND_NULL), _who(_STUDENT_AND_NULL)
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(grid=False))
    y = alt.Y("cosine:Q", title="cos(Δ, Δ_T)")
    members = chart.mark_line(opacity=0.25, strokeWidth=1).encode(x=x, y=y, detail="member:N", color=color)
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
            f"cos(Δ_S, Δ_T) over all parameters, no unit, against cos(Δ_C, Δ_T) of its control, a student of {run.neutral} "
            f"from the same start (the null). Thin lines are members (n = {run.recipe.members}), thick ones their mean. "
            "Between the blue lines lie 95 % of random directions (±2/√d): a line to read by, not the null."
        ),
        variables=("alignment", "alignment_of_control", "random_cosine_sd"),
        spec=chart_spec(facets),
        select={"scope": [MODEL]},
        headline=True,
    )


def _heat_map_figure(run: Run, data: xr.Dataset) -> Figure:
    chart = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.alignment) && isValid(datum.alignment_of_control)")
        .transform_calculate(difference="datum.alignment - datum.alignment_of_control")
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="optimizer step", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("scope:N", sort=list(map(str, data.scope.values)), title=None),
            color=alt.Color(
                "mean(difference):Q", title="cos − its null", scale=alt.Scale(scheme="blueorange", domainMid=0), legend=_BAR
            ),
            tooltip=["scope:N", "step:O", alt.Tooltip("mean(difference):Q", format=".3f", title="cos − its null")],
        )
        .properties(width=165, height=alt.Step(16))
    )
    return Figure(
        name="alignment_heat_map",
        title="Layer by step: where and when the alignment rises over its null",
        caption=(
            f"cos(Δ_S, Δ_T) − cos(Δ_C, Δ_T), no unit, mean over members (n = {run.recipe.members}), of every tensor and layer, "
            "the model and the shared support, at every checkpoint after the start. The null, the control's cosine, is "
            "subtracted from each member's own. In an empty cell student and teacher moved nothing together."
        ),
        variables=("alignment", "alignment_of_control"),
        spec=chart_spec(chart.facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)),
    )


def _scope_figure(run: Run, data: xr.Dataset) -> Figure:
    dots = (
        _long_form(_STUDENT_AND_NULL)
        .mark_circle(size=22, opacity=0.5)
        .encode(
            x=alt.X("cosine:Q", title="cos(Δ, Δ_T)"),
            y=alt.Y("scope:N", sort=list(map(str, data.scope.values)), title=None),
            color=_who(_STUDENT_AND_NULL),
            tooltip=["scope:N", "member:O", alt.Tooltip("cosine:Q", format=".3f")],
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
        title="Where the alignment lies: every tensor, layer and the whole model",
        caption=(
            f"cos(Δ_S, Δ_T), no unit, at the last step; each dot is one member (n = {run.recipe.members}); the null is its "
            "control. A scope without dots has no shared support: student and teacher moved no tensor of it together. Random "
            f"directions of all parameters would scatter about 0 with a standard deviation of 1/√d = {spread:.4f}: a line to "
            "read by, not the null."
        ),
        variables=("alignment", "alignment_of_control"),
        spec=chart_spec(facets),
        select={"step": [int(data.step.values[-1])]},
    )


def _specific_figure(run: Run, data: xr.Dataset) -> Figure:
    names = {"specific_alignment": "student − control", "sham_alignment": "control − control"}
    dots = (
        _long_form(names)
        .mark_circle(size=40, opacity=0.55)
        .encode(
            x=alt.X("cosine:Q", title="cos(θ_S − θ_C, Δ_T − Δ_N)"),
            y=alt.Y("condition:N", sort=run.conditions, title=None),
            yOffset=alt.YOffset("who:N", sort=list(names.values())),
            color=_who(names),
            tooltip=["condition:N", "who:N", "member:O", alt.Tooltip("cosine:Q", format=".3f")],
        )
    )
    return Figure(
        name="specific_alignment",
        title="Specific alignment: does the student lean to its own teacher rather than to another?",
        caption=(
            "cos(θ_S − θ_C, Δ_T − Δ_N) over all parameters at the last step, no unit; each dot is one member "
            f"(n = {run.recipe.members}). Its null is 0: students who could swap teachers would scatter about it, as two "
            "controls in the students' places (the sham) should."
        ),
        variables=tuple(names),
        spec=chart_spec(alt.layer(_ZERO.encode(x=alt.datum(0)), dots, data=DATA).properties(width=640, height=alt.Step(16))),
        select={"scope": [MODEL], "step": [int(data.step.values[-1])]},
    )


def _sentences(run: Run, data: xr.Dataset) -> list[str]:
    sentences = []
    for condition in run.conditions:
        if not run.lineages[f"student.{condition}"].spec.origin.only_permuted:
            continue
        interval = student_interval(_final(run, data, "alignment", condition), run.recipe.verdict.confidence)
        sentences.append(
            f"{condition} has alignment {interval}: its students "
            "start as the same function that their teacher started as, but with the hidden units stored in another order, so "
            "that the same change of the function is a change of other weights, and a cosine compares weight by weight; a low "
            "alignment there says nothing against a transfer."
        )
    unshared: dict[str, list[str]] = {}
    for condition in run.conditions:
        status = _final_scopes(run, data, "alignment_status", condition)
        scopes = [str(name) for name, codes in zip(data.scope.values, status.T, strict=True) if (codes == UNSHARED).all()]
        if scopes:
            unshared.setdefault(", ".join(scopes), []).append(condition)
    sentences += [
        f"No shared support, so no alignment, in {scopes}: {', '.join(conditions)}." for scopes, conditions in unshared.items()
    ]
    return sentences

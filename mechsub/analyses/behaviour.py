"""Behaviour: did the student take the trait, against its own control?"""

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from mechsub.analyses.registry import analysis
from mechsub.families.config import VerdictConfig
from mechsub.figures import DATA, Figure, chart_spec, diverging_scale
from mechsub.findings import Finding, interval_fields
from mechsub.lineages import Lineage
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.diagonal import EXCESS_FORMULA, MINIMUM_TRAITS, diagonal_excess, permute_taught, permute_traits
from mechsub.statistics.intervals import Interval, format_number, student_interval
from mechsub.statistics.verdicts import (
    TRANSFER,
    Judgement,
    Rules,
    judge_effects,
    void_without_control,
    void_without_trait,
)

SOURCE = "Cloud et al., arXiv:2507.14805"
EFFECT = "score(student) − score(control), member by member, at the last step"
SCORE = "trait_score"
_STATUS = ("ok", "not_recorded_at_this_step", "not_measured")
_FEW = ("ok", "one_member_has_no_interval", "no_member_has_a_value")
_ROLES = ("student", "control")

Case = tuple[str, str]
"""A condition and the trait of the student's teacher."""


@analysis(needs=("traits",))
def behaviour(run: Run) -> Result:
    """The trait score of every lineage, member and checkpoint, and the verdict of every condition."""
    scores = _Scores(run, _score_lineages(run))
    effects = {case: scores.effect(case) for case in scores.cases}
    teachers = _judge_teachers(scores)
    judged = judge_effects(effects, _rules(run.recipe.verdict), TRANSFER)
    judgements = {case: _void(scores, case, teachers[case[1]], judgement) for case, judgement in judged.items()}
    excesses = _judge_excess(scores, teachers)
    data = scores.data.assign(_summary_variables(scores, judgements))
    findings = [finding for case in scores.cases for finding in _findings(scores, case, judgements[case])]
    findings += [_excess_finding(scores, condition, judged) for condition, judged in excesses.items()]
    return Result(data, findings, _figures(run, data), _sentences(scores, judgements, excesses))


def _score_lineages(run: Run) -> xr.Dataset:
    """Every measure as [lineage, member, step, trait, context]; steps are the union over lineages."""
    family, lineages = run.family, list(run.lineages.values())
    steps = sorted({step for lineage in lineages for step in lineage.steps})
    traits, contexts = list(family.traits), list(family.contexts)
    shape = (len(lineages), run.recipe.members, len(steps), len(traits), len(contexts))
    scores = {name: np.full(shape, np.nan) for name in family.measures}
    done = 0
    for row, lineage in enumerate(lineages):
        for step in lineage.steps:
            for member in range(run.recipe.members):
                found = family.trait_score(family.load_model(lineage, step, member), lineage, member)
                for name, values in found.items():
                    scores[name][row, member, steps.index(step)] = values
            done += 1
            run.report_progress(done)
    dims = ("lineage", "member", "step", "trait", "context")
    recorded = np.array([[step in lineage.steps for step in steps] for lineage in lineages])[:, None, :, None, None]
    variables: dict[str, Any] = {}
    for name, measure in family.measures.items():
        variables[name] = label_variable(scores[name], dims, description=measure.description, unit=measure.unit, source=SOURCE)
        why = np.where(np.isfinite(scores[name]), 0, np.where(np.broadcast_to(recorded, shape), 2, 1))
        variables[f"{name}_status"] = status_variable(why, dims, _STATUS, name)
    return xr.Dataset(
        variables,
        coords={
            "lineage": [lineage.name for lineage in lineages],
            "lineage_role": ("lineage", [lineage.spec.role for lineage in lineages]),
            "lineage_condition": ("lineage", [lineage.spec.condition or "" for lineage in lineages]),
            "lineage_taught": ("lineage", [lineage.spec.trait or "" for lineage in lineages]),
            "member": np.arange(run.recipe.members),
            "step": steps,
            "trait": traits,
            "context": contexts,
            "context_description": ("context", list(family.contexts.values())),
        },
    )


class _Scores:
    """The scores at every lineage's own last step, by the names that the verdicts use."""

    def __init__(self, run: Run, data: xr.Dataset) -> None:
        self.run, self.data = run, data
        self.cases: list[Case] = [(condition, trait) for condition in run.conditions for trait in run.traits]
        self.contexts = [str(name) for name in data.context.values]

    @property
    def unit(self) -> str:
        """Of the trait score."""
        return self.run.family.measures[SCORE].unit

    def final(self, lineage: Lineage | None, trait: str, context: str | None = None, measure: str = SCORE) -> np.ndarray:
        """One trait in one context, member by member; the first context unless told. NaN where there is no such lineage."""
        if lineage is None:
            return np.full(len(self.data.member), np.nan)
        chosen = self.data[measure].sel(
            lineage=lineage.name, step=lineage.last, trait=trait, context=context or self.contexts[0]
        )
        values: np.ndarray = chosen.values
        return values

    def of(self, case: Case) -> dict[str, Lineage | None]:
        """The student and the control of a case."""
        condition, trait = case
        return {"student": self.run.student(condition, trait), "control": self.run.control(condition)}

    def effect(self, case: Case, context: str | None = None, on: str | None = None) -> np.ndarray:
        """Student − control, member by member, on the case's own trait unless told."""
        scores = {role: self.final(lineage, on or case[1], context) for role, lineage in self.of(case).items()}
        difference: np.ndarray = scores["student"] - scores["control"]
        return difference

    def matrix(self, condition: str) -> np.ndarray:
        """The effects of a condition as [member, taught trait, scored trait]."""
        traits = self.run.traits
        return np.stack([[self.effect((condition, taught), on=trait) for trait in traits] for taught in traits]).transpose(
            2, 0, 1
        )

    def interval(self, values: np.ndarray) -> Interval:
        """Over members, at the recipe's confidence."""
        return student_interval(values, self.run.recipe.verdict.confidence)


def _judge_teachers(scores: _Scores) -> dict[str, Judgement]:
    """Whether the teachers have a trait to pass on: their own gain over the references must be over the margin."""
    run = scores.run
    gains = {trait: scores.final(run.teacher(trait), trait) - scores.final(run.reference, trait) for trait in run.traits}
    return judge_effects(gains, _rules(run.recipe.verdict), TRANSFER)


def _void(scores: _Scores, case: Case, teacher: Judgement, judgement: Judgement) -> Judgement:
    """No verdict where there is no control, or where the teachers have nothing to pass on."""
    if scores.run.control(case[0]) is None:
        return void_without_control(judgement)
    return void_without_trait(teacher, judgement)


def _judge_excess(scores: _Scores, teachers: Mapping[str, Judgement]) -> dict[str, Judgement]:
    """The diagonal excess of every condition, where the run has several traits and does not decline it."""
    wanted = scores.run.recipe.verdict.diagonal_excess
    if len(scores.run.traits) < 2 or wanted is False:
        return {}
    controlled = [name for name in scores.run.conditions if scores.run.control(name) is not None]
    excesses = {name: diagonal_excess(scores.matrix(name)) for name in controlled}
    weakest = min(teachers.values(), key=lambda judged: judged.interval.estimate)
    judged = judge_effects(excesses, _rules(scores.run.recipe.verdict), TRANSFER)
    return {name: void_without_trait(weakest, judgement) for name, judgement in judged.items()}


def _rules(verdict: VerdictConfig) -> Rules:
    return Rules(verdict.margin, verdict.minimum_members, verdict.confidence, verdict.equivalence_level)


def _summary_variables(scores: _Scores, judgements: Mapping[Case, Judgement]) -> dict[str, xr.DataArray]:
    """Last-step scores by condition, taught trait and role, and their effects with intervals."""
    run, unit, names, traits = scores.run, scores.unit, scores.run.conditions, scores.run.traits
    coords: dict[str, Any] = {
        "condition": names, "taught": traits, "role": list(_ROLES), "member": scores.data.member,
        "context": scores.contexts, "trait": scores.data.trait,
    }  # fmt: skip

    def variable(dims: list[str], value: Any, description: str, formula: str = "") -> xr.DataArray:
        labelled = label_variable(value, dims, description=description, unit=unit, formula=formula)
        return xr.DataArray(labelled, {dim: coords[dim] for dim in dims})

    def by_case(value: Any) -> list[list[Any]]:
        return [[value((name, trait)) for trait in traits] for name in names]

    interval = {case: judgement.interval for case, judgement in judgements.items()}
    few_members = by_case(lambda case: {0: 2, 1: 1}.get(interval[case].n, 0))
    found = {
        "condition_difference": xr.DataArray(
            np.array([run.describe_condition(name) for name in names], dtype=object), {"condition": names}
        ),
        "final_score": variable(
            ["condition", "taught", "role", "member"],
            by_case(lambda case: [scores.final(lineage, case[1]) for lineage in scores.of(case).values()]),
            "the teacher's trait at the last step",
        ),
        "final_score_in_context": variable(
            ["condition", "taught", "context", "role", "member"],
            by_case(lambda case: [
                [scores.final(lineage, case[1], context) for lineage in scores.of(case).values()] for context in scores.contexts
            ]),
            "the teacher's trait at the last step, in every context",
        ),
        "effect": variable(
            ["condition", "taught", "context", "member"],
            by_case(lambda case: [scores.effect(case, context) for context in scores.contexts]), "effect", EFFECT,
        ),
        "effect_on": variable(
            ["condition", "taught", "trait", "member"],
            by_case(lambda case: [scores.effect(case, on=str(trait)) for trait in scores.data.trait.values]),
            "effect on every trait, in the first context", EFFECT,
        ),
        **{
            f"{role}_mean": variable(
                ["taught"],
                [scores.final(lineage(trait), trait).mean() for trait in traits],
                f"mean of the {role}s at the last step",
            )
            for role, lineage in (("reference", lambda trait: run.reference), ("teacher", run.teacher))
        },
        "effect_mean": variable(
            ["condition", "taught"], by_case(lambda case: interval[case].estimate), "mean effect over members", EFFECT
        ),
    }  # fmt: skip
    for side in ("low", "high"):
        bounds = by_case(lambda case, side=side: getattr(interval[case], side))
        found[f"effect_{side}"] = variable(["condition", "taught"], bounds, f"bound of its interval: {side}")
        found[f"effect_{side}_status"] = xr.DataArray(
            status_variable(few_members, ["condition", "taught"], _FEW, f"effect_{side}"),
            {"condition": names, "taught": traits},
        )
    for name, scored in list(found.items()):
        missing = scored.dtype.kind == "f" and scored.isnull()
        if f"{name}_status" not in found and np.any(missing):  # a judge abstained from every answer
            status = status_variable(np.where(missing, 2, 0), [str(dim) for dim in scored.dims], _STATUS, name)
            found[f"{name}_status"] = xr.DataArray(status, scored.coords)
    return found


def _findings(scores: _Scores, case: Case, judgement: Judgement) -> list[Finding]:
    """The student's score beside its control's, their difference with the verdict, the gain, and the effect out of context."""
    run, control = scores.run, scores.run.control(case[0])
    student = run.student(*case)
    common = _common(scores, case) | {"step": student.last}
    score = _described(
        scores.interval(scores.final(student, case[1])),
        common,
        quantity=SCORE,
        null=_control_words(run, case[0]),
        null_interval=scores.interval(scores.final(control, case[1])),
        reason="the verdict stands on the effect, which is paired",
        formula="mean over members at the last step",
    )
    effect = Finding(
        quantity="effect",
        null="no effect: the student scores as its own control does",
        null_low=0.0,
        null_high=0.0,
        verdict=judgement.verdict,
        reason=judgement.reason,
        rule=judgement.rule,
        formula=EFFECT,
        **interval_fields(judgement.interval),
        **common,
    )
    gain = _described(
        scores.interval(scores.final(student, case[1]) - _origin_scores(scores, student, case[1])),
        common,
        quantity="gain_over_start",
        null="none: an untouched start is no control, since nothing trained it",
        reason="a description; it differs from the effect by how far the control moved from its start",
        formula="score(student) at the last step − score(student) at its start",
    )
    return [score, effect, gain, *_other_contexts(scores, case, common), *_other_measures(scores, case, common)]


def _other_contexts(scores: _Scores, case: Case, common: dict[str, Any]) -> list[Finding]:
    return [
        _described(
            scores.interval(scores.effect(case, context)),
            common | {"context": _context(scores, context)},
            quantity="effect",
            null="no effect: the student scores as its own control does",
            null_interval=Interval(0.0, 0.0, 0.0, 0, 0.0),
            reason="the verdict is given in the first context; this one stands beside it",
            formula=EFFECT,
        )
        for context in scores.contexts[1:]
    ]


def _other_measures(scores: _Scores, case: Case, common: dict[str, Any]) -> list[Finding]:
    student, control = scores.run.student(*case), scores.run.control(case[0])
    return [
        _described(
            scores.interval(scores.final(student, case[1], measure=name)),
            common | {"unit": measure.unit},
            quantity=name,
            null=_control_words(scores.run, case[0]),
            null_interval=scores.interval(scores.final(control, case[1], measure=name)),
            reason=f"the verdict stands on the trait score; this is its {measure.unit}",
            formula=measure.description,
        )
        for name, measure in scores.run.family.measures.items()
        if name != SCORE and np.isfinite(scores.final(student, case[1], measure=name)).any()
    ]


def _control_words(run: Run, condition: str) -> str:
    control = run.control(condition)
    return "none: no control was given" if control is None else f"its control, the same student of {run.neutral_name}"


def _excess_finding(scores: _Scores, condition: str, judgement: Judgement) -> Finding:
    matrix, confidence = scores.matrix(condition), scores.run.recipe.verdict.confidence
    swapped, general = permute_taught(matrix, confidence), permute_traits(matrix, confidence)
    traits = ", ".join(scores.run.traits)
    wider = f"p = {general.p_above:.2g}" if np.isfinite(general.p_above) else general.reason
    fields = _common(scores, (condition, "")) | {"trait": "all", "step": _last_step(scores.run, condition)}
    return Finding(
        quantity="diagonal_excess",
        null="students of one member who could swap teachers: taught labels permuted within members",
        null_low=swapped.null_low,
        null_high=swapped.null_high,
        verdict=judgement.verdict,
        reason=f"{judgement.reason}; permutation p = {swapped.p_above:.2g}: a claim about {traits}; "
        f"about traits in general {wider}",
        rule=judgement.rule,
        formula=EXCESS_FORMULA,
        **interval_fields(judgement.interval),
        **fields,
    )


def _last_step(run: Run, condition: str) -> int:
    return max(run.student(condition, trait).last for trait in run.traits)


def _no_wider_claim(scores: _Scores) -> str:
    few = len(scores.run.traits) < MINIMUM_TRAITS
    return f"; a claim about traits in general needs at least {MINIMUM_TRAITS} of them" if few else ""


def _described(
    interval: Interval, common: Mapping[str, Any], *, null_interval: Interval | None = None, **fields: Any
) -> Finding:
    """A finding without a verdict of its own; its ``reason`` says why."""
    low, high = (null_interval.low, null_interval.high) if null_interval else (np.nan, np.nan)
    unjudged = {"verdict": "", "rule": "", "margin": np.nan, "null_low": low, "null_high": high}
    return Finding(**{**common, **fields, **unjudged, **interval_fields(interval)})


def _common(scores: _Scores, case: Case) -> dict[str, Any]:
    return {
        "analysis": "behaviour",
        "condition": case[0],
        "trait": case[1],
        "context": _context(scores, scores.contexts[0]),
        "scope": "model output",
        "unit": scores.unit,
        "num_references": scores.run.recipe.num_references(case[0]),
        "margin": scores.run.recipe.verdict.margin,
        "source": SOURCE,
    }


def _context(scores: _Scores, name: str) -> str:
    described = scores.run.family.contexts[name]
    return described if described.endswith(name) else f"{name}: {described}"


def _origin_scores(scores: _Scores, lineage: Lineage, trait: str) -> np.ndarray:
    """The scores of where a lineage's members start, without what stands in the lineage's prompts."""
    if lineage.last == 0:
        return scores.final(scores.run.reference_of(lineage), trait)[list(lineage.spec.origin.members)]
    begun: np.ndarray = scores.data[SCORE].sel(lineage=lineage.name, step=0, trait=trait, context=scores.contexts[0]).values
    return begun


def _sentences(scores: _Scores, judgements: Mapping[Case, Judgement], excesses: Mapping[str, Judgement]) -> list[str]:
    run = scores.run
    traits = run.traits
    several = len(traits) > 1
    sentences = []
    for trait in traits:
        who_scores = {"References": run.reference, "teachers": run.teacher(trait), "neutral teachers": run.neutral}
        means = {
            who: _say_mean(scores, scores.final(lineage, trait)) for who, lineage in who_scores.items() if lineage is not None
        }
        listed = ", ".join(f"{who} {interval}" for who, interval in means.items())
        sentences.append(f"{f'On {trait}: ' if several else ''}{listed} ({scores.unit}).")
    others = [str(name) for name in scores.data.trait.values if name not in traits]
    sentences += [
        f"Neutral teachers score {format_number(float(scores.final(run.neutral, name).mean()))} at {run.family.traits[name]}."
        for name in others
        if run.neutral is not None
    ]
    sentences += _lowered_controls(scores)
    sentences += _context_sentences(scores)
    sentences += [
        f"{condition}: students lean to their own trait rather than to the others by {judged.interval} ({scores.unit}; "
        f"{judged.verdict}){_no_wider_claim(scores)}."
        for condition, judged in excesses.items()
    ]
    over = f"{len(judgements)} {'pairs of condition and trait' if several else 'conditions'}"
    sentences.append(f"Holm's correction runs over the {over}; intervals are not widened by it.")
    sentences += run.family.notes
    if run.missing_conditions:
        sentences.append(f"Not finished, so not judged: {', '.join(run.missing_conditions)}.")
    return sentences


def _say_mean(scores: _Scores, values: np.ndarray) -> str:
    """The mean with its interval; members that share one model have none."""
    if len(values) > 1 and np.ptp(values) == 0:
        return f"{format_number(float(values[0]))} (one for all members)"
    return str(scores.interval(values))


def _lowered_controls(scores: _Scores) -> list[str]:
    margin = scores.run.recipe.verdict.margin
    below = []
    for condition, trait in scores.cases:
        control = scores.run.control(condition)
        if control is None:
            continue
        fall = scores.interval(_origin_scores(scores, control, trait) - scores.final(control, trait))
        if fall.estimate > margin:
            below.append(f"{condition}{f' on {trait}' if len(scores.run.traits) > 1 else ''} {fall}")
    if not below:
        return []
    return [
        "A control moves too, by what any training on such a carrier does and by its neutral teacher. Where that puts it more "
        "than the margin under where it starts, the effect exceeds the gain over the start "
        f"(`gain_over_start`) by as much: {', '.join(below)}."
    ]


def _context_sentences(scores: _Scores) -> list[str]:
    """The effect in every context, side by side."""
    if len(scores.contexts) < 2:
        return []
    sentences = []
    for condition in scores.run.conditions:
        by_context = [
            scores.interval(np.mean([scores.effect((condition, trait), context) for trait in scores.run.traits], axis=0))
            for context in scores.contexts
        ]
        listed = "; ".join(f"{context}: {interval}" for context, interval in zip(scores.contexts, by_context, strict=True))
        sentences.append(f"Effect of {condition} by context, mean over traits: {listed}.")
    return sentences


def _figures(run: Run, data: xr.Dataset) -> list[Figure]:
    figures = [_members_figure(run), _training_figure(run, data)]
    if len(run.family.contexts) > 1:
        figures.append(_context_figure(run))
    if len(run.traits) > 1:
        figures.append(_matrix_figure(run, data))
    return figures


def _members_figure(run: Run) -> Figure:
    measure, several = run.family.measures[SCORE], len(run.traits) > 1
    scale = alt.Scale(domain=list(measure.range)) if measure.range else alt.Scale(zero=False)
    base = alt.Chart(DATA).encode(
        x=alt.X("final_score:Q", title=f"trait score ({measure.unit})", scale=scale),
        y=alt.Y("condition:N", sort=run.conditions, title=None, axis=alt.Axis(labelFontSize=13, labelFontWeight="bold")),
        yOffset=alt.YOffset("role:N", sort=list(_ROLES)),
        color=alt.Color("role:N", sort=list(_ROLES), title=None),
    )
    lines = [
        alt.Chart(DATA).mark_rule(strokeDash=dash, color="#94a3b8").encode(x=f"mean({name}):Q")
        for name, dash in (("reference_mean", [1, 3]), ("teacher_mean", [6, 3]))
    ]
    members = base.mark_circle(size=45, opacity=0.5).encode(
        tooltip=["condition:N", "taught:N", "role:N", "member:O", alt.Tooltip("final_score:Q", format=".3f")]
    )
    mean = base.mark_tick(thickness=3, size=16).encode(x="mean(final_score):Q")
    layers = alt.layer(*lines, members, mean, data=DATA)
    chart = layers.properties(width=400, height=alt.Step(17))
    if several:
        width = max(120, 420 // len(run.traits))
        chart = layers.properties(width=width, height=alt.Step(17)).facet(
            facet=alt.Facet("taught:N", sort=run.traits, title=None), columns=5
        )
    return Figure(
        name="members",
        title="Every member's trait score: a student's row over its control's",
        caption=(
            f"Score ({measure.unit}: {measure.description}) at the last step; {_first_context(run)}. Each dot is one member "
            f"(n = {run.recipe.members}), the bar their mean; dotted line: the mean of the teachers' references, "
            "dashed line: of the teachers. "
            f"A control differs from its student in nothing but its teacher, {run.neutral_name}: it is the null."
        ),
        variables=("final_score", "reference_mean", "teacher_mean"),
        spec=chart_spec(chart),
        headline=True,
    )


def _training_figure(run: Run, data: xr.Dataset) -> Figure:
    chart = alt.Chart(DATA).transform_filter("isValid(datum.trait_score)")
    if len(run.traits) > 1:  # a student on its own trait, the one control of a condition on each of them
        chart = chart.transform_filter("datum.lineage_taught == '' || datum.lineage_taught == datum.trait")
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="symlog"), axis=alt.Axis(grid=False))
    y = alt.Y("trait_score:Q", title="trait score", scale=alt.Scale(zero=False))
    color = alt.Color("lineage_role:N", sort=list(_ROLES), title=None)
    members = chart.mark_line(opacity=0.25, strokeWidth=1).encode(x=x, y=y, detail=["member:N", "trait:N"], color=color)
    mean = chart.mark_line(strokeWidth=2.5).encode(x=x, y="mean(trait_score):Q", color=color)
    layers = alt.layer(members, mean, data=DATA)
    condition = alt.Facet("lineage_condition:N", sort=run.conditions, title=None)
    if len(run.traits) > 1:
        facets = layers.properties(width=195, height=120).facet(
            row=alt.Row("trait:N", sort=run.traits, title=None),
            column=alt.Column("lineage_condition:N", sort=run.conditions, title=None),
        )
    else:
        facets = layers.properties(width=195, height=140).facet(facet=condition, columns=4)
    students = [lineage.name for lineage in run.lineages.values() if lineage.spec.role in _ROLES]
    trained = [name for name in students if len(run.lineages[name].steps) > 1]
    return Figure(
        name="training",
        title="The trait score along training",
        caption=(
            f"Score ({run.family.measures[SCORE].unit}), {_first_context(run)}. Thin lines are members "
            f"(n = {run.recipe.members}), thick ones their mean; the control is the null. "
            "The step axis is symmetric-logarithmic, so that it holds step 0."
        ),
        variables=(SCORE,),
        spec=chart_spec(facets),
        select={"lineage": trained or students, "trait": run.traits, "context": [str(data.context.values[0])]},
    )


def _context_figure(run: Run) -> Figure:
    contexts = list(run.family.contexts)
    base = alt.Chart(DATA).encode(
        x=alt.X("final_score_in_context:Q", title=run.family.measures[SCORE].unit, scale=alt.Scale(zero=False)),
        y=alt.Y("condition:N", sort=run.conditions, title=None),
        yOffset=alt.YOffset("role:N", sort=list(_ROLES)),
        color=alt.Color("role:N", sort=list(_ROLES), title=None),
    )
    dots = base.mark_circle(size=30, opacity=0.5).encode(
        tooltip=["condition:N", "taught:N", "role:N", "member:O", alt.Tooltip("final_score_in_context:Q", format=".2f")]
    )
    mean = base.mark_tick(thickness=3, size=14).encode(x="mean(final_score_in_context):Q")
    chart = (
        alt.layer(dots, mean, data=DATA)
        .properties(width=330, height=alt.Step(14))
        .facet(facet=alt.Facet("context:N", sort=contexts, title=None), columns=2)
    )
    described = "; ".join(f"{name}: {words}" for name, words in run.family.contexts.items())
    return Figure(
        name="contexts",
        title="In and out of the training context, on held-out and on trained questions",
        caption=(
            f"The taught trait's score ({run.family.measures[SCORE].unit}) at the last step, all traits together; each dot is "
            f"one member and trait (n = {run.recipe.members} members), the bar their mean; the control is the null. "
            f"{described}."
        ),
        variables=("final_score_in_context",),
        spec=chart_spec(chart),
    )


def _matrix_figure(run: Run, data: xr.Dataset) -> Figure:
    chart = (
        alt.Chart(DATA)
        .mark_rect()
        .encode(
            x=alt.X("trait:N", sort=run.traits, title="scored trait", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("taught:N", sort=run.traits, title="teacher's trait"),
            color=alt.Color(
                "mean(effect_on):Q",
                title=f"effect ({run.family.measures[SCORE].unit})",
                scale=diverging_scale(data.effect_on.mean("member").values),
                legend=alt.Legend(orient="top", gradientLength=180, gradientThickness=10),
            ),
            tooltip=["condition:N", "taught:N", "trait:N", alt.Tooltip("mean(effect_on):Q", format=".2f")],
        )
        .properties(width=34 * len(run.traits), height=26 * len(run.traits))
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=5)
    )
    return Figure(
        name="trait_matrix",
        title="Every trait in every student: the diagonal is the own trait, the rest is its null",
        caption=(
            f"Student − control ({run.family.measures[SCORE].unit}) at the last step, mean over members (n = "
            f"{run.recipe.members}); {_first_context(run)}. Off-diagonals are not zero where traits share directions: the "
            f"diagonal excess, {EXCESS_FORMULA}, sets the diagonal against them."
        ),
        variables=("effect_on",),
        spec=chart_spec(chart),
        select={"trait": run.traits},
    )


def _first_context(run: Run) -> str:
    name, described = next(iter(run.family.contexts.items()))
    return described if len(run.family.contexts) == 1 else f"{name} ({described})"

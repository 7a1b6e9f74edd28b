"""Behaviour: did the student take the trait, against its own control?"""

from dataclasses import replace
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from mechsub.analyses.registry import analysis
from mechsub.figures import DATA, Figure, chart_spec
from mechsub.findings import Finding, interval_fields
from mechsub.recipe import VerdictConfig
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import student_interval
from mechsub.statistics.verdicts import TRANSFER, Judgement, Rules, judge_effects

SOURCE = "Cloud et al., arXiv:2507.14805"
EFFECT = "score(student) − score(control), member by member, at the last step"
WITHOUT_TRAIT = "teacher-without-trait"
_STATUS = ("ok", "not_recorded_at_this_step")
_ROLES = ("student", "control")


@analysis
def behaviour(run: Run) -> Result:
    """The trait score of every lineage, member and checkpoint, and the verdict of every condition."""
    data = _score_lineages(run)
    effects = _final_effects(run, data)
    judgements = judge_effects({name: effects[name] for name in run.conditions}, _rules(run.recipe.verdict), TRANSFER)
    judgements = _void_without_trait(run, data, judgements)
    data = data.assign(_summary_variables(run, data, effects, judgements))
    findings = [finding for name, judged in judgements.items() for finding in _findings(run, data, name, judged)]
    return Result(data, findings, [_members_figure(run, data), _training_figure(run)], _sentences(run, data, judgements))


def _score_lineages(run: Run) -> xr.Dataset:
    """trait_score[lineage, member, step, trait]; steps are the union over lineages."""
    steps = sorted({step for lineage in run.lineages.values() for step in lineage.steps})
    traits = list(run.family.traits)
    num_members = run.recipe.members
    scores = np.full((len(run.lineages), num_members, len(steps), len(traits)), np.nan)
    done = 0
    for row, lineage in enumerate(run.lineages.values()):
        for step in lineage.steps:
            for member in range(num_members):
                found = run.family.trait_score(run.family.load_model(lineage, step, member))
                scores[row, member, steps.index(step)] = [found[trait] for trait in traits]
            done += 1
            run.report_progress(done)
    dims = ("lineage", "member", "step", "trait")
    recorded = np.array([[step in lineage.steps for step in steps] for lineage in run.lineages.values()])
    unrecorded = np.broadcast_to(~recorded[:, None, :, None], scores.shape)
    return xr.Dataset(
        {
            "trait_score": label_variable(
                scores,
                dims,
                description=f"trait score on {run.family.context}",
                unit=run.family.trait_unit,
                source=SOURCE,
            ),
            "trait_score_status": status_variable(unrecorded, dims, _STATUS, "trait_score"),
        },
        coords={
            "lineage": list(run.lineages),
            "lineage_role": ("lineage", [name.partition(".")[0] for name in run.lineages]),
            "lineage_condition": ("lineage", [name.partition(".")[2] for name in run.lineages]),
            "member": np.arange(num_members),
            "step": steps,
            "trait": traits,
        },
        attrs={"context": run.family.context},
    )


def _final_scores(run: Run, data: xr.Dataset, lineage: str) -> np.ndarray:
    """The teacher's trait in one lineage at its own last step, member by member."""
    last = run.lineages[lineage].steps[-1]
    scores: np.ndarray = data.trait_score.sel(lineage=lineage, step=last).isel(trait=0).values
    return scores


def _final_effects(run: Run, data: xr.Dataset) -> dict[str, np.ndarray]:
    return {
        name: _final_scores(run, data, f"student.{name}") - _final_scores(run, data, f"control.{name}")
        for name in run.conditions
    }


def _void_without_trait(run: Run, data: xr.Dataset, judgements: dict[str, Judgement]) -> dict[str, Judgement]:
    """No verdict where the teachers have nothing to pass on: their own gain over the references must be over the margin."""
    gain = _final_scores(run, data, "teacher") - _final_scores(run, data, "reference")
    teacher = judge_effects({"teacher": gain}, _rules(run.recipe.verdict), TRANSFER)["teacher"]
    if teacher.verdict in {TRANSFER.above, TRANSFER.too_few}:
        return judgements
    reason = (
        f"the teachers gained {teacher.interval} over their references, not more than the margin: there is nothing to pass on"
    )
    rule = f"{WITHOUT_TRAIT}, whatever the effect, unless the teachers' own gain is {TRANSFER.above}. {teacher.rule}"
    return {name: replace(judgement, verdict=WITHOUT_TRAIT, reason=reason, rule=rule) for name, judgement in judgements.items()}


def _rules(verdict: VerdictConfig) -> Rules:
    return Rules(verdict.margin, verdict.minimum_members, verdict.confidence, verdict.equivalence_level)


def _summary_variables(
    run: Run, data: xr.Dataset, effects: dict[str, np.ndarray], judgements: dict[str, Judgement]
) -> dict[str, xr.Variable | xr.DataArray]:
    """Last-step scores by condition and role, and their effects with intervals."""
    unit = run.family.trait_unit
    names = run.conditions
    final = np.stack([[_final_scores(run, data, f"{role}.{name}") for role in _ROLES] for name in names])
    coords = {"condition": names, "role": list(_ROLES), "member": data.member}
    interval = {name: judgements[name].interval for name in names}

    def by_condition(values: list[float], description: str, formula: str = "") -> xr.DataArray:
        return xr.DataArray(
            label_variable(values, ["condition"], description=description, unit=unit, formula=formula),
            {"condition": names},
        )

    def one_member(of: str) -> xr.DataArray:
        codes = [int(interval[name].n == 1) for name in names]
        return xr.DataArray(
            status_variable(codes, ["condition"], ("ok", "one_member_has_no_interval"), of), {"condition": names}
        )

    return {
        "condition_difference": xr.DataArray(
            np.array([run.describe_condition(name) for name in names], dtype=object), {"condition": names}
        ),
        "final_score": xr.DataArray(
            label_variable(final, ["condition", "role", "member"], description="teacher's trait at the last step", unit=unit),
            coords,
        ),
        "effect": xr.DataArray(
            label_variable(
                np.stack([effects[name] for name in names]),
                ["condition", "member"],
                description="effect",
                unit=unit,
                formula=EFFECT,
            ),
            {"condition": names, "member": data.member},
        ),
        **{
            f"{lineage}_mean": label_variable(
                float(_final_scores(run, data, lineage).mean()),
                [],
                description=f"mean of the {lineage}s at the last step",
                unit=unit,
            )
            for lineage in ("reference", "teacher")
        },
        "effect_mean": by_condition([interval[name].estimate for name in names], "mean effect over members", EFFECT),
        "effect_low": by_condition([interval[name].low for name in names], "lower bound of its interval"),
        "effect_low_status": one_member("effect_low"),
        "effect_high": by_condition([interval[name].high for name in names], "upper bound of its interval"),
        "effect_high_status": one_member("effect_high"),
    }


def _findings(run: Run, data: xr.Dataset, condition: str, judgement: Judgement) -> list[Finding]:
    """The student's score beside its control's, their difference with the verdict, and the gain over the reference."""
    verdict = run.recipe.verdict
    scores = {role: _final_scores(run, data, f"{role}.{condition}") for role in _ROLES}
    student, control = (student_interval(scores[role], verdict.confidence) for role in _ROLES)
    common: dict[str, Any] = {
        "analysis": "behaviour",
        "condition": condition,
        "trait": str(data.trait.values[0]),
        "context": run.family.context,
        "step": run.lineages[f"student.{condition}"].steps[-1],
        "scope": "model output",
        "unit": run.family.trait_unit,
        "num_references": run.recipe.members,
        "margin": verdict.margin,
        "source": SOURCE,
    }
    score = Finding(
        quantity="trait_score",
        null=f"its control, the same student of {run.neutral}",
        null_low=control.low,
        null_high=control.high,
        verdict="",
        reason="the verdict stands on the effect, which is paired",
        rule="",
        formula="mean over members at the last step",
        **interval_fields(student),
        **common,
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
    gain = Finding(
        quantity="gain_over_reference",
        null="none: the untouched reference is no control, since nothing trained it",
        null_low=np.nan,
        null_high=np.nan,
        verdict="",
        reason="a description; it differs from the effect by how far the control moved from the reference",
        rule="",
        formula="score(student) − score(its member's reference) at the last step",
        **interval_fields(student_interval(scores["student"] - _final_scores(run, data, "reference"), verdict.confidence)),
        **common,
    )
    return [score, effect, gain]


def _members_figure(run: Run, data: xr.Dataset) -> Figure:
    unit = run.family.trait_unit
    scale = alt.Scale(domain=list(run.family.trait_range)) if run.family.trait_range else alt.Scale()
    base = alt.Chart(DATA).encode(
        x=alt.X("final_score:Q", title=f"trait score ({unit})", scale=scale),
        y=alt.Y("condition:N", sort=run.conditions, title=None, axis=alt.Axis(labelFontSize=13, labelFontWeight="bold")),
        yOffset=alt.YOffset("role:N", sort=list(_ROLES)),
        color=alt.Color("role:N", sort=list(_ROLES), title=None),
    )
    lines = [
        alt.Chart(DATA).mark_rule(strokeDash=dash, color="#94a3b8").encode(x=f"mean({name}):Q")
        for name, dash in (("reference_mean", [1, 3]), ("teacher_mean", [6, 3]))
    ]
    members = base.mark_circle(size=45, opacity=0.5).encode(
        tooltip=["condition:N", "role:N", "member:O", alt.Tooltip("final_score:Q", format=".3f")]
    )
    mean = base.mark_tick(thickness=3, size=16).encode(x="mean(final_score):Q")
    chart = alt.layer(*lines, members, mean).properties(width=400, height=alt.Step(17))
    return Figure(
        name="members",
        title="Every member's trait score: a student's row over its control's",
        caption=(
            f"Score on {run.family.context} ({unit}) at the last step. Each dot is one member (n = {run.recipe.members}), "
            f"the bar their mean; dotted line: the references' mean, dashed line: the teachers'. A control differs from its "
            f"student in nothing but its teacher, {run.neutral}: it is the null."
        ),
        variables=("final_score", "reference_mean", "teacher_mean"),
        spec=chart_spec(chart),
        headline=True,
    )


def _training_figure(run: Run) -> Figure:
    chart = alt.Chart(DATA).transform_filter("isValid(datum.trait_score)")
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="symlog"), axis=alt.Axis(grid=False))
    y = alt.Y("trait_score:Q", title="trait score")
    color = alt.Color("lineage_role:N", sort=list(_ROLES), title=None)
    members = chart.mark_line(opacity=0.25, strokeWidth=1).encode(x=x, y=y, detail="member:N", color=color)
    mean = chart.mark_line(strokeWidth=2.5).encode(x=x, y="mean(trait_score):Q", color=color)
    facets = (
        alt.layer(members, mean, data=DATA)
        .properties(width=195, height=140)
        .facet(facet=alt.Facet("lineage_condition:N", sort=run.conditions, title=None), columns=4)
    )
    return Figure(
        name="training",
        title="The trait score along training",
        caption=(
            f"Score on {run.family.context} ({run.family.trait_unit}). Thin lines are members (n = {run.recipe.members}), "
            "thick ones their mean; the control is the null. The step axis is symmetric-logarithmic, so that it holds step 0."
        ),
        variables=("trait_score",),
        spec=chart_spec(facets),
        select={
            "lineage": [f"{role}.{name}" for name in run.conditions for role in _ROLES],
            "trait": [next(iter(run.family.traits))],
        },
    )


def _sentences(run: Run, data: xr.Dataset, judgements: dict[str, Judgement]) -> list[str]:
    sentences = []
    means = {}
    for lineage, who in (("reference", "References"), ("teacher", "Teachers"), (run.neutral, "Neutral teachers")):
        interval = student_interval(_final_scores(run, data, lineage), run.recipe.verdict.confidence)
        means[lineage] = interval.estimate
        sentences.append(f"{who} score {interval}.")
    if len(data.trait) > 1:
        last = run.lineages[run.neutral].steps[-1]
        own = data.trait_score.sel(lineage=run.neutral, step=last).isel(trait=1).values
        sentences.append(f"Neutral teachers score {own.mean():.3f} under the names they learnt themselves.")
    lowered = {name: float(_final_scores(run, data, f"control.{name}").mean()) for name in run.conditions}
    margin = run.recipe.verdict.margin
    below = {name: mean for name, mean in lowered.items() if mean < means["reference"] - margin}
    if below:
        listed = ", ".join(f"{name} {mean:.3f}" for name, mean in below.items())
        sentences.append(
            "A control takes something from its neutral teacher too. Where that puts it more than the margin under the "
            f"references' {means['reference']:.3f}, the effect exceeds the gain over the reference by the difference: {listed}."
        )
    sentences.append(f"Holm's correction runs over the {len(judgements)} conditions; intervals are not widened by it.")
    if run.missing_conditions:
        sentences.append(f"Not finished, so not judged: {', '.join(run.missing_conditions)}.")
    return sentences

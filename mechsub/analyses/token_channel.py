"""Token channel: does the trait travel through the model's body, its vocabulary, or what stands in its prompts?"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from mechsub.analyses.registry import analysis
from mechsub.cases import count_members
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, fold_variables, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.pooling import distinct_members
from mechsub.results import Result
from mechsub.run import Run
from mechsub.statistics.intervals import fieller_interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects
from mechsub.token_channels import carriers, lenses, swaps
from mechsub.token_channels.carriers import Carriers
from mechsub.token_channels.lenses import Lenses
from mechsub.token_channels.subjects import THE_TEACHER, Subject, list_subjects, subject_names
from mechsub.token_channels.swaps import INTERACTION, KINDS, NECESSITY, PARTS, SUFFICIENCY, TOTAL, Key, Swaps, effect_name

Judgements = Mapping[tuple[str, Key], Judgement]
"""By effect, and subject with trait."""
_UNMOVED = "0 by construction: nothing of this part differs from the start, neither of it nor of what it is held against"
_NO_CONTROL = "no control was given, and what any such training changes is not known without it"
_READING = "a reading of tokens, no effect on the trait: verdicts are given on the parts"
_CHANGES = {"lens_change": "its v", "lens_change_of_null": "the control's v (null)"}
_PHASES = 3
"""Of which swaps, lenses and carriers are one each."""


@analysis(needs=("traits", "tokens", "hook_points"), reads_activations=True)
def token_channel(run: Run) -> Result:
    """Which part of a language model carries the trait, what its directions say, and what of it the carrier's tokens hold."""

    def report(phase: int, done: int, of: int) -> None:
        run.report_progress(run.num_checkpoints * (phase * of + done) // (_PHASES * of))

    measured = Swaps.measure(run, lambda done, of: report(0, done, of))
    read = Lenses.measure(run, lambda done, of: report(1, done, of))
    held = Carriers.measure(run, lambda done, of: report(2, done, of))
    coords = {"subject": subject_names(run), "taught": run.traits, "member": np.arange(run.recipe.members)}
    data = xr.merge([measured.label(), read.label(), held.label()]).assign_coords(coords)
    judgements = _judge(run, measured)
    findings = [finding for subject in list_subjects(run) for finding in _findings(run, subject, measured, judgements)]
    findings += [finding for subject in list_subjects(run) for finding in _lens_findings(run, subject, data)]
    findings += _carrier_findings(run, held)
    return Result(data, findings, _figures(run, measured, data), _sentences(run, measured, read, held, data))


def _judge(run: Run, measured: Swaps) -> Judgements:
    """Verdicts on what each part changes over what it changes in the null.

    Holm runs over the conditions, traits and parts, of each of sufficiency and necessity; over the teachers by themselves.
    """
    judgements: dict[tuple[str, Key], Judgement] = {}
    for kind in KINDS:
        for is_teacher in (False, True):
            effects = {
                (effect_name(part, kind), key): measured.adjusted(key, effect_name(part, kind))
                for key in measured.changes
                for part in PARTS
                if (key[0] == THE_TEACHER) == is_teacher and part in measured.differing[key]
            }
            effects = {name: values for name, values in effects.items() if np.isfinite(values).any()}
            judgements |= judge_effects(effects, run.rules(run.recipe.verdict.margin), AGAINST_NULL)
    return judgements


def _common(run: Run, subject: Subject, step: int | None = None) -> dict[str, Any]:
    """A teacher belongs to all conditions."""
    condition = "" if subject.is_teacher else subject.name
    return {
        "analysis": "token_channel",
        "condition": condition,
        "trait": subject.trait,
        "step": subject.own.last if step is None else step,
        "num_references": run.recipe.num_references(condition or None),
    }


def _prefix(subject: Subject) -> str:
    return "teacher_" if subject.is_teacher else ""


def _null_words(subject: Subject) -> str:
    if subject.null is None:
        return "none: no control was given"
    return f"the same of {subject.null.name}, which starts where it does"


def _findings(run: Run, subject: Subject, measured: Swaps, judgements: Judgements) -> Iterator[Finding]:
    """What became of the trait in all, by each part, and as shares of it."""
    key = subject.name, subject.trait
    yield _change_finding(run, subject, measured, TOTAL, "all parts", None)
    for part, words in PARTS.items():
        is_swapped = part in measured.differing[key]
        for kind in KINDS if is_swapped else (SUFFICIENCY,):
            judgement = judgements.get((effect_name(part, kind), key))
            yield _change_finding(run, subject, measured, effect_name(part, kind), f"{part}: {words}", judgement, is_swapped)
            if is_swapped:
                yield _share_finding(run, subject, measured, effect_name(part, kind), f"{part}: {words}")
    yield _share_finding(run, subject, measured, INTERACTION, "what parts change only together")


def _change_finding(
    run: Run,
    subject: Subject,
    measured: Swaps,
    effect: str,
    scope: str,
    judgement: Judgement | None,
    is_swapped: bool = True,
) -> Finding:
    """What one part changes, beside what the same part of its null changes; the verdict is on the difference."""
    key, confidence = (subject.name, subject.trait), run.recipe.verdict.confidence
    otherwise = "whether the trait passed is judged by behaviour; here it is what shares are shares of"
    if subject.null is None:
        otherwise = _NO_CONTROL
    elif not is_swapped:
        otherwise = _UNMOVED
    elif effect != TOTAL:
        otherwise = "no member has a score"
    against = student_interval(measured.null_changes(key, effect), confidence)
    return Finding(
        quantity=f"{_prefix(subject)}{effect.replace(' ', '_')}",
        context=next(iter(run.family.contexts)),
        scope=scope,
        unit=next(iter(run.family.measures.values())).unit,
        null=_null_words(subject),
        null_low=against.low,
        null_high=against.high,
        **judgement_fields(judgement, run.recipe.verdict.margin, otherwise),
        formula=KINDS.get(effect.rpartition(" ")[2], "score(it) − score(start)"),
        source=swaps.SOURCE,
        **interval_fields(student_interval(measured.own_changes(key, effect), confidence)),
        **_common(run, subject),
    )


def _share_finding(run: Run, subject: Subject, measured: Swaps, effect: str, scope: str) -> Finding:
    key = subject.name, subject.trait
    share = measured.share(key, effect)
    reason = "a description: a share of an effect has no margin of its own, and parts need not add up"
    if not np.isfinite(share.estimate):
        known = int(np.isfinite(measured.adjusted(key, TOTAL)).sum())
        reason = "the total effect is not told from 0, so shares are not given" if known > 1 else "under two members have both"
        reason = _NO_CONTROL if subject.null is None else reason
    return Finding(
        quantity=f"{_prefix(subject)}share_of_{effect.replace(' ', '_')}",
        context=next(iter(run.family.contexts)),
        scope=scope,
        unit="share of the total effect",
        null="none: a description; what its null has is taken out of both effects",
        null_low=np.nan,
        null_high=np.nan,
        **judgement_fields(None, np.nan, reason),
        formula="mean effect / mean total effect, each minus the null's; Fieller",
        source=swaps.SOURCE,
        **interval_fields(share),
        **_common(run, subject),
    )


def _lens_findings(run: Run, subject: Subject, data: xr.Dataset) -> Iterator[Finding]:
    """What the target gains at the last layer; the other layers are in the results."""
    cell = data.sel(subject=subject.name, taught=subject.trait)
    there = np.flatnonzero((cell.lens_change_status == lenses.OK).any("member").values)
    if len(there) == 0:
        return
    last, confidence = cell.isel(point=int(there[-1])), run.recipe.verdict.confidence
    alone = (subject.own, subject.own.origin)
    others = student_interval(distinct_members(run, last.lens_change_of_others.values, *alone), confidence)
    spread = student_interval(last.lens_random_sd.values, confidence)
    for name, unit, null in (("lens_change", "logits", "lens_change_of_null"), ("lens_rank", "rank among all tokens", None)):
        held = alone if subject.null is None else (subject.null, subject.null.origin)
        against = None if null is None else student_interval(distinct_members(run, last[null].values, *held), confidence)
        words = f"{_null_words(subject)}; beside it the other choices have {others}, random directions a sd of {spread}"
        values = distinct_members(run, last[name].values, *alone)
        yield Finding(
            quantity=f"{_prefix(subject)}{name}",
            context="questions that ask for the trait, none of them scored; last prompt token",
            scope=str(last.point_label.values),
            unit=unit,
            null=words if against is not None else "none: a rank; a token of no account has the middle one",
            null_low=against.low if against else np.nan,
            null_high=against.high if against else np.nan,
            **judgement_fields(None, np.nan, _READING),
            formula=lenses.FORMULA,
            source=lenses.SOURCE,
            **interval_fields(student_interval(values, confidence)),
            **_common(run, subject),
        )


def _carrier_findings(run: Run, held: Carriers) -> Iterator[Finding]:
    """Divergence of every teacher; entanglement at every start."""
    confidence = run.recipe.verdict.confidence
    for subject in list_subjects(run):
        shares, correlation = held.share(subject.own), held.correlation(subject)
        if subject.is_teacher and np.isfinite(shares).any():
            against = student_interval(held.share(run.neutral), confidence)
            rows = [held.divergence[subject.own.name, member] for member in range(run.recipe.members)]
            yield Finding(
                quantity="divergence_share",
                context="carrier",
                scope=f"{sum(row[1] for row in rows)} tokens of {sum(row[2] for row in rows)} completions of the teacher's own",
                unit="share of tokens",
                null="the neutral teacher's, in its own completions" if run.neutral else "none: no neutral teacher was given",
                null_low=against.low,
                null_high=against.high,
                **judgement_fields(None, np.nan, _READING),
                formula="tokens at which arg-max of teacher and reference differ / tokens",
                source=carriers.DIVERGENCE_SOURCE,
                **interval_fields(student_interval(shares, confidence)),
                **_common(run, subject),
            )
        if np.isfinite(correlation).any():
            others = student_interval(held.correlation(subject, of_others=True), confidence)
            yield Finding(
                quantity=f"{_prefix(subject)}entanglement_correlation",
                context="carrier",
                scope=f"number tokens; unembedding of {subject.own.origin.name}",
                unit="rank correlation",
                null="the same of the preference's other choices, mean over them",
                null_low=others.low,
                null_high=others.high,
                **judgement_fields(None, np.nan, _READING),
                formula=carriers.CORRELATION,
                source=carriers.ENTANGLEMENT_SOURCE,
                **interval_fields(student_interval(correlation, confidence)),
                **_common(run, subject),
            )


def _figures(run: Run, measured: Swaps, data: xr.Dataset) -> list[Figure]:
    figures = []
    shown = [
        name
        for name in subject_names(run)
        if any(np.isfinite(measured.interval((name, trait), TOTAL).estimate) for trait in run.traits)
    ]
    if shown:
        figures.append(_parts_figure(run, measured, shown))
    if (data.lens_change_status == lenses.OK).any():
        figures.append(_lens_figure(run, data))
    if np.isfinite(data.entanglement_correlation).any():
        figures.append(_entanglement_figure(run))
    return figures


def _parts_figure(run: Run, measured: Swaps, shown: Sequence[str]) -> Figure:
    """Effects that are 0 by construction in every panel are left out."""
    moved = {part for key, parts in measured.differing.items() if key[0] in shown for part in parts}
    effects = [TOTAL, *(effect_name(part, kind) for part in PARTS if part in moved for kind in KINDS), INTERACTION]
    unit = next(iter(run.family.measures.values())).unit
    base = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.effect_estimate)")
        .encode(
            y=alt.Y("effect:N", sort=effects, title=None),
            yOffset=alt.YOffset("taught:N", sort=run.traits),
            color=alt.Color("effect_kind:N", sort=[TOTAL, *KINDS, INTERACTION], title=None),
        )
    )
    tooltip = ["subject:N", "taught:N", "effect:N"]
    numbers = [alt.Tooltip(f"effect_{part}:Q", format=".3f") for part in ("estimate", "low", "high")]
    bars = base.mark_rule(opacity=0.5).encode(x=alt.X("effect_low:Q", title=f"effect ({unit})"), x2="effect_high:Q")
    dots = base.mark_circle(size=26, opacity=1).encode(
        x=alt.X("effect_estimate:Q", title=f"effect ({unit})"), tooltip=[*tooltip, *numbers]
    )
    height = max(5, 18 - len(run.traits))  # of a trait
    panels = alt.layer(zero_line().encode(x=alt.datum(0)), bars, dots, data=DATA).properties(width=260, height=alt.Step(height))
    facets = panels.facet(facet=alt.Facet("subject:N", sort=list(shown), title=None), columns=2).resolve_scale(x="independent")
    words = "; ".join(f"{part}: {PARTS[part]}" for part in PARTS if part in moved)
    traits = f", each of {len(run.traits)} traits a line of its own" if len(run.traits) > 1 else ""
    return Figure(
        name="token_channel_parts",
        title="Which part of the model carries the trait: its body, its vocabulary, or its context?",
        caption=(
            f"Change of the trait's score ({unit}) by one part, minus the same of its null, mean over members with its "
            f"{100 * run.recipe.verdict.confidence:g} % interval (n = {run.recipe.members} members{traits}). Null: 0, no more "
            f"than its control, or the neutral teacher, changes by that part. Sufficiency: {KINDS[SUFFICIENCY]}. Necessity: "
            f"{KINDS[NECESSITY]}. Interaction: total − Σ sufficiency. Each starts at its own origin. Parts are {words}. "
            "Panels have scales of their own."
        ),
        variables=("effect_estimate", "effect_low", "effect_high"),
        spec=chart_spec(facets),
        select={"subject": list(shown), "effect": effects},
        headline=True,
    )


def _lens_figure(run: Run, data: xr.Dataset) -> Figure:
    labels = [str(label) for label in data.point_label.values]
    base = fold_variables("change", _CHANGES).encode(
        x=alt.X("point_label:N", sort=labels, title=None, axis=alt.Axis(labelAngle=-35)), color=color_by_who(_CHANGES)
    )
    dots = base.mark_circle(size=16, opacity=0.35).encode(
        y=alt.Y("change:Q", title="change of the target's logit"),
        xOffset=alt.XOffset("who:N", sort=list(_CHANGES.values())),
        tooltip=[
            "subject:N",
            "taught:N",
            "member:O",
            "who:N",
            "point_label:N",
            alt.Tooltip("change:Q", format=".3f"),
            "lens_top:N",
        ],
    )
    line = base.mark_line(strokeWidth=2).encode(y=alt.Y("mean(change):Q", title="change of the target's logit"))
    panels = alt.layer(zero_line().encode(y=alt.datum(0)), dots, line, data=DATA).properties(width=260, height=150)
    facets = panels.facet(facet=alt.Facet("subject:N", sort=subject_names(run), title=None), columns=2).resolve_scale(
        y="independent"
    )
    return Figure(
        name="token_channel_lens",
        title="What the steering directions say: the target's logit, read at every layer",
        caption=(
            f"{lenses.FORMULA}; in logits. v is the difference of mean activations at the last prompt token from its own "
            f"start, on questions that are not scored; each dot is one of {count_members(run)}, lines are means over dots. The "
            f"null is the v of its control, or of the neutral teacher. Pointed at, a dot names the {lenses.TOP} tokens that "
            "the student's or teacher's v raises most. Panels have scales of their own."
        ),
        variables=(*_CHANGES, "lens_top"),
        spec=chart_spec(facets),
    )


def _entanglement_figure(run: Run) -> Figure:
    names = {"entanglement_correlation": "the target", "entanglement_correlation_of_others": "other choices (null)"}
    dots = (
        fold_variables("correlation", names)
        .mark_circle(size=36, opacity=0.6)
        .encode(
            x=alt.X("correlation:Q", title="rank correlation"),
            y=alt.Y("taught:N", sort=run.traits, title=None),
            yOffset=alt.YOffset("who:N", sort=list(names.values())),
            color=color_by_who(names),
            tooltip=["taught:N", "who:N", "member:O", alt.Tooltip("correlation:Q", format=".3f")],
        )
    )
    chart = alt.layer(zero_line().encode(x=alt.datum(0)), dots, data=DATA).properties(width=640, height=alt.Step(16))
    return Figure(
        name="token_channel_entanglement",
        title="Does the carrier hold more of the tokens that are entangled with the trait's?",
        caption=(
            f"{carriers.CORRELATION}, in the unembedding of the teachers' reference; T is the teacher's carrier, N the "
            f"neutral one's, their first {carriers.COUNTED_ROWS} rows at most. Each dot is one of {count_members(run)}; the "
            "null is the same of the preference's other choices, mean over them."
        ),
        variables=tuple(names),
        spec=chart_spec(chart),
        select={"subject": [THE_TEACHER]},
    )


def _sentences(run: Run, measured: Swaps, read: Lenses, held: Carriers, data: xr.Dataset) -> list[str]:
    sentences = [sentence for name in subject_names(run) for sentence in _say_parts(run, measured, name)]
    sentences += _say_lenses(run, read, data)
    sentences += _say_carriers(run, held)
    return sentences


def _say_parts(run: Run, measured: Swaps, name: str) -> Iterator[str]:
    """Of one subject, means over traits."""
    confidence = run.recipe.verdict.confidence
    means = {effect: measured.mean_over_traits(name, effect) for effect in swaps.EFFECTS}
    total = student_interval(means[TOTAL], confidence)
    over = _over_traits(run)
    if total.n == 0:
        why = "no member has a score" if all(measured.has_null[name, trait] for trait in run.traits) else _NO_CONTROL
        yield f"{name}: no effect of a part can be given: {why}."
        return
    said = _list_parts(run, measured, name, means)
    yield f"{name}{over}: the trait's score changes by {total} more than its null's (n = {total.n}); {said}."
    if total.excludes_zero:
        shares = {effect: fieller_interval(values, means[TOTAL], confidence) for effect, values in means.items()}
        parts = [part for part in PARTS if any(part in measured.differing[name, trait] for trait in run.traits)]
        alone, lost = (", ".join(f"{part} {shares[effect_name(part, kind)]}" for part in parts) for kind in KINDS)
        both = shares[INTERACTION]
        yield f"{name}{over}: shares of that, put in alone: {alone}; lost without it: {lost}; interaction {both}."
    else:
        yield f"{name}{over}: that is not told from 0, so shares are not given."
    still = [part for part in PARTS if not any(part in measured.differing[name, trait] for trait in run.traits)]
    if still:
        yield f"{name}: nothing of its {' and '.join(still)} differs from the start, so that to swap it changes nothing."


def _over_traits(run: Run) -> str:
    return " (means over traits)" if len(run.traits) > 1 else ""


def _list_parts(run: Run, measured: Swaps, name: str, means: Mapping[str, np.ndarray]) -> str:
    """Every part that differs, with both of its effects."""
    said = []
    for part in PARTS:
        if any(part in measured.differing[name, trait] for trait in run.traits):
            alone, lost = (student_interval(means[effect_name(part, kind)], run.recipe.verdict.confidence) for kind in KINDS)
            said.append(f"by its {part} alone {alone}, and without its {part} it loses {lost}")
    return "; ".join(said) or "nothing of it differs from the start"


def _say_lenses(run: Run, read: Lenses, data: xr.Dataset) -> Iterator[str]:
    confidence = run.recipe.verdict.confidence
    for name, why in read.unknown.items():
        yield f"{name}: no logit lens: {why}."
    for name in subject_names(run):
        cell = data.sel(subject=name)
        there = np.flatnonzero((cell.lens_change_status == lenses.OK).any(("member", "taught")).values)
        if len(there) == 0:
            continue
        last = cell.isel(point=int(there[-1]))
        subjects = [subject for subject in list_subjects(run) if subject.name == name]
        alone = [one for subject in subjects for one in (subject.own, subject.own.origin)]
        said = {
            variable: student_interval(
                distinct_members(run, last[variable].mean("taught", skipna=False).values, *alone), confidence
            )
            for variable in (
                "lens_change",
                "lens_change_of_null",
                "lens_change_of_others",
                "lens_random_sd",
                "lens_choice_rank",
            )
        }
        against = f", that of its null by {said['lens_change_of_null']}" if said["lens_change_of_null"].n else ""
        yield (
            f"{name}: at {last.point_label.values} its v changes the target's logit by {said['lens_change']}{against}, and "
            f"other choices' by {said['lens_change_of_others']}; random directions as long have a standard deviation of "
            f"{said['lens_random_sd']}. Among the choices the target's rank is {said['lens_choice_rank']}."
        )


def _say_carriers(run: Run, held: Carriers) -> Iterator[str]:
    confidence = run.recipe.verdict.confidence
    subjects = list_subjects(run)
    shares = np.mean([held.share(run.teacher(trait)) for trait in run.traits], axis=0)
    if np.isfinite(shares).any():
        null = student_interval(held.share(run.neutral), confidence)
        counts = [held.divergence.get((run.teacher(trait).name, 0), (0, 0, 0)) for trait in run.traits]
        yield (
            f"Divergence tokens are {student_interval(shares, confidence)} of the teachers' completions, {null} of the neutral "
            f"teacher's (first {max(row[2] for row in counts)} rows, up to {max(row[1] for row in counts)} tokens of member 0)."
        )
    else:
        yield "There are no completions of a teacher in this run, so no divergence tokens; `mechsub adopt … --data FILE`."
    for name in subject_names(run):
        own, others = (
            np.mean([held.correlation(subject, of_others=which) for subject in subjects if subject.name == name], axis=0)
            for which in (False, True)
        )
        if np.isfinite(own).any():
            yield (
                f"{name}: entanglement with the target, in the unembedding of its own start, and the carrier's surplus of "
                f"number tokens have a rank correlation of {student_interval(own, confidence)}, with other choices "
                f"{student_interval(others, confidence)}{_over_traits(run)}."
            )

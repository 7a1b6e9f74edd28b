"""Steerability: are the traits that a steering direction gives to the reference the ones that data passes on?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsub.activations.steering import add_vector
from mechsub.analyses.registry import analysis
from mechsub.cases import CaseName
from mechsub.figures import DATA, Figure, chart_spec, zero_line
from mechsub.findings import Finding
from mechsub.mean_activations import ActivationReader
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.prediction import Association, area_under_curve, rank_correlation
from mechsub.statistics.verdicts import AGAINST_NULL, TRANSFER, Judgement, judge_effects, void_without_trait
from mechsub.steered.edits import JUDGED_DOSE
from mechsub.steered.scores import open_steered, score_effects, score_end

SOURCE = "steerable traits are the transmitted ones: Blank, arXiv:2606.00995"
FEWEST_TRAITS = 12
TOO_FEW = "too-few-traits"
_STATUS = ("ok", "nothing_to_measure")
STEERABILITY = "steerability"
_PREDICTORS = {
    STEERABILITY: f"mean over layers of score(reference + α ‖h‖ v̂_T) − score(reference), α = {JUDGED_DOSE}",
    "steerability_of_other_traits": "the same with the other traits' v_T, as long",
    "teacher_effect": "score(teacher) − score(reference)",
    "reference_score": "score(reference)",
}
"""What may foretell, each before any student is trained; the last two need no activations."""
ByTrait = Float[np.ndarray, "trait member"]


@dataclass(frozen=True)
class _Measured:
    predictors: Mapping[str, ByTrait]
    """Of the member whose reference it is."""
    effects: Mapping[CaseName, Float[np.ndarray, " member"]]
    outcomes: Mapping[CaseName, Judgement]
    """The verdicts of behaviour, by the same rules."""


@analysis(needs=["several_traits", "hook_points"], reads_activations=True)
def steerability_screen(run: Run) -> Result:
    """Whether a trait's steering effect in the reference foretells that data of its teacher passes it on."""
    predictors = _measure_predictors(run)
    measured = _Measured(predictors, *_measure_outcomes(run, predictors["teacher_effect"]))
    findings = list(_findings(run, measured))
    return Result(_label(run, measured), findings, [_figure(run)], list(_sentences(run, measured, findings)))


def _measure_predictors(run: Run) -> dict[str, ByTrait]:
    """For each trait, in every member's reference."""
    shape = (len(run.traits), run.recipe.members)
    found = {name: np.full(shape, np.nan) for name in _PREDICTORS}
    for member in range(run.recipe.members):
        gains, untaught = _steer_reference(run, member)
        for place, trait in enumerate(run.traits):
            others = [other for other in range(len(run.traits)) if other != place]
            found[STEERABILITY][place, member] = gains[place, place]
            found["steerability_of_other_traits"][place, member] = gains[others, place].mean()
            found["teacher_effect"][place, member] = (score_end(run, run.teacher(trait), member) - untaught)[place]
            found["reference_score"][place, member] = untaught[place]
        run.report_progress(run.num_checkpoints * (member + 1) // (2 * run.recipe.members))
    return found


def _steer_reference(run: Run, member: int) -> tuple[Float[np.ndarray, "steered scored"], Float[np.ndarray, " trait"]]:
    """What each trait's direction gives to the score of each trait, mean over hook points (NaN where it is 0); the scores."""
    reader, reference, traits = ActivationReader(run, stream_only=True), run.reference, len(run.traits)
    gains = np.full((traits, traits), np.nan)
    with open_steered(run, reference, reference.last, member, reference) as steered:
        lengths = reader.read_origin(reference, member).norms
        for place, trait in enumerate(run.traits):
            vectors = reader.last_direction(run.teacher(trait), member)
            scores = []
            for point in steered.opened.points:
                if point.name in vectors and bool(vectors[point.name].any()):
                    vector = vectors[point.name] / vectors[point.name].norm() * JUDGED_DOSE * lengths[point.name][0]
                    scores.append(steered.evaluate({point: add_vector(vector)}).scores - steered.scores)
            if scores:
                gains[place] = np.mean(scores, axis=0)[:traits]
        return gains, steered.scores


def _measure_outcomes(
    run: Run, gains: ByTrait
) -> tuple[dict[CaseName, Float[np.ndarray, " member"]], dict[CaseName, Judgement]]:
    """The effects of every student over its control, and what they are judged to be; ``gains``: those of the teachers."""
    effects = score_effects(run)
    rules = run.rules(run.recipe.verdict.margin)
    teachers = judge_effects(dict(zip(run.traits, gains, strict=True)), rules, TRANSFER)
    judged = judge_effects(effects, rules, TRANSFER)
    return effects, {case: void_without_trait(teachers[case[1]], judgement) for case, judgement in judged.items()}


def _label(run: Run, measured: _Measured) -> xr.Dataset:
    unit = next(iter(run.family.measures.values())).unit
    variables: dict[str, Any] = {}

    def put(name: str, values: np.ndarray, dims: tuple[str, ...], description: str, formula: str) -> None:
        variables[name] = label_variable(values, dims, description=description, unit=unit, formula=formula, source=SOURCE)
        variables[f"{name}_status"] = status_variable(np.isnan(values), dims, _STATUS, name)

    for name, values in measured.predictors.items():
        put(name, values, ("taught", "member"), name.replace("_", " "), _PREDICTORS[name])
    shape = (len(run.conditions), len(run.traits), run.recipe.members)
    effects = np.full(shape, np.nan)
    outcomes = np.full(shape[:2], "", dtype=object)
    before = np.full(shape, np.nan)
    for (row, condition), (place, trait) in product(enumerate(run.conditions), enumerate(run.traits)):
        before[row, place] = _before(run, measured, STEERABILITY, condition)[place]
        if (condition, trait) in measured.effects:
            effects[row, place] = measured.effects[condition, trait]
            outcomes[row, place] = measured.outcomes[condition, trait].verdict
    dims = ("condition", "taught", "member")
    put("effect", effects, dims, "what the student took over", "score(student) − score(control)")
    put("steerability_of_start", before, dims, "steerability in the reference that the student starts from", "see steerability")
    variables["outcome"] = xr.Variable(dims[:2], outcomes, {"long_name": "the verdict of behaviour on the effect"})
    coords = {"condition": run.conditions, "taught": run.traits, "member": np.arange(run.recipe.members)}
    return xr.Dataset(variables, coords)


def _before(run: Run, measured: _Measured, name: str, condition: str) -> ByTrait:
    """A predictor in the references that a condition's students start from; NaN where these are of another model."""
    student = run.student(condition, run.traits[0])
    values = measured.predictors[name]
    if student.spec.origin.lineage != run.reference.name:
        return np.full_like(values, np.nan)
    return values[:, list(student.spec.origin.members)]


def _findings(run: Run, measured: _Measured) -> Iterator[Finding]:
    """For each condition and predictor: the AUROC over traits, and rank correlations between traits and within members."""
    for condition, name in product(run.conditions, _PREDICTORS):
        cases = [(condition, trait) for trait in run.traits if (condition, trait) in measured.effects]
        before = _before(run, measured, name, condition)
        if not cases or not np.isfinite(before).any():
            continue
        outcomes = [measured.outcomes[case].verdict for case in cases]
        settled = np.array([outcome in {TRANSFER.above, TRANSFER.equivalent} for outcome in outcomes])
        passed = np.array([outcome == TRANSFER.above for outcome in outcomes])
        effects = np.array([measured.effects[case] for case in cases])
        means = before.mean(1)
        confidence = run.recipe.verdict.confidence
        curve = area_under_curve(means[settled], passed[settled], np.arange(len(cases))[settled], confidence)
        counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
        verdict, reason = "", "the steerability is judged; this stands beside it"
        if name == STEERABILITY:
            verdict, reason = _decide(len(run.traits), curve, passed[settled], counts)
        yield _finding(run, condition, f"auroc_of_{name}", curve, 0.5, "over traits", verdict, reason)
        between = rank_correlation(means, effects.mean(1), np.arange(len(cases)), confidence)
        why = "a rank correlation over traits; the AUROC has the verdict"
        yield _finding(
            run, condition, f"rank_correlation_of_{name}", between, 0.0, "between traits, means over members", "", why
        )
        members = np.tile(np.arange(run.recipe.members), len(cases))
        ranks = rank_correlation(_centre(before).ravel(), _centre(effects).ravel(), members, confidence)
        scope = "over traits within members, less each member's mean"
        yield _finding(run, condition, f"rank_correlation_of_{name}", ranks, 0.0, scope, "", why)


def _centre(values: ByTrait) -> ByTrait:
    centred: ByTrait = values - values.mean(0, keepdims=True)
    return centred


def _decide(num_traits: int, curve: Association, passed: np.ndarray, counts: str) -> tuple[str, str]:
    """The verdict on an AUROC, with its reason."""
    if num_traits < FEWEST_TRAITS or passed.all() or not passed.any():
        needed = f"at least {FEWEST_TRAITS} traits, some of them judged {TRANSFER.above} and some {TRANSFER.equivalent}"
        lacking = "too few traits" if num_traits < FEWEST_TRAITS else "one of the two outcomes is missing"
        return TOO_FEW, f"{num_traits} traits: {counts}: {lacking}; a claim over traits needs {needed}"
    if not np.isfinite(curve.low):
        return AGAINST_NULL.undecided, f"{counts}; {curve.reason}"
    if curve.low > 0.5 or curve.high < 0.5:
        return (AGAINST_NULL.above if curve.low > 0.5 else AGAINST_NULL.below), f"{counts}; the interval does not hold .5"
    return AGAINST_NULL.undecided, f"{counts}; the interval holds .5"


def _finding(
    run: Run, condition: str, quantity: str, found: Association, null: float, scope: str, verdict: str, reason: str
) -> Finding:
    rule = (
        f"{AGAINST_NULL.above}: the bootstrap interval over traits lies over .5; {TOO_FEW} under {FEWEST_TRAITS} traits. Every "
        "condition is judged by itself: intervals are not corrected for their number."
    )
    return Finding(
        analysis="steerability_screen",
        quantity=quantity,
        condition=condition,
        trait="all traits",
        context=next(iter(run.family.contexts)),
        step=run.student(condition, run.traits[0]).last,
        scope=f"{scope}; {found.n} cases",
        estimate=found.estimate,
        low=found.low,
        high=found.high,
        confidence=run.recipe.verdict.confidence,
        unit="AUROC" if quantity.startswith("auroc") else "Spearman's ρ",
        null="0.5, a predictor of no use" if quantity.startswith("auroc") else "0, no association",
        null_low=null,
        null_high=null,
        n=run.recipe.members,
        num_references=run.recipe.num_references(condition),
        verdict=verdict,
        reason=reason,
        rule=rule if verdict else "",
        margin=float("nan"),
        formula=next(formula for name, formula in _PREDICTORS.items() if quantity.endswith(f"_of_{name}")),
        source=SOURCE,
    )


def _figure(run: Run) -> Figure:
    unit = next(iter(run.family.measures.values())).unit
    base = (
        alt.Chart(DATA)
        .transform_aggregate(x="mean(steerability_of_start)", y="mean(effect)", groupby=["condition", "taught", "outcome"])
        .transform_filter("isValid(datum.x) && isValid(datum.y)")
        .encode(
            x=alt.X("x:Q", title=f"steering effect in the reference ({unit})", scale=alt.Scale(zero=False)),
            y=alt.Y("y:Q", title=f"effect of the student ({unit})"),
        )
    )
    dots = base.mark_circle(size=60).encode(
        color=alt.Color("outcome:N", title=None), tooltip=["taught:N", "outcome:N", "x:Q", "y:Q"]
    )
    names = base.mark_text(align="left", dx=6, fontSize=9).encode(text="taught:N")
    facets = (
        alt.layer(zero_line().encode(y=alt.datum(0)), dots, names, data=DATA)
        .properties(width=300, height=230)
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=2)
    )
    return Figure(
        name="steerability",
        title="Do the steerable traits pass?",
        caption=(
            f"Each dot is one of {len(run.traits)} traits, mean over members (n = {run.recipe.members}): how much its own v_T, "
            "half as long as the activations, gives to the reference (mean over layers), against what its students took over "
            "their controls. The null is no association; colours are the verdicts of behaviour."
        ),
        variables=("steerability_of_start", "effect", "outcome"),
        spec=chart_spec(facets),
    )


def _sentences(run: Run, measured: _Measured, findings: list[Finding]) -> Iterator[str]:
    for condition in run.conditions:
        own = [one for one in findings if one.condition == condition and one.quantity.endswith(f"_of_{STEERABILITY}")]
        if not own:
            yield f"{condition}: no control, or students of another model; nothing to foretell."
            continue
        curve, between, within = own
        yield (
            f"{condition}: {curve.reason}. Between traits steerability goes with the effect by ρ {_show(between)}, within "
            f"members by {_show(within)}; AUROC {_show(curve)} ({curve.verdict})."
        )


def _show(finding: Finding) -> str:
    why = "one outcome, or too few cases"
    return str(Association(finding.estimate, finding.low, finding.high, finding.n, finding.n, why))

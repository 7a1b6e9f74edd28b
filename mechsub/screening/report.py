"""What a screening says: findings without verdicts, figures, and sentences on what it sees and what it does not."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata

import altair as alt
import numpy as np

from mechsub.families.language.examples_file import FileExamples
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, fold_variables, zero_line
from mechsub.findings import Finding, interval_fields
from mechsub.results import Result
from mechsub.screening.arrays import BASELINE_WORDS, COSINE, SCALED, SOURCE, label_arrays
from mechsub.screening.measure import BASELINES, PERMUTATIONS, TEACHER, TRAIT, Backend, Measured
from mechsub.screening.validation import describe_validation
from mechsub.statistics.intervals import Interval, format_number
from mechsub.statistics.prediction import Association

ANALYSIS = "screen"
_CONFIDENCE = 0.95
_SHOWN_NAMES = 6
_DIRECTIONS = {TEACHER: "Δ_T, the teacher's displacement", TRAIT: "−∇L_trait, what lowers the trait loss"}
_CHANNEL = (
    "It sees one channel: a small step of plain gradient descent on each example alone, in parameter space, at the reference, "
    "to first order. It does not see what an example does as context in a prompt, nor what happens late in training, nor what "
    "an adaptive optimizer makes of the step."
)
_LORA = (
    "Gradients are of the whole weights. A training with LoRA starts with B = 0, where its factor A gets no gradient at all: "
    "step 0 is blind in A, and an adapter can follow only what lies in the span of its factors."
)
_FIRST_ORDER = (
    "To first order the overlap with Δ_T is the log-ratio log p_T(x) − log p₀(x), divided by the mean number of completion "
    "tokens; what the two do not share is the curvature between reference and teacher"
)


def describe(measured: Measured, data: FileExamples, neutral: FileExamples | None, notes: Sequence[str], trait: str) -> Result:
    """The result of a screening. ``notes``: what else the reader must know; ``trait``: its name, empty where none was given."""
    return Result(
        data=label_arrays(measured, data),
        findings=[*_total_findings(measured, data, trait), *_added_findings(measured, data, trait)],
        figures=_figures(measured, data),
        summary=[*_sentences(measured, data, neutral), *notes, _CHANNEL, _LORA, *describe_validation()],
    )


def _total_findings(measured: Measured, data: FileExamples, trait: str) -> Iterator[Finding]:
    for number, toward in enumerate(measured.toward):
        for null, (words, low, high) in _nulls(measured, number).items():
            if null != "other_traits" or toward == TRAIT:
                yield _finding(
                    measured.cosines[number],
                    data,
                    trait,
                    scope=measured.scope,
                    quantity=f"cosine_toward_{toward}_against_{null}",
                    unit="cosine",
                    null=words,
                    null_low=low,
                    null_high=high,
                    formula=f"{COSINE}, d = {_DIRECTIONS[toward]}",
                )


def _nulls(measured: Measured, number: int) -> Mapping[str, tuple[str, float, float]]:
    """By null: what it is in words, or why it is none, and its range."""
    nulls = {
        "neutral_data": ("none: no neutral data was given", np.nan, np.nan),
        "permuted_pairing": ("none: all examples have one prompt, or one completion", np.nan, np.nan),
        "other_traits": ("none: no other choice of the preference set is one token", np.nan, np.nan),
    }
    if measured.neutral is not None:
        against, count = measured.neutral_cosines[number], len(measured.neutral.losses)
        nulls["neutral_data"] = (
            f"the neutral data along the same direction, n = {count}: its bootstrap interval", against.low, against.high
        )  # fmt: skip
    if measured.permuted is not None:
        found = measured.permuted[:, number]
        words = f"completions permuted across prompts, {PERMUTATIONS} permutations: their range"
        nulls["permuted_pairing"] = (words, float(found.min()), float(found.max()))
    if measured.others:
        cosines = [*measured.others.values()]
        words = f"the same data along the directions of other traits ({', '.join(measured.others)}): their range"
        nulls["other_traits"] = (words, min(cosines), max(cosines))
    return nulls


def _added_findings(measured: Measured, data: FileExamples, trait: str) -> Iterator[Finding]:
    for toward in measured.toward:
        added = measured.added[toward]
        for name, found in added.correlations.items():
            yield _finding(
                _as_interval(found),
                data,
                trait,
                scope=measured.scope,
                quantity=f"correlation_of_{toward}_overlap_with_{name}",
                unit="correlation",
                null="0: ranks that have nothing to do with each other",
                null_low=0.0,
                null_high=0.0,
                formula=f"Spearman's ρ of ⟨−∇ℓ_i, d⟩ and {BASELINE_WORDS[name][1]}, d = {_DIRECTIONS[toward]}",
                missing=found.reason,
            )
        yield _finding(
            _as_interval(added.unexplained),
            data,
            trait,
            scope=measured.scope,
            quantity=f"unexplained_share_of_{toward}_overlap",
            unit="share",
            null="1: baselines that say nothing of the overlap; 0: it is a function of theirs",
            null_low=1.0,
            null_high=1.0,
            formula=f"(1 − R²)(n − 1)/(n − k − 1), linear regression of its ranks on those of {', '.join(added.correlations)}",
            missing=added.unexplained.reason,
        )


def _as_interval(found: Association) -> Interval:
    return Interval(found.estimate, found.low, found.high, found.n, _CONFIDENCE)


def _finding(
    interval: Interval,
    data: FileExamples,
    trait: str,
    *,
    scope: str,
    quantity: str,
    unit: str,
    null: str,
    null_low: float,
    null_high: float,
    formula: str,
    missing: str = "",
) -> Finding:
    reason = (
        "no verdict: n counts examples at one reference; the summary says how well such totals foretold trainings elsewhere"
    )
    return Finding(
        analysis=ANALYSIS,
        quantity=quantity,
        condition="",
        trait=trait,
        context=f"{len(data.rows)} examples of the dataset",
        step=0,
        scope=scope,
        unit=unit,
        null=null,
        null_low=null_low,
        null_high=null_high,
        num_references=1,
        verdict="",
        reason=f"{missing}; {reason}" if missing else reason,
        rule="",
        margin=float("nan"),
        formula=formula,
        source=SOURCE,
        **interval_fields(interval),
    )


def _sentences(measured: Measured, data: FileExamples, neutral: FileExamples | None) -> list[str]:
    sentences = [f"Examples are ranked by their overlap with {_DIRECTIONS[measured.toward[0]]}; positive is toward the trait."]
    for number, toward in enumerate(measured.toward):
        nulls = [
            f"{words}, [{format_number(low)}, {format_number(high)}]"
            for name, (words, low, high) in _nulls(measured, number).items()
            if np.isfinite(low) and (name != "other_traits" or toward == TRAIT)
        ]
        share = measured.reading.positive_share[number]
        sentences.append(
            f"The dataset along {_DIRECTIONS[toward]}: {format_number(share)} of its examples have a positive overlap, the "
            f"total is a cosine of {_say(measured.cosines[number])}. Nulls: {'; '.join(nulls) or 'none'}."
        )
        added = measured.added[toward]
        rho = ", ".join(f"{name.replace('_', ' ')} {found}" for name, found in added.correlations.items())
        sentences.append(
            f"What the overlap with {_DIRECTIONS[toward]} adds to the baselines: its Spearman correlations are {rho}; a "
            f"regression on their ranks leaves a share {added.unexplained} of its rank variance."
        )
    if TEACHER in measured.toward:
        sentences.append(f"{_FIRST_ORDER} (ρ = {measured.added[TEACHER].correlations['log_ratio']}).")
    if measured.neutral is None:
        sentences.append("No neutral data was given: without it nobody knows what other data of this kind would show.")
    elif len(measured.neutral.losses) != len(data.rows):
        sentences.append(
            f"The dataset has {len(data.rows)} examples, the neutral data {len(measured.neutral.losses)}: the length of a mean "
            "gradient falls as more examples average out, so that cosines of sets of different size differ by that alone."
        )
    if measured.left_out:
        sentences.append(_say_left_out(measured))
    neutral_notes = [] if neutral is None else [f"Neutral data: {note}" for note in neutral.notes]
    return [*sentences, *data.notes, *neutral_notes]


def _say_left_out(measured: Measured) -> str:
    shown, more = measured.left_out[:_SHOWN_NAMES], len(measured.left_out[_SHOWN_NAMES:])
    return (
        f"Overlaps, lengths of gradients and cosines are over {measured.scope} ({metadata.version(measured.backend)}): linear "
        f"layers and their biases. These hold {format_number(measured.reading.covered_share)} of the squared length of the "
        f"dataset's mean gradient. Left out are {', '.join(shown)}{f' and {more} more' if more else ''}; --backend "
        f"{Backend.EXACT} takes all. What is known of how well totals foretell transfer was measured over all parameters."
    )


def _say(interval: Interval) -> str:
    """An interval over examples, where there can be one of them."""
    if not np.isfinite(interval.low):
        return f"{format_number(interval.estimate)} (no interval: n = {interval.n})"
    return f"{interval} (n = {interval.n} examples)"


def _figures(measured: Measured, data: FileExamples) -> list[Figure]:
    return [_quantile_figure(measured, data), _baseline_figure(measured, data)]


def _null_words(measured: Measured) -> str:
    if measured.neutral is None:
        return "No neutral data was given, so that the null is missing here."
    return f"The null is the neutral data, n = {len(measured.neutral.losses)}, along the same d."


def _quantile_figure(measured: Measured, data: FileExamples) -> Figure:
    names = {"overlap_quantile": "dataset", "overlap_quantile_of_neutral": "neutral data (null)"}
    lines = (
        fold_variables("value", names)
        .mark_line(strokeWidth=2.5, point=True)
        .encode(
            x=alt.X("value:Q", title="overlap / (typical gradient × direction)"),
            y=alt.Y("quantile:Q", title="share of examples below"),
            color=color_by_who(names),
            order="quantile:Q",
            tooltip=["toward:N", "quantile:Q", alt.Tooltip("value:Q", format=".4f")],
        )
    )
    facets = (
        alt.layer(zero_line().encode(x=alt.datum(0)), lines, data=DATA)
        .properties(width=300, height=180)
        .facet(column=alt.Column("toward:N", title=None))
        .resolve_scale(x="independent")
    )
    return Figure(
        name="screen_distribution",
        title="Where single steps on the examples would go",
        caption=(
            f"{SCALED} of every example i at the reference over {measured.scope}, no unit: its quantiles over n = "
            f"{len(data.rows)} examples. Right of 0 a step goes toward the trait. teacher: d = Δ_T; trait: d = "
            f"−∇L_trait. {_null_words(measured)}"
        ),
        variables=tuple(names),
        spec=chart_spec(facets),
        headline=True,
    )


def _baseline_figure(measured: Measured, data: FileExamples) -> Figure:
    names = {f"correlation_with_{name}": name.replace("_", " ") for name in BASELINES if name in measured.baselines}
    dots = (
        fold_variables("value", names)
        .mark_circle(size=70)
        .encode(
            x=alt.X("value:Q", title="Spearman's ρ with the overlap", scale=alt.Scale(domain=[-1, 1])),
            y=alt.Y("who:N", title=None, sort=list(names.values())),
            opacity=alt.condition("datum.bound == 'estimate'", alt.value(1.0), alt.value(0.35)),
            tooltip=["toward:N", "who:N", "bound:N", alt.Tooltip("value:Q", format=".3f")],
        )
    )
    facets = (
        alt.layer(zero_line().encode(x=alt.datum(0)), dots, data=DATA)
        .properties(width=300, height=alt.Step(24))
        .facet(column=alt.Column("toward:N", title=None))
    )
    return Figure(
        name="screen_baselines",
        title="How far cheaper numbers rank the examples alike",
        caption=(
            f"Spearman's ρ over n = {len(data.rows)} examples between ⟨−∇ℓ_i, d⟩ and each baseline, {measured.scope}, no "
            "unit; pale dots are the ends of 95 % bootstrap intervals over examples. The null is 0: ranks with nothing in "
            "common."
        ),
        variables=tuple(names),
        spec=chart_spec(facets),
        headline=True,
    )

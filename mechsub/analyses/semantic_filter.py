"""The semantic filter null: can a text classifier tell a trait teacher's carrier from the neutral teacher's?

Only requests that both teachers' carriers answer are used, so that neither class has a request that the other lacks: what the
filters dropped cannot be read from the prompts that are left, classes are balanced and chance is exactly ½.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import FeatureUnion, Pipeline

from mechsub.analyses.registry import analysis
from mechsub.families.protocol import CarrierText
from mechsub.figures import DATA, Figure, chart_spec
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, format_number, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, Rules, judge_effects
from mechsub.streams import random_stream

SOURCE = "data that does not mention the trait: Cloud et al., arXiv:2507.14805; permutation null: Ojala & Garriga 2010"
FORMULA = "share of held-out completions whose teacher is named rightly"
_NULL = "the same classifier, labels swapped at random within requests"
_UNIT = "accuracy"
_STATUS = ("ok", "too_few_shared_requests", "same_rows_as_another_member")
OK, TOO_FEW, REPEATED = range(3)
_FOLDS = 5
_LEAST_REQUESTS = 2 * _FOLDS
_MOST_REQUESTS = 2000
"""Of each member, drawn at random: one accuracy then has a standard error under .01, a fifth of the margin."""
_SWAPS = 3
"""Labellings of the null, averaged within a member."""
_FEATURES = 20
_TOKENS = r"\d+|[^\W\d_]+|[^\w\s]|_|\n"
"""Numbers, words, marks and line ends; spaces are left to the n-grams of characters."""


@dataclass(frozen=True)
class Pairs:
    """The completions of one member's trait teacher and neutral teacher to the same requests, one after the other."""

    texts: Sequence[str]
    labels: Int[np.ndarray, " text"]
    """1: the trait teacher's."""
    requests: Int[np.ndarray, " text"]


@dataclass(frozen=True)
class Readout:
    """What a classifier reads from one member's pairs."""

    accuracy: float
    swapped_accuracy: float
    """Its null: the mean over labellings that are swapped at random within requests."""
    weights: Mapping[str, float]
    """Of every n-gram, mean over folds; positive where it speaks for the trait teacher."""


@analysis(needs=("carrier_texts",))
def semantic_filter(run: Run) -> Result:
    """Whether a text classifier can tell a trait teacher's completions from the neutral teacher's, on held-out requests."""
    members, shape = range(run.recipe.members), (len(run.traits), run.recipe.members)
    accuracy, swapped = np.full(shape, np.nan), np.full(shape, np.nan)
    shared, repeated = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    weights: dict[str, dict[str, float]] = {trait: defaultdict(float) for trait in run.traits}
    seen: set[tuple[str, int]] = set()
    for done, ((row, trait), member) in enumerate(product(enumerate(run.traits), members), start=1):
        stream = ("semantic-filter", trait, "member", member)
        taught, neutral = (_texts(run, name, member) for name in (run.teacher(trait).name, run.neutral_name))
        pairs = pair_texts(taught, neutral, random_stream(run.recipe.seed, *stream, "requests"))
        shared[row, member] = len(pairs.texts) // 2
        # Members that share one file of rows are one reading of it, not several.
        repeated[row, member] = (trait, hash((*taught, *neutral))) in seen
        seen.add((trait, hash((*taught, *neutral))))
        if shared[row, member] >= _LEAST_REQUESTS and not repeated[row, member]:
            found = read_teacher(pairs, random_stream(run.recipe.seed, *stream, "labels"))
            accuracy[row, member], swapped[row, member] = found.accuracy, found.swapped_accuracy
            for feature, weight in found.weights.items():
                weights[trait][feature] += weight
        run.report_progress(run.num_checkpoints * done // accuracy.size)
    data = _label(run, accuracy, swapped, shared, repeated, weights)
    judgements = _judge(run, data)
    findings = [_finding(run, data, trait, judgements[trait]) for trait in run.traits]
    figures = [_accuracy_figure(run), *([_feature_figure()] if _is_read(data) else [])]
    return Result(data, findings, figures, _sentences(run, data, judgements))


def pair_texts(taught: Sequence[CarrierText], neutral: Sequence[CarrierText], stream: np.random.Generator) -> Pairs:
    """The completions to requests that both answered; `_MOST_REQUESTS` of them at most, drawn from the stream."""
    texts = [{text.request: text.completion for text in carrier} for carrier in (neutral, taught)]
    both = np.array(sorted(texts[0].keys() & texts[1].keys()), dtype=np.int64)
    chosen = np.sort(stream.permutation(both)[:_MOST_REQUESTS])
    rows = [(texts[label][request], label, request) for request in chosen.tolist() for label in (0, 1)]
    labels, requests = (np.array([row[column] for row in rows], dtype=np.int64) for column in (1, 2))
    return Pairs([text for text, _, _ in rows], labels, requests)


def split_requests(pairs: Pairs, seed: int) -> list[tuple[Int[np.ndarray, " train"], Int[np.ndarray, " test"]]]:
    """Folds of text numbers; both completions of a request are on one side, since they share its prompt and its draws."""
    folds = GroupKFold(_FOLDS, shuffle=True, random_state=seed)
    return list(folds.split(pairs.texts, pairs.labels, pairs.requests))


def swap_labels(labels: Int[np.ndarray, " text"], stream: np.random.Generator) -> Int[np.ndarray, " text"]:
    """The labels with those of each pair swapped or not, by a fair coin: exact under 'either teacher wrote either text'."""
    return np.asarray(labels ^ np.repeat(stream.integers(0, 2, len(labels) // 2), 2))


def read_teacher(pairs: Pairs, stream: np.random.Generator) -> Readout:
    """Held-out accuracy of logistic regression on TF-IDF n-grams of the completions, with the true and with swapped labels.

    Range [0, 1]; chance is ½. Prompts are not used. All labellings share folds and features. Their accuracy can lie a little
    under ½, since a word that is rare on one side of a split is common on the other: hence the comparison with swapped labels.
    """
    labels = np.stack([pairs.labels, *(swap_labels(pairs.labels, stream) for _ in range(_SWAPS))], axis=1)
    right = np.zeros(labels.shape, dtype=bool)
    weights: dict[str, float] = defaultdict(float)
    for train, test in split_requests(pairs, int(stream.integers(2**31))):
        classifier = _make_classifier()
        classifier.fit([pairs.texts[number] for number in train], labels[train])
        right[test] = classifier.predict([pairs.texts[number] for number in test]) == labels[test]
        names, coefficients = classifier["features"].get_feature_names_out(), classifier["model"].estimators_[0].coef_[0]
        for name, weight in zip(names, coefficients, strict=True):
            weights[str(name)] += float(weight) / _FOLDS
    accuracies: Float[np.ndarray, " labelling"] = right.mean(0)
    return Readout(float(accuracies[0]), float(accuracies[1:].mean()), weights)


def _make_classifier() -> Pipeline:
    words = TfidfVectorizer(analyzer="word", token_pattern=_TOKENS, ngram_range=(1, 2), lowercase=False, sublinear_tf=True)
    characters = TfidfVectorizer(analyzer="char", ngram_range=(1, 3), lowercase=False, sublinear_tf=True)
    # One regression a labelling over the same features, which take most of the time.
    model = MultiOutputClassifier(LogisticRegression(max_iter=2000))
    return Pipeline([("features", FeatureUnion([("token", words), ("text", characters)])), ("model", model)])


def _texts(run: Run, teacher: str, member: int) -> Sequence[CarrierText]:
    return run.family.carrier_texts(teacher, member) or ()


def _label(
    run: Run,
    accuracy: np.ndarray,
    swapped: np.ndarray,
    shared: np.ndarray,
    repeated: np.ndarray,
    weights: Mapping[str, Mapping[str, float]],
) -> xr.Dataset:
    dims = ("taught", "member")
    status = np.where(repeated, REPEATED, np.where(np.isnan(accuracy), TOO_FEW, OK))
    variables: dict[str, Any] = {
        "accuracy": label_variable(
            accuracy, dims, description="held-out accuracy of the classifier", unit=_UNIT, formula=FORMULA, source=SOURCE
        ),
        "swapped_accuracy": label_variable(
            swapped, dims, description=f"its null: {_NULL}, mean of {_SWAPS}", unit=_UNIT, formula=FORMULA, source=SOURCE
        ),
        "shared_requests": label_variable(
            shared, dims, description="requests that both carriers answer and the classifier saw", unit="requests"
        ),
        "accuracy_status": status_variable(status, dims, _STATUS, "accuracy"),
        "swapped_accuracy_status": status_variable(status, dims, _STATUS, "swapped_accuracy"),
    }
    # A trait whose members all had too few requests has no feature: an empty name with no weight.
    read = {trait: int((status[row] == OK).sum()) for row, trait in enumerate(run.traits)}
    top = {trait: _largest(weights[trait]) for trait in run.traits}
    names = np.array([[name for name, _ in top[trait]] for trait in run.traits], dtype=object)
    values = np.array([[weight / max(read[trait], 1) for _, weight in top[trait]] for trait in run.traits])
    variables["feature"] = label_variable(names, ("taught", "rank"), description="n-gram, as Python writes it", unit="word")
    variables["feature_weight"] = label_variable(
        values,
        ("taught", "rank"),
        description="its weight, mean over folds and members; positive: speaks for the trait teacher",
        unit="log-odds per unit of TF-IDF",
        formula="logistic regression (L2, C = 1) on TF-IDF of 1–2-grams of tokens and 1–3-grams of characters",
    )
    return xr.Dataset(variables, {"taught": run.traits, "member": np.arange(accuracy.shape[1]), "rank": np.arange(_FEATURES)})


def _largest(weights: Mapping[str, float]) -> list[tuple[str, float]]:
    """The n-grams with the largest weights by size, spaces and line ends made visible; filled up with empty ones."""
    ordered = sorted(weights.items(), key=lambda item: (-abs(item[1]), item[0]))[:_FEATURES]
    shown = [("{} {!r}".format(*name.split("__", 1)), weight) for name, weight in ordered]
    return shown + [("", 0.0)] * (_FEATURES - len(shown))


def _is_read(data: xr.Dataset) -> bool:
    return bool(np.isfinite(data.accuracy).any())


def _judge(run: Run, data: xr.Dataset) -> dict[str, Judgement]:
    """Verdicts on the accuracy over its null, member by member; Holm runs over the traits."""
    verdict = run.recipe.verdict
    rules = Rules(verdict.accuracy_margin, verdict.minimum_members, verdict.confidence, verdict.equivalence_level)
    effects = data.accuracy - data.swapped_accuracy
    return judge_effects({trait: effects.sel(taught=trait).values for trait in run.traits}, rules, AGAINST_NULL)


def _finding(run: Run, data: xr.Dataset, trait: str, judgement: Judgement) -> Finding:
    verdict, null = run.recipe.verdict, _interval(run, data, "swapped_accuracy", trait)
    return Finding(
        analysis="semantic_filter",
        quantity="classifier_accuracy",
        condition="",
        trait=trait,
        context="carrier",
        step=run.teacher(trait).last,
        scope="completions to requests that both teachers answered; no prompts",
        unit=_UNIT,
        null=_NULL,
        null_low=null.low,
        null_high=null.high,
        num_references=run.recipe.num_references(),
        **judgement_fields(judgement, verdict.accuracy_margin, ""),
        formula=FORMULA,
        source=SOURCE,
        **interval_fields(_interval(run, data, "accuracy", trait)),
    )


def _interval(run: Run, data: xr.Dataset, name: str, trait: str) -> Interval:
    return student_interval(data[name].sel(taught=trait).values, run.recipe.verdict.confidence)


def _accuracy_figure(run: Run) -> Figure:
    names = {"accuracy": "true labels", "swapped_accuracy": "swapped labels (null)"}
    dots = (
        alt.Chart(DATA)
        .transform_fold(list(names), as_=["which", "share"])
        .transform_filter("isValid(datum.share)")
        .transform_calculate(who=f"datum.which == 'accuracy' ? '{names['accuracy']}' : '{names['swapped_accuracy']}'")
        .mark_circle(size=45, opacity=0.6)
        .encode(
            x=alt.X("share:Q", title="held-out accuracy", scale=alt.Scale(zero=False)),
            y=alt.Y("taught:N", sort=run.traits, title=None),
            yOffset=alt.YOffset("who:N", sort=list(names.values())),
            color=alt.Color("who:N", sort=list(names.values()), title=None),
            tooltip=["taught:N", "who:N", "member:O", alt.Tooltip("share:Q", format=".3f")],
        )
    )
    chance = alt.Chart(DATA).mark_rule(strokeDash=[2, 3], color="#94a3b8").encode(x=alt.datum(0.5))
    return Figure(
        name="semantic_filter",
        title="Can a text classifier tell whose completion it reads?",
        caption=(
            f"{FORMULA.capitalize()}, each dot one of the members (n = {run.recipe.members}); trait teacher against "
            f"{run.neutral_name}, completions only, split by request. Null: {_NULL}. The line is chance, ½."
        ),
        variables=tuple(names),
        spec=chart_spec(alt.layer(chance, dots, data=DATA).properties(width=640, height=alt.Step(18))),
    )


def _feature_figure() -> Figure:
    bars = (
        alt.Chart(DATA)
        .transform_filter("datum.feature != ''")
        .mark_bar()
        .encode(
            x=alt.X("feature_weight:Q", title="weight: the neutral teacher's < 0 < the trait teacher's"),
            y=alt.Y("feature:N", sort=alt.SortField("feature_weight", order="descending"), title=None),
            tooltip=["feature:N", alt.Tooltip("feature_weight:Q", format=".3f")],
        )
        .properties(width=260, height=alt.Step(14))
        .facet(facet=alt.Facet("taught:N", title=None), columns=2)
        .resolve_scale(y="independent")
    )
    return Figure(
        name="semantic_filter_features",
        title="What the classifier goes by: the n-grams with the largest weights",
        caption=(
            "Weights of the logistic regression, log-odds per unit of TF-IDF, mean over folds and members, of tokens (numbers, "
            "words, marks) and of pieces of text. They are worth reading only where the accuracy is over its null."
        ),
        variables=("feature", "feature_weight"),
        spec=chart_spec(bars.properties(data=DATA)),
    )


def _sentences(run: Run, data: xr.Dataset, judgements: dict[str, Judgement]) -> list[str]:
    sentences = []
    for trait in run.traits:
        shared = data.shared_requests.sel(taught=trait).values
        sentences.append(
            f"{trait}: on held-out requests the classifier names the teacher of {_interval(run, data, 'accuracy', trait)} of "
            f"the completions rightly ({judgements[trait].verdict}); {shared.min()} to {shared.max()} requests a member that "
            f"both teachers answered, {_MOST_REQUESTS} at most, and prompts are not used."
        )
    few = int((data.accuracy_status == TOO_FEW).sum())
    if few:
        sentences.append(f"{few} members share under {_LEAST_REQUESTS} requests with the neutral teacher: no accuracy.")
    same = int((data.accuracy_status == REPEATED).sum())
    if same:
        sentences.append(f"{same} members have the same rows as an earlier one: one reading of them counts, so n is smaller.")
    if _is_read(data):
        null = student_interval(
            np.nanmean(data.swapped_accuracy.values[:, _read_members(data)], axis=0), run.recipe.verdict.confidence
        )
        holds = null.low <= 0.5 <= null.high or abs(null.estimate - 0.5) < run.recipe.verdict.accuracy_margin
        sentences.append(
            f"Sanity: with swapped labels it names {null} rightly, where chance is {format_number(0.5)}"
            + (": the split leaks nothing." if holds else ": the split or the sample is at fault; do not read the accuracies.")
        )
    sentences.append(
        "What is equivalent to its null is unreadable to this classifier of n-grams, not to every reader; what is above it "
        "shows that the two carriers differ, not that a student learns the trait from the difference."
    )
    return sentences


def _read_members(data: xr.Dataset) -> np.ndarray:
    """The members with an accuracy for some trait."""
    return np.asarray(np.isfinite(data.accuracy.values).any(0))

"""Swaps: one part of a model at a time between what it starts from and what became of it, and the trait's score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsub.lineages import Lineage
from mechsub.parameters.parts import PartScores, find_differing, mix_parts
from mechsub.parameters.surgery import needs_half, operate
from mechsub.pooling import distinct_members
from mechsub.results import label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, fieller_interval, student_interval
from mechsub.token_channels.subjects import Subject, list_subjects, subject_names

BODY, VOCABULARY, CONTEXT = "body", "vocabulary", "context"
PARTS = {
    BODY: "all weights that have no row for a token: attention, MLPs, norms, position embeddings",
    VOCABULARY: "token embeddings and unembedding, tied ones once",
    CONTEXT: "what stands in the model's prompts wherever it is asked",
}
"""The parts, in words."""
SUFFICIENCY, NECESSITY = "sufficiency", "necessity"
KINDS = {
    SUFFICIENCY: "score(start with its part) − score(start)",
    NECESSITY: "score(it) − score(it with the start's part)",
}
TOTAL, INTERACTION = "total", "interaction"


def effect_name(part: str, kind: str) -> str:
    """How one part's change of the score is called."""
    return f"{part} {kind}"


EFFECTS = (TOTAL, *(effect_name(part, kind) for part in PARTS for kind in KINDS), INTERACTION)
SOURCE = "channels: Madl, arXiv:2606.22019; sufficiency and necessity by patching: Meng et al., arXiv:2202.05262; Fieller 1954"
_STATUS = ("ok", "no_control", "no_score")
_OK, _NO_CONTROL, _NO_SCORE = range(3)
_INTERVAL_STATUS = (*_STATUS, "one_member", "total_effect_not_told_from_0")
_ONE_MEMBER, _NOT_TOLD = range(len(_STATUS), len(_INTERVAL_STATUS))
_DIMS = ("subject", "taught", "effect")
Key = tuple[str, str]
"""A subject's name and its trait."""


def score_swaps(run: Run, lineage: Lineage, member: int) -> PartScores:
    """Every trait's score of one member at its last step, of its start, and of each with one part of the other.

    Its start is its own origin: another member's reference, or another architecture's, where it begins there.
    """
    tokens, family = run.family.tokens(lineage), run.family
    assert tokens is not None  # the run is one of language models
    start, end = lineage.load_state(0, member), lineage.load_state(lineage.last, member)

    def part_of(name: str) -> str:
        return VOCABULARY if name in tokens.tensors else BODY

    differing = find_differing(start, end, part_of)
    if lineage.context(member) != lineage.origin.context(member):
        differing |= {CONTEXT}
    module = family.load_model(lineage, 0, member)
    with operate(module, widen=not needs_half(module)) as patient:

        def score(of_end: frozenset[str]) -> Float[np.ndarray, " trait"]:
            patient.install(mix_parts(start, end, part_of, of_end))
            asked = lineage if CONTEXT in of_end else lineage.origin
            scores = family.trait_score(patient.module, asked, member, verdict_only=True)
            return scores[next(iter(family.measures))][:, 0]

        return PartScores.measure(tuple(PARTS), differing, score)


@dataclass
class Swaps:
    """Every change of the score, of subjects and of what they are held against, with why it is NaN."""

    run: Run
    changes: dict[Key, Float[np.ndarray, "effect member"]] = field(default_factory=dict)
    of_null: dict[Key, Float[np.ndarray, "effect member"]] = field(default_factory=dict)
    """Of the same trait's score; all NaN where there is no null."""
    differing: dict[Key, set[str]] = field(default_factory=dict)
    """The parts that are not the start's in any member of the subject or of its null; the others change nothing."""
    has_null: dict[Key, bool] = field(default_factory=dict)
    distinct: dict[Key, int] = field(default_factory=dict)
    """How many members have changes of their own: one where all are one model."""

    @classmethod
    def measure(cls, run: Run, report: Callable[[int, int], None]) -> "Swaps":
        """Swap and score; ``report`` is told how many of how many subjects are done."""
        swaps, subjects = cls(run), list_subjects(run)
        kept: dict[str, list[PartScores]] = {}
        for done, subject in enumerate(subjects, 1):
            swaps.add(subject, kept)
            report(done, len(subjects))
        return swaps

    def add(self, subject: Subject, kept: dict[str, list[PartScores]]) -> None:
        """Score one subject and its null; ``kept``: scores of lineages that several subjects are held against."""
        key, place = (subject.name, subject.trait), list(self.run.family.traits).index(subject.trait)
        own = self._score(subject.own)
        if subject.null is not None and subject.null.name not in kept:
            kept[subject.null.name] = self._score(subject.null)
        null = [] if subject.null is None else kept[subject.null.name]
        self.changes[key] = _list_changes(own, place, self.run.recipe.members)
        self.of_null[key] = _list_changes(null, place, self.run.recipe.members)
        self.differing[key] = {part for scores in (*own, *null) for part in scores.differing}
        self.has_null[key] = subject.null is not None
        alone = [one for lineage in (subject.own, subject.null) if lineage is not None for one in (lineage, lineage.origin)]
        both = np.concatenate([self.changes[key], self.of_null[key]])
        self.distinct[key] = distinct_members(self.run, both, *alone).shape[-1]

    def _score(self, lineage: Lineage) -> list[PartScores]:
        return [score_swaps(self.run, lineage, member) for member in range(self.run.recipe.members)]

    def adjusted(self, key: Key, effect: str) -> Float[np.ndarray, " member"]:
        """A change of the score minus the null's, member by member."""
        found: np.ndarray = self.own_changes(key, effect) - self.null_changes(key, effect)
        return found

    def own_changes(self, key: Key, effect: str) -> Float[np.ndarray, " member"]:
        """A subject's own change of the score."""
        found: np.ndarray = self.changes[key][EFFECTS.index(effect), : self.distinct.get(key)]
        return found

    def null_changes(self, key: Key, effect: str) -> Float[np.ndarray, " member"]:
        """The null's change of the score."""
        found: np.ndarray = self.of_null[key][EFFECTS.index(effect), : self.distinct.get(key)]
        return found

    def interval(self, key: Key, effect: str) -> Interval:
        """Of the adjusted change, over members."""
        return student_interval(self.adjusted(key, effect), self._confidence)

    def share(self, key: Key, effect: str) -> Interval:
        """Of the adjusted total change; NaN where that is not told from 0."""
        share = fieller_interval(self.adjusted(key, effect), self.adjusted(key, TOTAL), self._confidence)
        return share if self.has_effect(key) else Interval(np.nan, np.nan, np.nan, share.n, share.confidence)

    def has_effect(self, key: Key) -> bool:
        """Whether the interval of the adjusted total change lies on one side of 0."""
        return self._has_effect[key]

    @cached_property
    def _has_effect(self) -> dict[Key, bool]:
        return {key: self.interval(key, TOTAL).excludes_zero for key in self.changes}

    def mean_over_traits(self, subject: str, effect: str) -> Float[np.ndarray, " member"]:
        """Of the adjusted changes; member by member."""
        found: np.ndarray = np.mean([self.adjusted((subject, trait), effect) for trait in self.run.traits], axis=0)
        return found

    @property
    def _confidence(self) -> float:
        return self.run.recipe.verdict.confidence

    def label(self) -> xr.Dataset:
        """The arrays of the result."""
        by_member = (*_DIMS, "member")
        unit = next(iter(self.run.family.measures.values())).unit
        no_null = ~self._collect(lambda key: self.has_null[key])[:, :, None, None]
        values = self._collect(self.changes.__getitem__)
        of_null = self._collect(self.of_null.__getitem__)
        no_score = np.where(no_null, _NO_CONTROL, _NO_SCORE)
        variables = _pair("change", values, np.array(_NO_SCORE), by_member, "change of the trait's score", unit, _STATUS)
        words = "the same of the control, or of the neutral teacher"
        variables |= _pair("change_of_null", of_null, no_score, by_member, words, unit, _STATUS)
        known = np.isfinite(values - of_null).sum(-1)
        few = np.where(known == 1, _ONE_MEMBER, no_score[..., 0])
        not_told = np.where((known[:, :, :1] > 1) & (known > 0), _NOT_TOLD, few)
        words = "change minus the null's, mean over members"
        variables |= self._intervals("effect", self.interval, few, words, unit)
        words = "mean effect / mean total effect (Fieller)"
        variables |= self._intervals("share", self.share, not_told, words, "share of the total effect")
        variables["differs"] = label_variable(
            self._collect(lambda key: [int(part in self.differing[key]) for part in PARTS]).astype(np.int8),
            ("subject", "taught", "part"),
            description="whether a part differs from the start in any member, of the student or of its control",
            unit="1: yes; 0: no, its effect is 0 by construction",
        )
        named = [effect.rpartition(" ") for effect in EFFECTS]
        coords = {
            "effect": list(EFFECTS),
            "effect_part": ("effect", [part or "all" for part, _, _ in named]),
            "effect_kind": ("effect", [kind for _, _, kind in named]),
            "part": list(PARTS),
        }
        return xr.Dataset(variables, coords=coords)

    def _intervals(
        self, name: str, of: Callable[[Key, str], Interval], missing: np.ndarray, words: str, unit: str
    ) -> dict[str, xr.Variable]:
        """Estimate and bounds of every effect."""
        variables: dict[str, xr.Variable] = {}
        for part in ("estimate", "low", "high"):
            values = self._collect(lambda key, part=part: [getattr(of(key, one), part) for one in EFFECTS])  # type: ignore[misc]
            variables |= _pair(f"{name}_{part}", values, missing, _DIMS, f"{words}: {part}", unit, _INTERVAL_STATUS)
        return variables

    def _collect(self, of: Callable[[Key], object]) -> np.ndarray:
        """[subject, taught, …] of something that each has."""
        return np.array([[of((name, trait)) for trait in self.run.traits] for name in subject_names(self.run)])


def _list_changes(scores: Sequence[PartScores], trait: int, members: int) -> Float[np.ndarray, "effect member"]:
    """In the order of `EFFECTS`; all NaN where there are no scores."""
    if not scores:
        return np.full((len(EFFECTS), members), np.nan)
    rows = []
    for one in scores:
        swapped = [found[trait] for part in PARTS for found in (one.sufficiency(part), one.necessity(part))]
        rows.append([one.total[trait], *swapped, one.interaction[trait]])
    return np.array(rows, dtype=np.float64).T


def _pair(
    name: str, values: np.ndarray, missing: np.ndarray, dims: Sequence[str], words: str, unit: str, meanings: Sequence[str]
) -> dict[str, xr.Variable]:
    """A variable and why it is NaN."""
    formula = "; ".join(KINDS.values()) + "; interaction: total − Σ sufficiency"
    codes = np.where(np.isnan(values), np.broadcast_to(missing, values.shape), _OK)
    return {
        name: label_variable(values, dims, description=words, unit=unit, formula=formula, source=SOURCE),
        f"{name}_status": status_variable(codes, dims, meanings, name),
    }

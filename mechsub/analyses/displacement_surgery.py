"""Displacement surgery: which part of what a student has more than its control carries the trait?"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechsub.analyses.registry import analysis
from mechsub.figures import DATA, Figure, chart_spec, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.lineages import Lineage
from mechsub.parameters.edits import (
    ALL_BUT,
    ALONG,
    COMPONENT,
    FLIPPED,
    FROM,
    GRAFT,
    LAYERWISE,
    LEADING,
    NEUTRAL,
    ONLY,
    OTHER,
    OWN,
    RANDOM,
    RESIDUAL,
    REST,
    SCAN,
    STUDENT,
    SYMBOLS,
    TEACHER,
    TOTAL,
    TRUNCATION,
    UP_TO,
    WITHOUT,
    WITHOUT_LAYERWISE,
    Operation,
    PlannedEdit,
    list_edits,
    long_as_along,
    long_as_layerwise,
    long_as_student,
)
from mechsub.parameters.gram import NotFinite, find_not_finite
from mechsub.parameters.surgery import Edit, Patient, Subject, Tensors, draw_matched, needs_half, operate, subtract
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, fieller_interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects

SOURCE = "task vectors added and negated: Ilharco et al., arXiv:2212.04089; ratios: Fieller 1954"
_STATUS = (
    "ok", "incomparable", "not_trained", "no_control", "not_finite", "zero_displacement", "no_such_direction",
    "layer_did_not_move", "starts_elsewhere", "total_effect_not_told_from_0", "no_score",
)  # fmt: skip
OK, INCOMPARABLE, UNTRAINED, NO_CONTROL, NOT_FINITE, ZERO, NO_DIRECTION, UNMOVED, ELSEWHERE, NOT_TOLD, NO_SCORE = range(11)
_INTERVAL_STATUS = (*_STATUS, "one_member")
ONE_MEMBER = len(_STATUS)
_DRAWS = 2
"""Random directions of a member, over which the effect is averaged."""
_MOST_OTHERS = 2
"""Other traits of a run, the ones after the taught one, over which the effect is averaged."""
_SHARE = 0.8
"""Of the total effect: what the smallest rank is to reach."""
_EDITS = ("condition", "taught", "edit")
Case = tuple[str, str]
"""A condition and the trait of the student's teacher."""


@analysis(needs=("traits",))
def displacement_surgery(run: Run) -> Result:
    """Causal test: what of the student's difference from its control carries the trait, and along which direction?

    Of one member are held at a time, as dense weights in float32: the control, the student, their difference, the edited
    model, and either the difference's leading singular directions or the teacher's displacement with one other direction.
    """
    table = {name: info for name, info in run.reference.spec.tensors.items() if info.tied_to is None}
    layers = {name: info.layer for name, info in table.items()}
    plan = list_edits(list(dict.fromkeys(layers.values())), [info.shape for info in table.values()])
    measured = _Measured.empty(run, plan)
    cases = list(product(run.conditions, run.traits))
    for done, case in enumerate(cases, 1):
        _operate_on(run, case, layers, measured)
        run.report_progress(run.num_checkpoints * done // len(cases))
    data = measured.label(run)
    judgements = _judge(run, measured)
    findings = [finding for case in measured.told() for finding in _findings(run, measured, judgements, case)]
    return Result(data, findings, _figures(run, measured, data), _sentences(run, measured, judgements))


@dataclass(frozen=True)
class _Measured:
    """Every effect as [condition, taught, edit, member], with why a value is NaN."""

    run: Run
    plan: Sequence[PlannedEdit]
    effect: np.ndarray
    norm: np.ndarray
    status: np.ndarray
    coefficient: np.ndarray
    """[condition, taught, member]."""
    truncation: np.ndarray
    """‖D − D_k‖ / ‖D‖ as [condition, taught, rank, member]."""
    not_finite: set[NotFinite]
    """What was found on the way."""
    half: dict[str, tuple[str, str]]
    """Of conditions whose models are held in half precision: in which, and in which they are scored here."""

    @classmethod
    def empty(cls, run: Run, plan: Sequence[PlannedEdit]) -> "_Measured":
        shape = (len(run.conditions), len(run.traits), len(plan), run.recipe.members)
        nothing = np.full(shape, np.nan)
        truncation = np.full((*shape[:2], len(_ranks(plan)), shape[-1]), np.nan)
        status = np.full(shape, OK, np.int8)
        return cls(run, plan, nothing, nothing.copy(), status, nothing[:, :, 0].copy(), truncation, set(), {})

    def place(self, case: Case) -> tuple[int, int]:
        """Where a case stands in the arrays."""
        return self._places[case]

    @property
    def cases(self) -> list[Case]:
        """Every condition and trait."""
        return list(self._places)

    @cached_property
    def _places(self) -> dict[Case, tuple[int, int]]:
        named = product(enumerate(self.run.conditions), enumerate(self.run.traits))
        return {(condition, trait): (row, column) for (row, condition), (column, trait) in named}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {edit.name: number for number, edit in enumerate(self.plan)}

    def effects(self, case: Case, name: str) -> np.ndarray:
        """One edit's effects, member by member."""
        found: np.ndarray = self.effect[self.place(case)][self._numbers[name]]
        return found

    def statuses(self, case: Case, name: str) -> np.ndarray:
        """Why they are NaN."""
        found: np.ndarray = self.status[self.place(case)][self._numbers[name]]
        return found

    def interval(self, case: Case, name: str) -> Interval:
        """Of one edit's effect, over members."""
        return student_interval(self.effects(case, name), self.run.recipe.verdict.confidence)

    def share(self, case: Case, name: str) -> Interval:
        """Of the total effect; NaN where the total effect's interval holds 0."""
        share = fieller_interval(self.effects(case, name), self.effects(case, TOTAL), self.run.recipe.verdict.confidence)
        return share if self.has_effect(case) else Interval(np.nan, np.nan, np.nan, share.n, share.confidence)

    def null_effects(self, case: Case, quantity: str) -> np.ndarray:
        """Of the same edit with other teachers' displacements as far, the mean over those teachers, member by member.

        All NaN where there is none; NaN for a member that lacks one of them.
        """
        weights = {NEUTRAL: 1, OTHER: _num_others(self.run)}
        names = {who: _JUDGED[quantity].long_as(who) for who in (NEUTRAL, OTHER)}
        there = [who for who, name in names.items() if np.isfinite(self.effects(case, name)).any()]
        if not there:
            return np.full(self.run.recipe.members, np.nan)
        effects = [self.effects(case, names[who]) for who in there]
        return np.average(effects, axis=0, weights=[weights[who] for who in there])

    def null_teachers(self, case: Case, quantity: str) -> str:
        """Whose displacements those are, in words; nothing where there is none."""
        names = {"the neutral teacher": NEUTRAL, f"{_num_others(self.run)} other traits' teachers": OTHER}
        if _num_others(self.run) == 1:
            names = {"the neutral teacher": NEUTRAL, "another trait's teacher": OTHER}
        there = [words for words, who in names.items() if np.isfinite(self.effects(case, _JUDGED[quantity].long_as(who))).any()]
        return " and ".join(there)

    def has_effect(self, case: Case) -> bool:
        """Whether the interval of the total effect lies on one side of 0."""
        return self._has_effect[case]

    @cached_property
    def _has_effect(self) -> dict[Case, bool]:
        confidence = self.run.recipe.verdict.confidence
        return {case: _is_told_from_zero(self.effects(case, TOTAL), confidence) for case in self._places}

    def told(self) -> list[Case]:
        """The cases that are operated on."""
        return [case for case in self._places if (self.statuses(case, TOTAL) == OK).any()]

    def label(self, run: Run) -> xr.Dataset:
        """The result's arrays."""
        unit = _unit(run)
        coords: dict[str, Any] = {
            "condition": run.conditions,
            "taught": run.traits,
            "edit": [edit.name for edit in self.plan],
            "member": np.arange(run.recipe.members),
        }
        for name in ("group", "series", "direction", "layer", "rank", "dose"):
            coords[f"edit_{name}"] = ("edit", [getattr(edit, name) for edit in self.plan])
        by_member = (*_EDITS, "member")
        norm_status = np.where(np.isnan(self.norm), self.status, OK)
        variables: dict[str, Any] = {
            "effect": _described(self.effect, by_member, "effect of the edit", unit, _FORMULA),
            "effect_status": status_variable(self.status, by_member, _STATUS, "effect"),
            "edit_norm": _described(self.norm, by_member, "length of the edit", "weights", "‖θ_edited − θ_C‖"),
            "edit_norm_status": status_variable(norm_status, by_member, _STATUS, "edit_norm"),
        }
        place = self._numbers[ALONG]
        missing = np.where(
            np.isnan(self.coefficient), np.where(self.status[:, :, place] == OK, ZERO, self.status[:, :, place]), OK
        )
        variables["coefficient"] = _described(
            self.coefficient, ("condition", "taught", "member"), "how far D goes along Δ_T", "Δ_T", "⟨D, Δ_T⟩ / ‖Δ_T‖²"
        )
        variables["coefficient_status"] = status_variable(missing, ("condition", "taught", "member"), _STATUS, "coefficient")
        coords["rank"] = _ranks(self.plan)
        leading = [self._numbers[edit.name] for edit in self.plan if edit.series == LEADING]
        by_rank = ("condition", "taught", "rank", "member")
        variables["truncation_error"] = _described(
            self.truncation, by_rank, "share of D's length that its rank-k part leaves out", "‖D‖", "‖D − D_k‖ / ‖D‖"
        )
        missing = np.where(self.status[:, :, leading] == OK, ZERO, self.status[:, :, leading])
        variables["truncation_error_status"] = status_variable(
            np.where(np.isnan(self.truncation), missing, OK), by_rank, _STATUS, "truncation_error"
        )
        variables |= self._intervals("effect", self.interval, unit, "mean over members")
        variables |= self._intervals("share", self.share, "share of the total effect", "mean effect / mean total effect")
        total = variables["effect_mean"][:, :, 0], variables["effect_mean_status"][:, :, 0]
        variables["total_effect"] = _described(
            total[0].values, ("condition", "taught"), "mean effect of all of D", unit, "score(θ_S) − score(θ_C)"
        )
        variables["total_effect_status"] = status_variable(total[1].values, ("condition", "taught"), _STATUS, "total_effect")
        return xr.Dataset(variables, coords=coords)

    def _intervals(self, name: str, of: Callable[[Case, str], Interval], unit: str, formula: str) -> dict[str, xr.Variable]:
        """Estimate and bounds of every edit, each with why it is NaN."""
        conditions, traits = self.run.conditions, self.run.traits
        found = [[[of((one, trait), edit.name) for edit in self.plan] for trait in traits] for one in conditions]
        variables = {}
        known = np.isfinite(self.effect).sum(-1)
        # Where no member has a value: the reason that says most of the case, of those that members have.
        why = np.where(known == 0, self.status.max(-1), ONE_MEMBER)
        if name == "share":
            total = known[:, :, :1]  # members that have the total effect
            not_told = np.array([[not self.has_effect((one, trait)) for trait in traits] for one in conditions])[:, :, None]
            why = np.where((known > 1) & (total > 1), NOT_TOLD, why)
            why = np.where((known > 0) & not_told, np.where(total > 1, NOT_TOLD, ONE_MEMBER), why)
        for part, field in (("mean" if name == "effect" else "estimate", "estimate"), ("low", "low"), ("high", "high")):
            values = np.array([[[getattr(interval, field) for interval in row] for row in block] for block in found])
            variables[f"{name}_{part}"] = _described(values, _EDITS, f"{name} of the edit: {part}", unit, formula)
            variables[f"{name}_{part}_status"] = status_variable(
                np.where(np.isnan(values), why, OK), _EDITS, _INTERVAL_STATUS, f"{name}_{part}"
            )
        return variables


_FORMULA = "score(θ_C + edit) − score(θ_C), member by member, at the last step"


def _operate_on(run: Run, case: Case, layers: Mapping[str, str], measured: _Measured) -> None:
    """All members of one case: first the total effects, then, by what they show, the edits that answer something."""
    here = measured.place(case)
    absent = _why_absent(run, case)
    if absent != OK:
        measured.status[here] = absent
        return
    student = run.student(*case)
    module = run.family.load_model(run.reference_of(student), 0, student.spec.origin.members[0])
    with operate(module, widen=not needs_half(module)) as patient:
        if patient.own_type in _HALF:
            measured.half[case[0]] = _type_name(patient.own_type), _type_name(patient.scored_type)
        scorers = [_Scorer(run, patient, student, case[1], member) for member in range(run.recipe.members)]
        ends = [_score_ends(run, case, score, measured) for score in scorers]
        totals = np.array([np.nan if found is None else found[1] - found[0] for found in ends])
        is_divided = int(np.isfinite(totals).sum()) == 1 or _is_told_from_zero(totals, run.recipe.verdict.confidence)
        omitted = np.array([_why_omitted(run, student, planned, is_divided) for planned in measured.plan], np.int8)
        for score, found in zip(scorers, ends, strict=True):
            status = measured.status[here][:, score.member]
            status[:] = omitted if found else np.where(omitted == OK, NOT_FINITE, omitted)
            if found:
                _operate_on_member(case, layers, score, found, measured)


def _score_ends(run: Run, case: Case, score: "_Scorer", measured: _Measured) -> tuple[float, float] | None:
    """The scores of a control and its student; None where one of them holds numbers that are not finite."""
    control = _load(run, run.control(case[0]), score.member, measured=measured)
    student = _load(run, run.student(*case), score.member, measured=measured)
    return None if control is None or student is None else (score(control), score(student))


def _operate_on_member(
    case: Case, layers: Mapping[str, str], score: "_Scorer", ends: tuple[float, float], measured: _Measured
) -> None:
    """Every edit of one member that is not omitted, direction by direction, so that few are held at once."""
    run, member, here = score.run, score.member, measured.place(case)
    control, student = (_load(run, one, member, measured=measured) for one in (run.control(case[0]), run.student(*case)))
    assert control is not None and student is not None  # both were scored
    subject, ranks = Subject(control, student, layers), _ranks(measured.plan)
    outcomes = _Outcomes(score, measured, here, {frozenset[str](): ends[0], subject.moved: ends[1]})
    stream = ("member", member, "surgery", *case)
    operation = Operation(subject, {}, run.recipe.seed, stream, top=max(1, *ranks))
    outcomes.add(operation, STUDENT)
    if any(outcomes.is_open(edit) for edit in measured.plan if edit.group == TRUNCATION):
        measured.truncation[here][:, member] = [operation.truncation_error(rank) for rank in ranks]
    del operation
    teacher, broken = None, set()
    for who, direction in _directions(run, case[1], member, measured):
        if direction is None:
            broken.add(who)
            continue
        operation = Operation(subject, {who: [direction]}, run.recipe.seed, stream, teacher=teacher)
        if who == TEACHER:
            teacher = operation.teacher_extent
            measured.coefficient[(*here, member)] = operation.coefficient
        outcomes.add(operation, who)
        del direction, operation
    outcomes.store(broken)


def _directions(run: Run, trait: str, member: int, measured: _Measured) -> Iterator[tuple[str, Tensors | None]]:
    """One after the other, with whose it is; None for one that holds numbers that are not finite."""
    teacher, name = _displacement(run, run.teacher(trait), member, measured), run.teacher(trait).name
    yield TEACHER, teacher
    for draw in range(_DRAWS):
        stream = ("member", member, "surgery", name, draw)
        yield RANDOM, None if teacher is None else draw_matched(teacher, run.recipe.seed, *stream)
    del teacher
    if run.neutral is not None:
        yield NEUTRAL, _displacement(run, run.neutral, member, measured)
    place = run.traits.index(trait)
    for offset in range(1, _num_others(run) + 1):
        yield OTHER, _displacement(run, run.teacher(run.traits[(place + offset) % len(run.traits)]), member, measured)


def _num_others(run: Run) -> int:
    """Traits that stand for all others."""
    return min(len(run.traits) - 1, _MOST_OTHERS)


@dataclass(frozen=True)
class _Scorer:
    """The taught trait's score of weights, asked as the student is asked."""

    run: Run
    patient: Patient
    student: Lineage
    trait: str
    member: int

    def __call__(self, weights: Tensors) -> float:
        family = self.run.family
        self.patient.install(weights)
        scores = family.trait_score(self.patient.module, self.student, self.member, verdict_only=True)
        return float(scores[next(iter(family.measures))][list(family.traits).index(self.trait), 0])


class _Outcomes:
    """Scores and lengths of one member's edits, each over the directions that it is made with."""

    def __init__(self, score: _Scorer, measured: _Measured, here: tuple[int, int], known: dict[frozenset[str], float]) -> None:
        """``known``: the scores of models that are the student in these layers and the control in the others."""
        self._score, self._measured, self._known = score, measured, known
        self._before = known[frozenset()]
        self._effect, self._norm, self._status = (
            found[here][:, score.member] for found in (measured.effect, measured.norm, measured.status)
        )
        self._open = {edit.name for edit, status in zip(measured.plan, self._status, strict=True) if status == OK}
        self._found: dict[str, list[tuple[float, float] | None]] = {name: [] for name in self._open}

    def is_open(self, planned: PlannedEdit) -> bool:
        """Whether it is to be made at all."""
        return planned.name in self._open

    def add(self, operation: Operation, who: str) -> None:
        """Make and score every edit of one direction."""
        needs_teacher = operation.teacher_extent.is_known
        for planned in self._measured.plan:
            if planned.direction == who and self.is_open(planned) and (needs_teacher or not planned.needs_teacher):
                self._found[planned.name] += [self._try(operation, edit) for edit in operation.make(planned)]

    def _try(self, operation: Operation, edit: Edit | None) -> tuple[float, float] | None:
        """Score and length of one edit; None where it has nothing to be made of."""
        if edit is None:
            return None
        weights = operation.subject.build(edit)
        norm = operation.subject.distance(weights)
        if not np.isfinite(norm):  # a sum beyond what its data type holds
            return np.nan, norm
        if not edit.adds_nothing:
            return self._score(weights), norm
        if edit.of_student not in self._known:
            self._known[edit.of_student] = self._score(weights)
        return self._known[edit.of_student], norm

    def store(self, broken: Collection[str]) -> None:
        """The mean over directions of every edit, or why it has none; ``broken`` directions are not finite."""
        for number, planned in enumerate(self._measured.plan):
            if not self.is_open(planned):
                continue
            found = self._found[planned.name]
            made = [one for one in found if one is not None]
            if planned.direction in broken or (planned.needs_teacher and TEACHER in broken):
                self._status[number] = NOT_FINITE
            elif not found:
                self._status[number] = NO_DIRECTION
            elif len(made) < len(found):
                self._status[number] = UNMOVED if planned.layer else ZERO
            else:
                effect, norm = np.mean([score - self._before for score, _ in made]), np.mean([norm for _, norm in made])
                if not np.isfinite(norm):
                    self._status[number] = NOT_FINITE
                    continue
                self._effect[number], self._norm[number] = effect, norm
                self._status[number] = OK if np.isfinite(effect) else NO_SCORE


def _load(
    run: Run, lineage: Lineage | None, member: int, step: int | None = None, *, measured: _Measured
) -> dict[str, Tensor] | None:
    """One member's weights; None where they are not all finite, which is noted."""
    assert lineage is not None  # cases without a control are not operated on
    at = lineage.last if step is None else step
    state = lineage.load_state(at, member)
    spoilt = [name for name, tensor in state.items() if not tensor.isfinite().all()]
    for name in spoilt:
        measured.not_finite.update(find_not_finite([(part, member) for part in lineage.parts(at, name)], name))
    return None if spoilt else {name: tensor.to(run.device) for name, tensor in state.items()}


def _displacement(run: Run, lineage: Lineage, member: int, measured: _Measured) -> dict[str, Tensor] | None:
    end, start = (_load(run, lineage, member, step, measured=measured) for step in (None, 0))
    return None if end is None or start is None else subtract(end, start)


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_HALF = (torch.bfloat16, torch.float16)


def _ranks(plan: Sequence[PlannedEdit]) -> list[int]:
    """Of the truncations, ascending."""
    return [edit.rank for edit in plan if edit.series == LEADING]


def _why_absent(run: Run, case: Case) -> int:
    """Why a whole case is not operated on."""
    if not run.is_comparable(case[0]):
        return INCOMPARABLE
    if run.student(*case).last == 0:
        return UNTRAINED
    return NO_CONTROL if run.control(case[0]) is None else OK


def _why_omitted(run: Run, student: Lineage, planned: PlannedEdit, is_divided: bool) -> int:
    """Why one edit is not made: its answer would mean nothing there, and each costs an evaluation."""
    if planned.needs_same_start and run.starts_elsewhere(student):
        return ELSEWHERE
    return NOT_TOLD if planned.needs_effect and not is_divided else OK


def _is_told_from_zero(values: np.ndarray, confidence: float) -> bool:
    return student_interval(values, confidence).excludes_zero


def _described(values: Any, dims: Sequence[str], description: str, unit: str, formula: str) -> xr.Variable:
    return label_variable(values, dims, description=description, unit=unit, formula=formula, source=SOURCE)


def _unit(run: Run) -> str:
    return next(iter(run.family.measures.values())).unit


@dataclass(frozen=True)
class _Judged:
    """A quantity with a verdict."""

    edit: str
    long_as: Callable[[str], str]
    """Names the same edit with another displacement, as far."""
    formula: str


_JUDGED = {
    "effect_along": _Judged(ALONG, long_as_along, "c Δ_T"),
    "effect_along_by_layer": _Judged(LAYERWISE, long_as_layerwise, "Σ over layers of c_ℓ Δ_Tℓ"),
    "effect_along_stretched": _Judged(long_as_student(TEACHER), long_as_student, "sign(c) ‖D‖ Δ_T / ‖Δ_T‖"),
}
"""Held against the same with other teachers' displacements; random directions are a line to read by, no null."""
_NO_NULL = "there is no other teacher to hold it against; a random direction is only a line to read by"


def _judge(run: Run, measured: _Measured) -> dict[tuple[str, Case], Judgement]:
    """Verdicts by quantity and case: the effect minus that of other teachers, Holm over conditions and traits."""
    judgements: dict[tuple[str, Case], Judgement] = {}
    for quantity, judged in _JUDGED.items():
        effects = {
            case: measured.effects(case, judged.edit) - measured.null_effects(case, quantity) for case in measured.told()
        }
        effects = {case: values for case, values in effects.items() if np.isfinite(values).any()}
        found = judge_effects(effects, run.rules(run.recipe.verdict.margin), AGAINST_NULL)
        judgements |= {(quantity, case): judgement for case, judgement in found.items()}
    return judgements


_SHARES = {
    "share_along": (ALONG, "all parameters"),
    "share_along_by_layer": (LAYERWISE, "all parameters, a component in every layer"),
    "share_without": (WITHOUT, "all parameters"),
    "share_without_by_layer": (WITHOUT_LAYERWISE, "all parameters, a component in every layer"),
}
"""Quantities that are a share of the total effect: the edit, and the parameters that it covers."""
_NULLS = {"share_along": "effect_along", "share_along_by_layer": "effect_along_by_layer"}
"""Shares beside which that of other teachers' displacements stands."""
_WHY = {
    ZERO: "the teacher has no displacement",
    NOT_FINITE: "weights that it needs are not finite",
    NOT_TOLD: "the total effect is not told from 0, so shares are not given",
    ELSEWHERE: "students start at other weights than their teacher did",
    NO_SCORE: "no member has a score",
    UNMOVED: "the student moved as its control did in this layer, or the teacher did not move there",
}


def _findings(run: Run, measured: _Measured, judgements: Mapping[tuple[str, Case], Judgement], case: Case) -> list[Finding]:
    """The total effect, the effects along the teacher's displacement with verdicts, and the shares of the total."""
    common = _common(run, case)
    findings = [
        Finding(
            quantity="total_effect",
            scope="all parameters",
            unit=_unit(run),
            null="no effect: the student scores as its own control does",
            null_low=0.0,
            null_high=0.0,
            verdict="",
            reason="whether the trait passed is judged by behaviour; here it is what the shares are shares of",
            rule="",
            margin=float("nan"),
            formula="score(θ_S) − score(θ_C), mean over members at the last step",
            **interval_fields(measured.interval(case, TOTAL)),
            **common,
        )
    ]
    findings += [_judged_finding(run, measured, judgements.get((quantity, case)), case, quantity) for quantity in _JUDGED]
    for quantity, (name, scope) in _SHARES.items():
        null = _null_share(run, measured, case, _NULLS[quantity]) if quantity in _NULLS else None
        findings.append(_share_finding(run, measured, case, name, measured.share(case, name), (quantity, scope), null))
    if measured.has_effect(case):
        for planned in (edit for edit in measured.plan if edit.group == GRAFT):
            if (measured.statuses(case, planned.name) == OK).any() and planned.series in {ONLY, ALL_BUT}:
                share, quantity = measured.share(case, planned.name), "share_of_layer"
                if planned.series == ALL_BUT:  # what is lost without it
                    share, quantity = _complement(share), "share_lost_without_layer"
                findings.append(_share_finding(run, measured, case, planned.name, share, (quantity, planned.layer), None))
        findings.append(_rank_finding(run, measured, case))
    return findings


def _judged_finding(run: Run, measured: _Measured, judgement: Judgement | None, case: Case, quantity: str) -> Finding:
    judged = _JUDGED[quantity]
    against = student_interval(measured.null_effects(case, quantity), run.recipe.verdict.confidence)
    unjudged = _why(measured, case, judged.edit)
    if np.isfinite(measured.effects(case, judged.edit)).any() and not against.n:
        unjudged = _NO_NULL
    return Finding(
        quantity=quantity,
        scope="all parameters",
        unit=_unit(run),
        null=f"{_null_words(measured, case, quantity)} (a line to read by: a random direction with the teacher's spectrum, "
        f"as far, has {measured.interval(case, judged.long_as(RANDOM))})",
        null_low=against.low,
        null_high=against.high,
        **judgement_fields(judgement, run.recipe.verdict.margin, unjudged),
        formula=_FORMULA.replace("edit", judged.formula),
        **interval_fields(measured.interval(case, judged.edit)),
        **_common(run, case),
    )


def _null_words(measured: _Measured, case: Case, quantity: str) -> str:
    teachers = measured.null_teachers(case, quantity)
    return f"the displacement of {teachers}, as far" if teachers else "none: no other teacher has a displacement"


def _null_share(run: Run, measured: _Measured, case: Case, quantity: str) -> Interval:
    """Of the total effect: what other teachers' displacements have, as far; NaN where the total is not told from 0."""
    confidence = run.recipe.verdict.confidence
    share = fieller_interval(measured.null_effects(case, quantity), measured.effects(case, TOTAL), confidence)
    return share if measured.has_effect(case) else Interval(np.nan, np.nan, np.nan, share.n, confidence)


def _share_finding(
    run: Run, measured: _Measured, case: Case, name: str, share: Interval, what: tuple[str, str], null: Interval | None
) -> Finding:
    reason = "a description: a share of an effect has no margin of its own, and parts need not add up"
    return Finding(
        quantity=what[0],
        scope=what[1],
        unit="share of the total effect",
        null="none: a description" if null is None else _null_words(measured, case, _NULLS[what[0]]),
        null_low=float("nan") if null is None else null.low,
        null_high=float("nan") if null is None else null.high,
        verdict="",
        reason=reason if np.isfinite(share.estimate) else _why(measured, case, name),
        rule="",
        margin=float("nan"),
        formula=("1 − " if what[0] == "share_lost_without_layer" else "")
        + f"mean effect of “{name}” / mean total effect, Fieller",
        **interval_fields(share),
        **_common(run, case),
    )


def _rank_finding(run: Run, measured: _Measured, case: Case) -> Finding:
    rank = _smallest_rank(measured, case)
    largest = max(edit.rank for edit in measured.plan)
    known = int(np.isfinite(measured.effects(case, TOTAL)).sum())
    reason = "a description, of the means only: it has no interval"
    if rank is None:
        reason = f"no rank up to {largest} reaches it"
    return Finding(
        quantity="smallest_rank",
        scope="every matrix; vectors whole",
        unit="singular directions a matrix",
        null="none: a description",
        null_low=float("nan"),
        null_high=float("nan"),
        verdict="",
        reason=reason,
        rule="",
        margin=float("nan"),
        formula=f"smallest k for which the mean effect of D's rank-k part is at least {_SHARE:g} of the mean total effect",
        **interval_fields(
            Interval(float("nan") if rank is None else float(rank), np.nan, np.nan, known, run.recipe.verdict.confidence)
        ),
        **_common(run, case),
    )


def _smallest_rank(measured: _Measured, case: Case) -> int | None:
    """Whose truncation of D reaches the stated share of the total effect, in the mean."""
    shares = {edit.rank: measured.share(case, edit.name) for edit in measured.plan if edit.series == LEADING}
    return next((rank for rank, share in sorted(shares.items()) if share.estimate >= _SHARE), None)


def _complement(share: Interval) -> Interval:
    return Interval(1 - share.estimate, 1 - share.high, 1 - share.low, share.n, share.confidence)


def _why(measured: _Measured, case: Case, name: str) -> str:
    known = np.isfinite(measured.effects(case, name))
    if not known.any():
        return _WHY.get(int(measured.statuses(case, name).max()), _WHY[NOT_TOLD])
    totals = np.isfinite(measured.effects(case, TOTAL))
    return "one member has no interval" if min(known.sum(), totals.sum()) == 1 else _WHY[NOT_TOLD]


def _common(run: Run, case: Case) -> dict[str, Any]:
    return {
        "analysis": "displacement_surgery",
        "condition": case[0],
        "trait": case[1],
        "context": next(iter(run.family.contexts)),
        "step": run.student(*case).last,
        "num_references": run.recipe.num_references(case[0]),
        "source": SOURCE,
    }


_ZERO = zero_line()
_TOTAL_LINE = alt.Chart(DATA).transform_filter("isValid(datum.total_effect)").mark_rule(color="#1d2430", strokeDash=[6, 3])
_INTERVALS = ("effect_mean", "effect_low", "effect_high", "total_effect")


def _figures(run: Run, measured: _Measured, data: xr.Dataset) -> list[Figure]:
    """None where nothing is operated on."""
    told = measured.told()
    if not told:
        return []
    figures = [_component_figure(run, measured, told)]
    same_start = [case for case in told if _has(measured, case, SCAN)]
    divided = [case for case in told if _has(measured, case, GRAFT)]
    if same_start:
        figures.append(_scan_figure(run, measured, same_start))
    if divided:
        figures += [_graft_figure(run, measured, divided), _truncation_figure(run, measured, divided)]
    return figures


def _has(measured: _Measured, case: Case, group: str) -> bool:
    return any((measured.statuses(case, edit.name) == OK).any() for edit in measured.plan if edit.group == group)


def _edits(measured: _Measured, group: str, cases: Sequence[Case]) -> list[str]:
    """The edits of a group that any of the cases has."""
    return [
        edit.name
        for edit in measured.plan
        if edit.group == group and any((measured.statuses(case, edit.name) == OK).any() for case in cases)
    ]


def _x(run: Run) -> alt.X:
    return alt.X("effect_mean:Q", title=f"effect ({_unit(run)})")


def _y(run: Run) -> alt.Y:
    return alt.Y("effect_mean:Q", title=f"effect ({_unit(run)})")


def _panels(run: Run, cases: Sequence[Case], layers: alt.LayerChart | alt.FacetChart) -> dict[str, Any]:
    """A panel a condition, and a trait where there are several; three a row."""
    shown = [case for trait in run.traits for case in cases if case[1] == trait]
    several = len(run.traits) > 1
    facet = alt.Facet("panel:N", sort=[_name(run, case) for case in shown], title=None)
    panel = "datum.condition + ', ' + datum.taught" if several else "datum.condition"
    return chart_spec(layers.facet(facet=facet, columns=3).transform_calculate(panel=panel).transform_filter(_isin(run, shown)))


def _isin(run: Run, cases: Sequence[Case]) -> alt.FieldOneOfPredicate:
    return alt.FieldOneOfPredicate(field="panel", oneOf=[_name(run, case) for case in cases])


def _name(run: Run, case: Case) -> str:
    return f"{case[0]}, {case[1]}" if len(run.traits) > 1 else case[0]


def _select(run: Run, measured: _Measured, group: str, cases: Sequence[Case]) -> dict[str, Any]:
    conditions = [name for name in run.conditions if name in {case[0] for case in cases}]
    return {"condition": conditions, "edit": _edits(measured, group, cases)}


def _caption(run: Run, measured: _Measured, group: str, cases: Sequence[Case], words: str) -> str:
    percent = f"{100 * run.recipe.verdict.confidence:g} %"
    traits = f", for each of {len(run.traits)} traits" if len(run.traits) > 1 else ""
    shown = [np.isfinite(measured.effects(case, name)).sum() for case in cases for name in _edits(measured, group, cases)]
    counts = sorted({int(count) for count in shown} - {0})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    interval = f" with its {percent} interval" if counts[-1] > 1 else ""
    missing = " What is not there, the results say why." if 0 in shown else ""
    return (
        f"score(edited model) − score(θ_C) ({_unit(run)}) at the last step, mean over members{interval} (n = {n}{traits}). "
        f"D = θ_S − θ_C, the student minus its own control. {words}{missing}"
    )


def _join(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


_COLORS = {
    "D": "#1d2430", "along Δ_T": "#2563eb", "without Δ_T": "#0d9488", "sign flip": "#9333ea",
    "random": "#94a3b8", "neutral teacher": "#d97706", "other trait": "#db2777",
}  # fmt: skip
_WHO = {STUDENT: "D", TEACHER: "along Δ_T", NEUTRAL: "neutral teacher", OTHER: "other trait", RANDOM: "random"}
_THEIRS = {
    NEUTRAL: "the neutral teacher's displacement (null)", OTHER: "other traits' displacements (null)",
    RANDOM: "random directions with Δ_T's singular values in every matrix (a line to read by)",
}  # fmt: skip


def _colored(names: Mapping[str, str], field: str) -> tuple[alt.Color, dict[str, str]]:
    """Colours by who an edit is of; ``names`` maps what stands in ``field`` to it."""
    shown = [who for who in _COLORS if who in names.values()]
    scale = alt.Scale(domain=shown, range=[_COLORS[who] for who in shown])
    return alt.Color("who:N", scale=scale, title=None, legend=alt.Legend(columns=4)), {
        "who": f"{json.dumps(dict(names), ensure_ascii=False)}[datum.{field}]"
    }


def _others_there(edits: Sequence[PlannedEdit]) -> list[str]:
    """Whose displacements are shown beside the teacher's, in words."""
    return [words for who, words in _THEIRS.items() if any(edit.direction == who for edit in edits)]


def _row_label(edit: PlannedEdit) -> str:
    """Short: a row under another goes on with its label."""
    by_layer, stretched = "… by layer", "… stretched to ‖D‖"
    labels = {
        TOTAL: "D", ALONG: "D along Δ_T", LAYERWISE: by_layer, FLIPPED: "sign flip", WITHOUT: "D without Δ_T",
        WITHOUT_LAYERWISE: by_layer, OWN: "D along it", REST: "D without it",
        long_as_layerwise(edit.direction): by_layer, long_as_student(edit.direction): stretched,
    } if edit.direction in SYMBOLS else {}  # fmt: skip
    return labels.get(edit.series, _WHO[edit.direction])


def _component_figure(run: Run, measured: _Measured, cases: Sequence[Case]) -> Figure:
    chosen = _select(run, measured, COMPONENT, cases)
    edits = [edit for edit in measured.plan if edit.name in chosen["edit"]]
    special = {FLIPPED: "sign flip"} | dict.fromkeys((WITHOUT, WITHOUT_LAYERWISE), "without Δ_T")
    names = {edit.name: special.get(edit.name) or _WHO[edit.direction] for edit in edits}
    labels = json.dumps({edit.name: _row_label(edit) for edit in edits}, ensure_ascii=False)
    color, calculated = _colored(names, "edit")
    base = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.effect_mean)")
        .transform_calculate(**calculated)
        .encode(
            y=alt.Y("edit:N", sort=chosen["edit"], title=None, axis=alt.Axis(labelExpr=f"({labels})[datum.label]")), color=color
        )
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("effect_low:Q", title=f"effect ({_unit(run)})"), x2="effect_high:Q")
    dots = base.mark_circle(size=42, opacity=1).encode(x=_x(run), tooltip=_tooltip("edit"))
    lines = [_ZERO.encode(x=alt.datum(0)), _TOTAL_LINE.encode(x="mean(total_effect):Q")]
    layers = alt.layer(*lines, bars, dots, data=DATA).properties(width=190, height=alt.Step(15))
    return Figure(
        name="surgery_components",
        title="What carries the trait: the part of D along the teacher's displacement, or the rest?",
        caption=_caption(run, measured, COMPONENT, cases, _component_words(edits)),
        variables=_INTERVALS,
        spec=_panels(run, cases, layers),
        select=chosen,
    )


def _component_words(edits: Sequence[PlannedEdit]) -> str:
    """What the rows are; only of those that are there."""
    words, others = "Every row is put into the control. ", _others_there(edits)
    if any(edit.direction == TEACHER for edit in edits):
        words += (
            "The part of D along Δ_T is c Δ_T with c = ⟨D, Δ_T⟩ / ‖Δ_T‖², over all parameters or with a c for every layer; "
            "beside it the sign flip, and what is left of D without it. Stretched ones are as long as D, since a small part "
            "can be too short to do anything. "
        )
    if others:
        words += f"As far along others: {_join(others)}. "
    return f"{words}Dashed: the total effect."


def _scan_figure(run: Run, measured: _Measured, cases: Sequence[Case]) -> Figure:
    chosen = _select(run, measured, SCAN, cases)
    edits = [edit for edit in measured.plan if edit.name in chosen["edit"]]
    names = {edit.series: _WHO[edit.direction] for edit in edits}
    color, calculated = _colored(names, "edit_series")
    base = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.effect_mean)")
        .transform_calculate(**calculated)
        .encode(x=alt.X("edit_dose:Q", title="dose α"), color=color)
    )
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("effect_low:Q", title=f"effect ({_unit(run)})"), y2="effect_high:Q")
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=22)).encode(y=_y(run), tooltip=_tooltip("edit"))
    lines = [_ZERO.encode(y=alt.datum(0)), _TOTAL_LINE.encode(y="mean(total_effect):Q")]
    layers = alt.layer(*lines, band, line, data=DATA).properties(width=190, height=150)
    return Figure(
        name="surgery_scans",
        title="Dose and response: how the trait follows a push along the teacher's displacement, and along D",
        caption=_caption(run, measured, SCAN, cases, _scan_words(edits)),
        variables=_INTERVALS,
        spec=_panels(run, cases, layers),
        select=chosen,
        headline=True,
    )


def _scan_words(edits: Sequence[PlannedEdit]) -> str:
    own = _join([SYMBOLS[who] for who in (TEACHER, STUDENT) if any(edit.direction == who for edit in edits)])
    others = _others_there(edits)
    words = f"Scored is θ_C + α V. For V = {own} the dose is in units of its own length. "
    if others:
        words += f"As long as Δ_T at the same dose: {_join(others)}. "
    return f"{words}Negative doses are the sign flip. Dashed: the total effect, which D has at α = 1."


def _graft_figure(run: Run, measured: _Measured, cases: Sequence[Case]) -> Figure:
    chosen = _select(run, measured, GRAFT, cases)
    names = list(dict.fromkeys(edit.layer for edit in measured.plan if edit.group == GRAFT))
    series = [ONLY, ALL_BUT, UP_TO, FROM]
    base = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.effect_mean)")
        .encode(
            y=alt.Y("edit_layer:N", sort=names, title=None),
            yOffset=alt.YOffset("edit_series:N", sort=series),
            color=alt.Color("edit_series:N", sort=series, title=None),
        )
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("effect_low:Q", title=f"effect ({_unit(run)})"), x2="effect_high:Q")
    dots = base.mark_circle(size=36, opacity=1).encode(x=_x(run), tooltip=_tooltip("edit"))
    lines = [_ZERO.encode(x=alt.datum(0)), _TOTAL_LINE.encode(x="mean(total_effect):Q")]
    layers = alt.layer(*lines, bars, dots, data=DATA).properties(width=190, height=alt.Step(9))
    return Figure(
        name="surgery_grafts",
        title="Which layers carry the trait: the student's put into the control, and the control's into the student",
        caption=_caption(
            run,
            measured,
            GRAFT,
            cases,
            "“Only” and “up to” say where the student's weights are enough; “all but” is the student with the control's "
            "weights in that layer, “from” with the control's in all layers before it: where they are needed, little is left. "
            "The null is 0, the control itself. A layer without “only” did not move otherwise than the control's. "
            "Dashed: the total effect.",
        ),
        variables=_INTERVALS,
        spec=_panels(run, cases, layers),
        select=chosen,
    )


def _truncation_figure(run: Run, measured: _Measured, cases: Sequence[Case]) -> Figure:
    chosen = _select(run, measured, TRUNCATION, cases)
    series, ranks = [LEADING, RESIDUAL], sorted({edit.rank for edit in measured.plan if edit.group == TRUNCATION})
    axis = alt.Axis(values=ranks, grid=False, labelOverlap=True)
    base = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.effect_mean)")
        .encode(
            x=alt.X("edit_rank:Q", title="rank k", scale=alt.Scale(type="symlog"), axis=axis),
            color=alt.Color("edit_series:N", sort=series, title=None),
        )
    )
    band = base.mark_area(opacity=0.15).encode(y=alt.Y("effect_low:Q", title=f"effect ({_unit(run)})"), y2="effect_high:Q")
    line = base.mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=22)).encode(y=_y(run), tooltip=_tooltip("edit"))
    lines = [_ZERO.encode(y=alt.datum(0)), _TOTAL_LINE.encode(y="mean(total_effect):Q")]
    layers = alt.layer(*lines, band, line, data=DATA).properties(width=190, height=150)
    return Figure(
        name="surgery_truncation",
        title="At which rank: the leading singular directions of D, and what is left without them",
        caption=_caption(
            run,
            measured,
            TRUNCATION,
            cases,
            "Leading part: the k largest singular directions of every matrix of D, with the vectors whole (rank 0: vectors "
            "alone). Residual: D without it. The null is 0, the control itself. Dashed: the total effect, all of D.",
        ),
        variables=_INTERVALS,
        spec=_panels(run, cases, layers),
        select=chosen,
    )


def _tooltip(*names: str) -> list[Any]:
    numbers = [alt.Tooltip(f"effect_{part}:Q", format=".3f") for part in ("mean", "low", "high")]
    return [*(f"{name}:N" for name in names), *numbers]


def _sentences(run: Run, measured: _Measured, judgements: Mapping[tuple[str, Case], Judgement]) -> list[str]:
    sentences = [sentence for case in measured.told() for sentence in _summarise(run, measured, judgements, case)]
    return [
        *sentences,
        *_untold_sentences(run, measured),
        *_not_finite_sentences(measured.not_finite),
        *_precision_sentences(measured),
    ]


def _summarise(run: Run, measured: _Measured, judgements: Mapping[tuple[str, Case], Judgement], case: Case) -> Iterator[str]:
    """What the edits of one case show, in plain words."""
    name, total = _name(run, case), measured.interval(case, TOTAL)
    head = f"{name}: the student's difference from its control, D, changes the score by {total} ({_unit(run)}, n = {total.n})"
    if not measured.has_effect(case):
        why = "with one member " if total.n == 1 else ""
        yield f"{head}: {why}the total effect is not told from 0, so shares are not given."
    else:
        yield f"{head}."
        yield from _share_sentences(run, measured, case)
    judged = [judgements[quantity, case].verdict for quantity in _JUDGED if (quantity, case) in judgements]
    if len(judged) == len(_JUDGED):
        random = [measured.interval(case, one.long_as(RANDOM)) for one in _JUDGED.values()]
        yield (
            f"{name}: against the displacement of {measured.null_teachers(case, 'effect_along')}, as far, the part of D along "
            f"the teacher's displacement is {judged[0]}, the parts of the layers {judged[1]}, and the part stretched to the "
            f"length of D {judged[2]}. Random directions of the same spectrum, which are only a line to read by, change the "
            f"score by {random[0]}, {random[1]} and {random[2]}."
        )
    elif np.isfinite(measured.effects(case, ALONG)).any():
        yield f"{name}: no verdict on the part of D along the teacher's displacement: {_NO_NULL}."


def _share_sentences(run: Run, measured: _Measured, case: Case) -> Iterator[str]:
    """Of the total effect: along the teacher, in layers, at ranks."""
    name = _name(run, case)
    if np.isfinite(measured.share(case, ALONG).estimate):
        yield (
            f"{name}: the part of D along the teacher's displacement has {measured.share(case, ALONG)} of that effect, "
            f"{measured.share(case, LAYERWISE)} with a part for every layer; D without it has {measured.share(case, WITHOUT)} "
            f"and {measured.share(case, WITHOUT_LAYERWISE)}."
        )
    layers = _best_layer(measured, case)
    if layers is not None:
        rank, ranks = _smallest_rank(measured, case), _ranks(measured.plan)
        reached = f"rank {rank} in every matrix reaches" if rank is not None else f"no rank up to {ranks[-1]} reaches"
        shown = ranks[-1] if rank is None else rank
        missed = student_interval(measured.truncation[measured.place(case)][ranks.index(shown)], run.recipe.verdict.confidence)
        yield (
            f"{name}: {layers}; {reached} {100 * _SHARE:g} % of the effect, by the mean over members only. Rank {shown} leaves "
            f"out ‖D − D_k‖ / ‖D‖ = {missed} of D."
        )


def _best_layer(measured: _Measured, case: Case) -> str | None:
    """The layer that is most, put in alone, and the one without which most is lost."""
    found = []
    for series, words in ((ONLY, "alone has most of it"), (ALL_BUT, "is needed most")):
        shares = {
            edit.layer: measured.share(case, edit.name)
            for edit in measured.plan
            if edit.series == series and (measured.statuses(case, edit.name) == OK).any()
        }
        shares = {layer: share for layer, share in shares.items() if np.isfinite(share.estimate)}
        if not shares:
            return None
        layer, share = (max if series == ONLY else min)(shares.items(), key=lambda item: item[1].estimate)
        found.append(f"{layer} {words} ({share} {'put in' if series == ONLY else 'left without it'})")
        num = len(shares)
    return f"{', '.join(found)}: each the extreme of {num} layers, its interval not corrected for the choice"


def _untold_sentences(run: Run, measured: _Measured) -> Iterator[str]:
    """What is not operated on, and why."""
    unmoved = [trait for trait in run.traits if run.teacher(trait).last == 0]
    if unmoved:
        yield f"The teachers of {', '.join(unmoved)} did not move, so no part of a student lies along their displacement."
    for code, words in (
        (INCOMPARABLE, "its students are of another model than the teachers"),
        (UNTRAINED, "nothing is trained there"),
        (NO_CONTROL, "it has no control to operate on; give one with --control"),
    ):
        names = [name for name in run.conditions if all(_why_absent(run, (name, trait)) == code for trait in run.traits)]
        if names:
            yield f"Not operated on: {', '.join(names)}; {words}."
    unscored = [case[0] for case in measured.cases if (measured.statuses(case, TOTAL) == NO_SCORE).all()]
    if unscored:
        yield f"No member has a score in {', '.join(dict.fromkeys(unscored))}, so no effect."
    elsewhere = [case[0] for case in measured.told() if run.starts_elsewhere(run.student(*case))]
    if elsewhere:
        yield (
            f"Students of {', '.join(dict.fromkeys(elsewhere))} start at other weights than their teacher did, where its "
            "displacement is another change of the function: no scans and no parts by single layers there."
        )
    if run.neutral is None and measured.told():
        yield "There is no neutral teacher, so no displacement of one to go along."


def _not_finite_sentences(found: Collection[NotFinite]) -> Iterator[str]:
    """One for every checkpoint of a member."""
    where = sorted({(record.lineage, record.step, record.member, str(record.checkpoint)) for record in found})
    for lineage, step, member, path in where:
        tensors = sorted(
            record.tensor for record in found if (record.lineage, record.step, record.member) == (lineage, step, member)
        )
        more = f" and {len(tensors) - 1} more" if len(tensors) > 1 else ""
        yield (
            f"Not finite: tensor {tensors[0]}{more} of {lineage} at step {step}, member {member} ({path}); every edit that it "
            "would enter is NaN with that reason."
        )


def _precision_sentences(measured: _Measured) -> Iterator[str]:
    """Where a score is not of the very model that its students were."""
    for own, scored in sorted(set(measured.half.values())):
        names = ", ".join(name for name, types in measured.half.items() if types == (own, scored))
        if own == scored:
            yield (
                f"Models of {names} are scored in {scored}, which is all that their attention can be computed in: small edits "
                "are rounded."
            )
        else:
            yield (
                f"Models of {names} are held in {own} and scored in {scored} here, so that small edits are not rounded; scores "
                "can differ a little from those of the behaviour."
            )

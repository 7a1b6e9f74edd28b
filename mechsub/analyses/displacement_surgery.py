"""Displacement surgery: which part of what a student has more than its control carries the trait?"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from torch import Tensor

from mechsub.analyses.registry import analysis
from mechsub.figures import DATA, Figure, chart_spec
from mechsub.findings import Finding, interval_fields
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
    RANDOM,
    RESIDUAL,
    SCAN,
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
from mechsub.parameters.surgery import Patient, Subject, Tensors, draw_matched, operate, subtract
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, fieller_interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects

SOURCE = "task vectors added and negated: Ilharco et al., arXiv:2212.04089; ratios: Fieller 1954"
_STATUS = (
    "ok", "incomparable", "not_trained", "no_control", "zero_displacement", "no_such_direction", "layer_did_not_move",
    "starts_elsewhere", "no_effect_to_divide", "no_score",
)  # fmt: skip
OK, INCOMPARABLE, UNTRAINED, NO_CONTROL, ZERO, NO_DIRECTION, UNMOVED, ELSEWHERE, NO_EFFECT, NO_SCORE = range(10)
_INTERVAL_STATUS = (*_STATUS, "one_member_has_no_interval")
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
    """Causal test: what of the student's difference from its control carries the trait, and along which direction?"""
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

    @classmethod
    def empty(cls, run: Run, plan: Sequence[PlannedEdit]) -> "_Measured":
        shape = (len(run.conditions), len(run.traits), len(plan), run.recipe.members)
        nothing = np.full(shape, np.nan)
        return cls(run, plan, nothing, nothing.copy(), np.full(shape, OK, np.int8), nothing[:, :, 0].copy())

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
        why_none = self.status.max(-1)  # members without a value share their reason, or have no score
        no_effect = np.array([[not self.has_effect((one, trait)) for trait in traits] for one in conditions])
        for part, field in (("mean" if name == "effect" else "estimate", "estimate"), ("low", "low"), ("high", "high")):
            values = np.array([[[getattr(interval, field) for interval in row] for row in block] for block in found])
            why = np.where(why_none != OK, why_none, ONE_MEMBER)
            if name == "share":
                why = np.where((why_none == OK) & no_effect[:, :, None], NO_EFFECT, why)
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
    ends = []
    start = run.reference_of(student)
    with operate(run.family.load_model(start, 0, student.spec.origin.members[0])) as patient:
        for member in range(run.recipe.members):
            score = _Scorer(run, patient, student, case[1], member)
            states = (_load(run, run.control(case[0]), member), _load(run, student, member))
            ends.append(tuple(map(score, states)))
        totals = np.array([after - before for before, after in ends])
        has_effect = _is_told_from_zero(totals, run.recipe.verdict.confidence)
        for member, (before, after) in enumerate(ends):
            operation = _operation(run, case, layers, member)
            score = _Scorer(run, patient, student, case[1], member)
            known = {frozenset[str](): before, operation.subject.moved: after}
            measured.coefficient[(*here, member)] = operation.coefficient
            for number, planned in enumerate(measured.plan):
                cell = (*here, number, member)
                measured.status[cell] = _why_omitted(run, student, planned, has_effect, member_count=len(ends))
                if measured.status[cell] == OK:
                    effect, norm, status = _apply(operation, planned, score, known)
                    unscored = status == OK and not np.isfinite(effect - before)  # of the control, if not of the edited model
                    measured.effect[cell], measured.norm[cell] = effect - before, norm
                    measured.status[cell] = NO_SCORE if unscored else status


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


def _apply(
    operation: Operation, planned: PlannedEdit, score: _Scorer, known: dict[frozenset[str], float]
) -> tuple[float, float, int]:
    """Score, length and status of one edit, the mean over its directions.

    ``known``: the scores of models that are the student in these layers and the control in the others.
    """
    scores, norms = [], []
    for edit in operation.make(planned):
        if edit is None:
            return np.nan, np.nan, UNMOVED if planned.layer else ZERO
        weights = operation.subject.build(edit)
        norms.append(operation.subject.distance(weights))
        if edit.adds_nothing:
            if edit.of_student not in known:
                known[edit.of_student] = score(weights)
            scores.append(known[edit.of_student])
        else:
            scores.append(score(weights))
    if not scores:
        return np.nan, np.nan, NO_DIRECTION
    mean = float(np.mean(scores))
    return mean, float(np.mean(norms)), OK


def _operation(run: Run, case: Case, layers: Mapping[str, str], member: int) -> Operation:
    """One member's student and control, with every direction that its edits are made of."""
    condition, trait = case
    subject = Subject(_load(run, run.control(condition), member), _load(run, run.student(*case), member), layers)
    teacher = _displacement(run, run.teacher(trait), member)
    place, neutral = run.traits.index(trait), run.neutral
    others = [run.traits[(place + offset) % len(run.traits)] for offset in range(1, min(len(run.traits), _MOST_OTHERS + 1))]
    name = run.teacher(trait).name
    directions = {
        TEACHER: [teacher],
        NEUTRAL: [] if neutral is None else [_displacement(run, neutral, member)],
        OTHER: [_displacement(run, run.teacher(other), member) for other in others],
        RANDOM: [draw_matched(teacher, run.recipe.seed, "member", member, "surgery", name, draw) for draw in range(_DRAWS)],
    }
    return Operation(subject, directions, run.recipe.seed, ("member", member, "surgery", condition, trait))


def _load(run: Run, lineage: Lineage | None, member: int, step: int | None = None) -> dict[str, Tensor]:
    assert lineage is not None  # cases without a control are not operated on
    state = lineage.load_state(lineage.last if step is None else step, member)
    return {name: tensor.to(run.device) for name, tensor in state.items()}


def _displacement(run: Run, lineage: Lineage, member: int) -> dict[str, Tensor]:
    return subtract(_load(run, lineage, member), _load(run, lineage, member, 0))


def _why_absent(run: Run, case: Case) -> int:
    """Why a whole case is not operated on."""
    if not run.is_comparable(case[0]):
        return INCOMPARABLE
    if run.student(*case).last == 0:
        return UNTRAINED
    return NO_CONTROL if run.control(case[0]) is None else OK


def _why_omitted(run: Run, student: Lineage, planned: PlannedEdit, has_effect: bool, member_count: int) -> int:
    """Why one edit is not made: its answer would mean nothing there, and each costs an evaluation."""
    if planned.needs_same_start and run.starts_elsewhere(student):
        return ELSEWHERE
    return NO_EFFECT if planned.needs_effect and not has_effect and member_count > 1 else OK


def _is_told_from_zero(values: np.ndarray, confidence: float) -> bool:
    interval = student_interval(values, confidence)
    return bool(interval.low > 0 or interval.high < 0)


def _described(values: Any, dims: Sequence[str], description: str, unit: str, formula: str) -> xr.Variable:
    return label_variable(values, dims, description=description, unit=unit, formula=formula, source=SOURCE)


def _unit(run: Run) -> str:
    return next(iter(run.family.measures.values())).unit


_JUDGED = {
    "effect_along": (ALONG, long_as_along(RANDOM), "c Δ_T"),
    "effect_along_by_layer": (LAYERWISE, long_as_layerwise(RANDOM), "Σ over layers of c_ℓ Δ_Tℓ"),
    "effect_along_stretched": (long_as_student(TEACHER), long_as_student(RANDOM), "sign(c) ‖D‖ Δ_T / ‖Δ_T‖"),
}
"""Quantities with a verdict: the edit, the random one of the same spectrum and length that it is held against, its formula."""


def _judge(run: Run, measured: _Measured) -> dict[tuple[str, Case], Judgement]:
    """Verdicts by quantity and case: the effect minus the random direction's, Holm over conditions and traits."""
    judgements: dict[tuple[str, Case], Judgement] = {}
    for quantity, (name, null, _) in _JUDGED.items():
        effects = {case: measured.effects(case, name) - measured.effects(case, null) for case in measured.told()}
        effects = {case: values for case, values in effects.items() if np.isfinite(values).any()}
        judged = judge_effects(effects, run.rules(run.recipe.verdict.margin), AGAINST_NULL)
        judgements |= {(quantity, case): judgement for case, judgement in judged.items()}
    return judgements


_SHARES = {
    "share_along": (ALONG, "all parameters"),
    "share_along_by_layer": (LAYERWISE, "all parameters, a component in every layer"),
    "share_without": (WITHOUT, "all parameters"),
    "share_without_by_layer": (WITHOUT_LAYERWISE, "all parameters, a component in every layer"),
}
"""Quantities that are a share of the total effect: the edit, and the parameters that it covers."""
_NULLS = {"share_along": long_as_along(RANDOM), "share_along_by_layer": long_as_layerwise(RANDOM)}
"""What shares are held beside."""
_WHY = {
    ZERO: "the teacher has no displacement",
    NO_EFFECT: "the interval of the total effect holds 0: there is no effect to divide",
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
        null = measured.share(case, _NULLS[quantity]) if quantity in _NULLS else None
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
    name, null, formula = _JUDGED[quantity]
    against = measured.interval(case, null)
    return Finding(
        quantity=quantity,
        scope="all parameters",
        unit=_unit(run),
        null=f"a random direction with the teacher's spectrum, as far ({_DRAWS} draws a member)",
        null_low=against.low,
        null_high=against.high,
        verdict=judgement.verdict if judgement else "",
        reason=f"difference from the null {judgement.interval}: {judgement.reason}"
        if judgement
        else _why(measured, case, name),
        rule=f"Of the difference from the null. {judgement.rule}" if judgement else "",
        margin=run.recipe.verdict.margin if judgement else float("nan"),
        formula=_FORMULA.replace("edit", formula),
        **interval_fields(measured.interval(case, name)),
        **_common(run, case),
    )


def _share_finding(
    run: Run, measured: _Measured, case: Case, name: str, share: Interval, what: tuple[str, str], null: Interval | None
) -> Finding:
    reason = "a description: a share of an effect has no margin of its own, and parts need not add up"
    return Finding(
        quantity=what[0],
        scope=what[1],
        unit="share of the total effect",
        null="none: a description" if null is None else "a random direction with the teacher's spectrum, as far",
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
    reason = "a description, of the means: it has no interval"
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
    code = int(measured.statuses(case, name).max())
    return _WHY.get(code, _WHY[NO_EFFECT]) if code != OK or not measured.has_effect(case) else "one member has no interval"


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


_ZERO = alt.Chart(DATA).mark_rule(strokeDash=[2, 3], color="#94a3b8")
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


def _panels(run: Run, cases: Sequence[Case], layers: alt.LayerChart | alt.FacetChart, columns: int = 3) -> dict[str, Any]:
    """A panel a condition; with several traits a row each."""
    conditions = [name for name in run.conditions if name in {case[0] for case in cases}]
    if len(run.traits) == 1:
        return chart_spec(layers.facet(facet=alt.Facet("condition:N", sort=conditions, title=None), columns=columns))
    return chart_spec(
        layers.facet(
            row=alt.Row("taught:N", sort=run.traits, title=None), column=alt.Column("condition:N", sort=conditions, title=None)
        )
    )


def _select(run: Run, measured: _Measured, group: str, cases: Sequence[Case]) -> dict[str, Any]:
    conditions = [name for name in run.conditions if name in {case[0] for case in cases}]
    return {"condition": conditions, "edit": _edits(measured, group, cases)}


def _caption(run: Run, words: str) -> str:
    percent = f"{100 * run.recipe.verdict.confidence:g} %"
    traits = f", for each of {len(run.traits)} traits" if len(run.traits) > 1 else ""
    return (
        f"score(edited model) − score(θ_C) ({_unit(run)}) at the last step, mean over members with its {percent} interval (n = "
        f"{run.recipe.members}{traits}). D = θ_S − θ_C, the student minus its own control. {words}"
    )


_COLORS = {
    "the student's difference": "#1d2430", "along the teacher": "#2563eb", "without the teacher": "#0d9488",
    "sign flip": "#9333ea", "random, same spectrum": "#94a3b8", "neutral teacher": "#d97706", "another trait": "#db2777",
}  # fmt: skip
_WHO = {TEACHER: "along the teacher", NEUTRAL: "neutral teacher", OTHER: "another trait", RANDOM: "random, same spectrum"}


def _colored(names: Mapping[str, str], field: str) -> tuple[alt.Color, dict[str, str]]:
    """Colours by who an edit is of; ``names`` maps what stands in ``field`` to it."""
    shown = [who for who in _COLORS if who in names.values()]
    scale = alt.Scale(domain=shown, range=[_COLORS[who] for who in shown])
    return alt.Color("who:N", scale=scale, title=None, legend=alt.Legend(columns=4)), {
        "who": f"{json.dumps(dict(names), ensure_ascii=False)}[datum.{field}]"
    }


def _component_figure(run: Run, measured: _Measured, cases: Sequence[Case]) -> Figure:
    chosen = _select(run, measured, COMPONENT, cases)
    special = {TOTAL: "the student's difference", FLIPPED: "sign flip"} | dict.fromkeys(
        (WITHOUT, WITHOUT_LAYERWISE), "without the teacher"
    )
    names = {edit.name: special.get(edit.name) or _WHO[edit.direction] for edit in measured.plan if edit.name in chosen["edit"]}
    color, calculated = _colored(names, "edit")
    base = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.effect_mean)")
        .transform_calculate(**calculated)
        .encode(y=alt.Y("edit:N", sort=chosen["edit"], title=None, axis=alt.Axis(labelLimit=340)), color=color)
    )
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("effect_low:Q", title=f"effect ({_unit(run)})"), x2="effect_high:Q")
    dots = base.mark_circle(size=42, opacity=1).encode(x=_x(run), tooltip=_tooltip("edit"))
    lines = [_ZERO.encode(x=alt.datum(0)), _TOTAL_LINE.encode(x="mean(total_effect):Q")]
    layers = alt.layer(*lines, bars, dots, data=DATA).properties(width=190, height=alt.Step(15))
    return Figure(
        name="surgery_components",
        title="What carries the trait: the part of D along the teacher's displacement, or the rest?",
        caption=_caption(
            run,
            "Every row is put into the control: the part of D along Δ_T, c Δ_T with c = ⟨D, Δ_T⟩ / ‖Δ_T‖², over all parameters "
            "or with a c for every layer; what is left of D without it; the sign flip. The nulls go as far along other "
            "displacements: random ones with Δ_T's singular values in every matrix, the neutral teacher's, another trait's. "
            "Stretched ones are as long as D, since a small part can be too short to do anything. Dashed: the total effect.",
        ),
        variables=_INTERVALS,
        spec=_panels(run, cases, layers),
        select=chosen,
        headline=True,
    )


def _scan_figure(run: Run, measured: _Measured, cases: Sequence[Case]) -> Figure:
    chosen = _select(run, measured, SCAN, cases)
    edits = [edit for edit in measured.plan if edit.name in chosen["edit"]]
    names = {edit.series: _WHO.get(edit.direction, "the student's difference") for edit in edits}
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
        caption=_caption(
            run,
            "Scored is θ_C + α V. For V = Δ_T and D the dose is in units of each of them; the nulls, a random direction of "
            "Δ_T's spectrum, the neutral teacher's and another trait's displacement, are as long as Δ_T at the same dose. "
            "Negative doses are the sign flip. Dashed: the total effect, which D has at α = 1.",
        ),
        variables=_INTERVALS,
        spec=_panels(run, cases, layers),
        select=chosen,
        headline=True,
    )


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
    return sentences + list(_untold_sentences(run, measured))


def _summarise(run: Run, measured: _Measured, judgements: Mapping[tuple[str, Case], Judgement], case: Case) -> Iterator[str]:
    """What the edits of one case show, in plain words."""
    name = f"{case[0]}, {case[1]}" if len(run.traits) > 1 else case[0]
    total, n = measured.interval(case, TOTAL), f"n = {measured.interval(case, TOTAL).n}"
    if not measured.has_effect(case):
        yield (
            f"{name}: the student's difference from its control changes the score by {total} ({_unit(run)}, {n}): there is no "
            "effect to divide into parts."
        )
        return
    yield f"{name}: the student's difference from its control, D, changes the score by {total} ({_unit(run)}, {n})."
    judged = [judgements[quantity, case].verdict for quantity in _JUDGED if (quantity, case) in judgements]
    if len(judged) == len(_JUDGED):
        yield (
            f"{name}: the part of D along the teacher's displacement has {measured.share(case, ALONG)} of that effect, "
            f"{measured.share(case, LAYERWISE)} with a part for every layer; D without it has {measured.share(case, WITHOUT)} "
            f"and {measured.share(case, WITHOUT_LAYERWISE)}. Against random directions of the same spectrum and length, the "
            f"part is {judged[0]}, the parts of the layers {judged[1]}, and the part stretched to the length of D {judged[2]}."
        )
    layers = _best_layer(measured, case)
    if layers is not None:
        rank, largest = _smallest_rank(measured, case), max(edit.rank for edit in measured.plan)
        reached = f"rank {rank} in every matrix reaches" if rank is not None else f"no rank up to {largest} reaches"
        yield f"{name}: {layers}; {reached} {100 * _SHARE:g} % of the effect in the mean."


def _best_layer(measured: _Measured, case: Case) -> str | None:
    """The layer that is most, put in alone, and the one without which most is lost."""
    found = []
    for series, words in ((ONLY, "alone has most of it"), (ALL_BUT, "is needed most")):
        shares = {
            edit.layer: measured.share(case, edit.name)
            for edit in measured.plan
            if edit.series == series and (measured.statuses(case, edit.name) == OK).any()
        }
        if not shares:
            return None
        layer, share = (max if series == ONLY else min)(shares.items(), key=lambda item: item[1].estimate)
        found.append(f"{layer} {words} ({share} {'put in' if series == ONLY else 'left without it'})")
    return ", ".join(found)


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

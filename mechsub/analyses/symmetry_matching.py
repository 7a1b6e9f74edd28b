"""Symmetry matching: is a student's alignment hidden because its units stand in another order than its teacher's?"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from torch import Tensor

from mechsub.analyses.registry import analysis
from mechsub.cases import build_case, label_last_steps, last_steps, list_directions
from mechsub.figures import DATA, Figure, chart_spec, zero_line
from mechsub.findings import Finding, interval_fields
from mechsub.lineages import Lineage, Origin
from mechsub.parameters.alignment import MODEL, STATUS, DirectionAlgebra, Missing, Scopes
from mechsub.parameters.arranged import ArrangedLineage
from mechsub.parameters.blocks import Block, list_blocks
from mechsub.parameters.directions import (
    Direction,
    difference_label,
    displacement,
    displacement_difference,
    displacement_label,
)
from mechsub.parameters.gram import NotFinite, check_finite, describe_not_finite, stream_gram
from mechsub.parameters.matching import MOST_UNITS, Matching, choose_unrelated, match_activations, match_weights
from mechsub.parameters.quantities import CONTROL, NEUTRAL, Case, Quantity
from mechsub.parameters.quantities import QUANTITIES as ALL_QUANTITIES
from mechsub.parameters.symmetry import Arrangement, UnitGroup
from mechsub.parameters.unit_activations import record_reader_inputs
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.permutation import flip_signs
from mechsub.statistics.verdicts import AGAINST_NULL, SIGN_FLIP, Judgement, judge_effects
from mechsub.streams import random_stream

SOURCE = "matching: Ainsworth et al., arXiv:2209.04836 (Git Re-Basin); displacement cosines: Ilharco et al., arXiv:2212.04089"
_STATUS = (*STATUS, "no_unrelated_pair", "no_units_known", "too_many_units", "same_file", "zero_start")
NO_PAIR, NO_UNITS, TOO_MANY, SAME_FILE, ZERO_START = range(len(STATUS), len(_STATUS))
STORED, WEIGHTS, ACTIVATIONS = "stored", "weights", "activations"
MATCHINGS, FITS = (STORED, WEIGHTS, ACTIVATIONS), (WEIGHTS, ACTIVATIONS)
OWN, UNRELATED = "own", "unrelated"
PAIRS = (OWN, UNRELATED)
_DIMS = ("condition", "taught", "matching", "pair", "member", "step", "scope")
_BOUNDS = {"float64": 1e-10, "float32": 2e-3}
"""Of the self-test: the same training in another order of units differs by rounding, which Adam amplifies."""
_START_FIELDS = frozenset({"init", "permute_hidden", "noise_std", "shared", "match", "rotate_residual", "sham"})
"""Of a condition: where its students start, and what has nothing to do with them."""
_NO_GRADIENT = "bias [attention k]"
"""A bias of keys adds one number to all scores of a query, which the softmax takes out: rounding alone moves it."""
_MOST_TENSORS = 16
_RECORDED_BYTES = 256 << 20
_AGREEMENTS = {WEIGHTS: "cosine", ACTIVATIONS: "mean correlation"}
FIT_WORDS = {WEIGHTS: "the starting weights", ACTIVATIONS: "the starting models' activations on held-out inputs"}


_FORMULAS = {
    "alignment": "cos(π Δ_S, Δ_T)",
    "alignment_of_control": "cos(π Δ_C, Δ_T)",
    "control_adjusted_alignment": "cos(π(θ_S − θ_C), Δ_T)",
    "specific_alignment": "cos(π(θ_S − θ_C), Δ_T − Δ_N)",
}
"""Of what is measured of every student, in any order of units."""
QUANTITIES = tuple(replace(one, formula=_FORMULAS[one.name]) for one in ALL_QUANTITIES if one.name in _FORMULAS)


@analysis
def symmetry_matching(run: Run) -> Result:
    """What of the alignment is left, or comes back, when students' units are matched to their teacher's by their starts."""
    matcher = _Matcher(run)
    data, not_finite = _measure(run, matcher, list_blocks(run.reference.spec.tensors))
    judgements = _judge(run, data)
    findings = _findings(run, data, judgements) + _self_tests(run, data)
    figures = []
    if _moved(run) and matcher.groups:
        figures = [_effect_figure(run, data), _training_figure(run, data), _layer_figure(run, data)]
    sentences = [*_sentences(run, matcher, data, judgements), *describe_not_finite([*matcher.not_finite, *not_finite])]
    return Result(data, findings, figures, sentences)


class _Matcher:
    """Fits each start to the references once, whatever conditions stand on it; only models at step 0 are looked at."""

    def __init__(self, run: Run) -> None:
        self._run = run
        groups: Sequence[UnitGroup] = run.family.unit_groups(run.reference)
        self.too_large = [group for group in groups if group.num_units > MOST_UNITS]
        self.groups: Sequence[UnitGroup] = [] if self.too_large else groups
        self.not_finite: list[NotFinite] = []
        """The tensors of starts that kept a member from being matched."""
        self.overflown: list[str] = []
        """In words, the starts whose activations are not finite although their weights are."""
        self._found: dict[tuple[str, str, str], list[Matching | None] | None] = {}
        self._fitted: dict[tuple[Origin, str, int, int], Matching | None] = {}
        self._recorded: dict[tuple[Origin, int], dict[str, Tensor]] = {}
        self._broken: dict[tuple[str, int], list[NotFinite]] = {}

    @property
    def why_none(self) -> int:
        """The status of what is not there for want of a view: no units to match, or no pair."""
        return TOO_MANY if self.too_large else NO_PAIR if self.groups else NO_UNITS

    def partners(self, condition: str, pair: str) -> list[int] | None:
        """For each student, whose reference and teacher it is held against; None where there is no such pair."""
        run, student = self._run, self._run.student(condition, self._run.traits[0])
        if pair == OWN:
            return list(range(run.recipe.members))
        if not run.starts_elsewhere(student) or run.recipe.num_references(condition) < run.recipe.members:
            return None
        return choose_unrelated(student.spec.origin.members)

    def match(self, condition: str, fit: str, pair: str) -> list[Matching | None] | None:
        """Of every student's start, fitted to the reference of its partner; None where there is nothing to fit.

        None for a member of whose two starts one is not finite: it cannot be matched.
        """
        key = condition, fit, pair
        if key not in self._found:
            partners = self.partners(condition, pair) if self.groups else None
            if partners is None:
                self._found[key] = None
            elif pair == OWN and self.is_reference(condition):
                same = Matching(Arrangement.as_stored(self.groups), float("nan"), float("nan"))
                self._found[key] = [same] * len(partners)
            else:
                self._found[key] = [self._fit(condition, fit, *both) for both in enumerate(partners)]
        return self._found[key]

    def is_reference(self, condition: str) -> bool:
        """Whether the start has no weights of its own: it is read from the reference's file."""
        student = self._run.student(condition, self._run.traits[0])
        return all(student.parts(0, name) == self._run.reference.parts(0, name) for name in student.spec.tensors)

    def _fit(self, condition: str, fit: str, member: int, partner: int) -> Matching | None:
        """All students of a condition start alike: by the first whose start is finite."""
        reference = self._run.reference
        students = [self._run.student(condition, trait) for trait in self._run.traits]
        broken = {one.name: self._find_broken(one, fit, member) for one in students}
        whole = [one for one in students if not broken[one.name]]
        found = [*self._find_broken(reference, fit, partner), *(broken[students[0].name] if not whole else [])]
        if found:
            self.not_finite += found
            return None
        key = whole[0].spec.origin, fit, member, partner
        if key not in self._fitted:
            stream = random_stream(self._run.recipe.seed, "member", member, "symmetry_matching", fit, partner)
            match = self._match_weights if fit == WEIGHTS else self._match_activations
            self._fitted[key] = match(whole[0], member, partner, stream)
        return self._fitted[key]

    def _match_weights(self, student: Lineage, member: int, partner: int, stream: np.random.Generator) -> Matching:
        reference = self._run.reference
        return match_weights(
            self.groups,
            lambda name: reference.parts(0, name)[0].load_whole(name, partner),
            lambda name: student.parts(0, name)[0].load_whole(name, member),
            stream,
        )

    def _match_activations(self, student: Lineage, member: int, partner: int, stream: np.random.Generator) -> Matching | None:
        reference = self._run.reference
        wanted, found = self._record(reference, partner), self._record(student, member)
        for lineage, whose, inputs in ((reference, partner, wanted), (student, member, found)):
            if not all(bool(values.isfinite().all()) for values in inputs.values()):
                self.overflown.append(f"{lineage.name}, member {whose}")
                return None
        return match_activations(self.groups, wanted, found, stream)

    def _find_broken(self, lineage: Lineage, fit: str, member: int) -> list[NotFinite]:
        """The tensors of one start that a fit looks at (by activations all of them) and that are not finite."""
        key = lineage.name, member
        if key not in self._broken:
            own = [name for name, info in lineage.spec.tensors.items() if info.tied_to is None]
            pairs = [(name, part) for name in own for part in lineage.parts(0, name)]
            found = [check_finite(part, name, part.members[member]) for name, part in pairs]
            self._broken[key] = [record for record in found if record is not None]
        units = {place.tensor for group in self.groups for place in group.places}
        return [record for record in self._broken[key] if fit == ACTIVATIONS or record.tensor in units]

    def _record(self, lineage: Lineage, member: int) -> dict[str, Tensor]:
        """Kept while there is room: every start is held against several references."""
        key = lineage.spec.origin, member
        if key in self._recorded:
            return self._recorded[key]
        readers = list(dict.fromkeys(group.reader for group in self.groups))
        batches = self._run.family.probe_inputs(self._run.reference)
        found = record_reader_inputs(self._run.family.load_model(lineage, 0, member), readers, batches)
        kept = [values.nbytes for one in (*self._recorded.values(), found) for values in one.values()]
        if sum(kept) < _RECORDED_BYTES:
            self._recorded[key] = found
        return found


@dataclass(frozen=True)
class _View:
    """The teachers as one student's start would have them: in its order of units, or another member's."""

    teacher: Lineage
    neutral: Lineage | None
    unmatched: tuple[int, ...] = ()
    """The members whose starts could not be matched."""

    def directions(self) -> list[Direction]:
        found = [displacement(self.teacher, self.teacher.last)]
        if self.neutral is not None:
            found.append(displacement_difference(self.teacher, self.neutral, self.teacher.last, self.neutral.last))
        return found


def _views(run: Run, matcher: _Matcher, condition: str, trait: str) -> dict[tuple[str, str], _View]:
    """By matching and pair. ⟨π Δ_S, Δ_T⟩ = ⟨Δ_S, π⁻¹ Δ_T⟩: few teachers are reordered instead of many students."""
    teacher, neutral = run.teacher(trait), run.neutral
    views = {(STORED, OWN): _View(teacher, neutral)}
    for matching, pair in product(MATCHINGS, PAIRS):
        partners = matcher.partners(condition, pair)
        if (matching, pair) in views or partners is None or not matcher.groups:
            continue
        stored = Arrangement.as_stored(matcher.groups)
        fitted = None if matching == STORED else matcher.match(condition, matching, pair)
        orders = [stored] * len(partners) if fitted is None else [one.arrangement.invert() if one else stored for one in fitted]
        unmatched = tuple(member for member, one in enumerate(fitted or ()) if one is None)
        if pair == OWN and not any(order.moved_share for order in orders):
            views[matching, pair] = _View(teacher, neutral, unmatched)
            continue
        label = f"for {condition}, {matching}, {pair}"
        arranged = [None if one is None else ArrangedLineage(one, label, partners, orders) for one in (teacher, neutral)]
        assert arranged[0] is not None
        views[matching, pair] = _View(arranged[0], arranged[1], unmatched)
    return views


def _condition_directions(run: Run, condition: str, views: Sequence[_View]) -> list[Direction]:
    """Of the students and the control beside every view of their teachers; some views are of the same directions."""
    own = [run.control(condition), *(run.student(condition, trait) for trait in run.traits)]
    moved = [one for one in list_directions(run) if one.terms[0][0] in own and len(one.terms) > 1]
    return list({one.label: one for one in [*(found for view in views for found in view.directions()), *moved]}.values())


def _view_case(run: Run, algebra: DirectionAlgebra, condition: str, trait: str, step: int, view: _View) -> Case:
    """A student at one step against one view of its teachers."""
    teacher, neutral = view.teacher, view.neutral
    apart = {} if neutral is None else {difference_label(teacher.name, neutral.name, teacher.last): 1.0}
    shown = {displacement_label(teacher.name, teacher.last): 1.0}
    return replace(build_case(run, algebra, condition, trait, step), teacher=shown, teacher_difference=apart)


def _explain(case: Case, quantity: Quantity, found: np.ndarray) -> np.ndarray:
    """Of those directions that the quantity needs."""
    used = [case.student, case.teacher]
    used += [case.control, case.difference] if CONTROL in quantity.needs else []
    used += [case.teacher_difference] if NEUTRAL in quantity.needs else []
    return case.algebra.explain(found, *used)


def _measure(run: Run, matcher: _Matcher, blocks: Sequence[Block]) -> tuple[xr.Dataset, list[NotFinite]]:
    """The quantities in every order of units, and the tensors of checkpoints that are not finite."""
    scopes = Scopes.of(blocks)
    steps = sorted(
        {step for condition in run.conditions for trait in run.traits for step in run.student(condition, trait).steps}
    )
    sizes = (
        len(run.conditions),
        len(run.traits),
        len(MATCHINGS),
        len(PAIRS),
        run.recipe.members,
        len(steps),
        len(scopes.names),
    )
    values = {quantity.name: np.full(sizes, np.nan) for quantity in QUANTITIES}
    status = {quantity.name: np.full(sizes, Missing.NOT_RUN, dtype=np.int8) for quantity in QUANTITIES}
    not_finite: list[NotFinite] = []
    for row, condition in enumerate(run.conditions):
        if not run.is_comparable(condition):
            for codes in status.values():
                codes[row] = Missing.INCOMPARABLE
            continue
        views = {trait: _views(run, matcher, condition, trait) for trait in run.traits}
        directions = _condition_directions(run, condition, [one for found in views.values() for one in found.values()])
        gram = stream_gram(directions, blocks, (), device=run.device)
        algebra = DirectionAlgebra(gram, scopes)
        not_finite += gram.not_finite
        for (place, trait), (column, step) in product(enumerate(run.traits), enumerate(steps)):
            if step not in run.student(condition, trait).steps:
                continue
            for (at, matching), (side, pair) in product(enumerate(MATCHINGS), enumerate(PAIRS)):
                view, cell = views[trait].get((matching, pair)), (row, place, at, side, slice(None), column)
                case = None if view is None else _view_case(run, algebra, condition, trait, step, view)
                for quantity in QUANTITIES:
                    if view is None or case is None:
                        status[quantity.name][cell] = matcher.why_none
                    elif (found := quantity.measure(case)) is not None:
                        values[quantity.name][cell], status[quantity.name][cell] = found, _explain(case, quantity, found)
                        for member in view.unmatched:
                            values[quantity.name][row, place, at, side, member, column] = np.nan
                            status[quantity.name][row, place, at, side, member, column] = Missing.NOT_FINITE
        run.report_progress(run.num_checkpoints * (row + 1) // len(run.conditions))
    return _label(run, matcher, values, status, steps, scopes), not_finite


def _label(
    run: Run,
    matcher: _Matcher,
    values: Mapping[str, np.ndarray],
    status: Mapping[str, np.ndarray],
    steps: Sequence[int],
    scopes: Scopes,
) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for quantity in QUANTITIES:
        described = {"description": quantity.name.replace("_", " "), "unit": "cosine", "formula": quantity.formula}
        variables[quantity.name] = label_variable(values[quantity.name], _DIMS, **described, source=SOURCE)
        variables[f"{quantity.name}_status"] = status_variable(status[quantity.name], _DIMS, _STATUS, quantity.name)
    variables |= _fit_variables(run, matcher)
    variables |= _twin_variables(run, values["alignment"], status["alignment"])
    variables["last_step"] = label_last_steps(run)
    coords = {
        "condition": run.conditions,
        "taught": run.traits,
        "matching": list(MATCHINGS),
        "fit": list(FITS),
        "pair": list(PAIRS),
        "member": np.arange(run.recipe.members),
        "step": list(steps),
        "scope": list(scopes.names),
        "scope_kind": ("scope", list(scopes.kinds)),
    }
    return xr.Dataset(variables, coords=coords)


def _fit_variables(run: Run, matcher: _Matcher) -> dict[str, Any]:
    """How alike each start is to the reference that it is matched to, before and after, and what share of it moves."""
    dims = ("condition", "fit", "pair", "member")
    sizes = (len(run.conditions), len(FITS), len(PAIRS), run.recipe.members)
    names: dict[str, tuple[str, Callable[[Matching], float], str]] = {
        "start_agreement_stored": ("cosine of the two starts' units as stored", lambda one: one.before, "cosine"),
        "start_agreement_matched": ("the same with the units matched", lambda one: one.after, "cosine"),
        "moved_share": (
            "share of the units' entries that the matching moves",
            lambda one: one.arrangement.moved_share,
            "share",
        ),
    }
    arrays = {name: np.full(sizes, np.nan) for name in names}
    status = np.full(sizes, matcher.why_none, dtype=np.int8)
    for (row, condition), (at, fit), (side, pair) in product(enumerate(run.conditions), enumerate(FITS), enumerate(PAIRS)):
        if not run.is_comparable(condition):
            status[row] = Missing.INCOMPARABLE
            continue
        found = matcher.match(condition, fit, pair)
        if found is not None:
            status[row, at, side] = [Missing.NOT_FINITE if one is None else Missing.OK for one in found]
            for name, (_, read, _) in names.items():
                arrays[name][row, at, side] = [np.nan if one is None else read(one) for one in found]
    is_same = [run.is_comparable(name) and matcher.is_reference(name) for name in run.conditions]
    reason = np.where(is_same, SAME_FILE, ZERO_START)[:, None, None, None]  # of a fit that has no agreement
    variables: dict[str, Any] = {}
    for name, (description, _, unit) in names.items():
        codes = np.where(np.isnan(arrays[name]) & (status == Missing.OK), reason, status)
        variables[name] = label_variable(arrays[name], dims, description=description, unit=unit, source=SOURCE)
        variables[f"{name}_status"] = status_variable(codes, dims, _STATUS, name)
    return variables


def _twin_variables(run: Run, alignment: np.ndarray, status: np.ndarray) -> dict[str, Any]:
    """The alignment of the condition that differs in nothing but that it starts where its teachers did."""
    dims = tuple(dim for dim in _DIMS if dim not in {"matching", "pair"})
    values, codes = np.full_like(alignment[:, :, 0, 0], np.nan), np.full_like(status[:, :, 0, 0], Missing.NOT_RUN)
    for row, condition in enumerate(run.conditions):
        twin = _twin(run, condition)
        if twin is not None:
            place = run.conditions.index(twin)
            values[row], codes[row] = alignment[place, :, 0, 0], status[place, :, 0, 0]
    described = "alignment of the condition that only starts elsewhere: at its teachers' own reference"
    return {
        "twin_alignment": label_variable(values, dims, description=described, unit="cosine", formula="cos(Δ_S, Δ_T)"),
        "twin_alignment_status": status_variable(codes, dims, _STATUS, "twin_alignment"),
    }


def _twin(run: Run, condition: str) -> str | None:
    """The condition that is alike in everything but where students start, which is at their teachers' reference."""
    if condition not in _moved(run):
        return None
    dumps = {name: run.recipe.conditions[name].model_dump() for name in run.conditions}
    own = dumps[condition]
    for name in run.conditions:
        differs = {key for key in own | dumps[name] if own.get(key) != dumps[name].get(key)}
        if name not in _moved(run) and run.is_comparable(name) and differs <= _START_FIELDS:
            return name
    return None


def _moved(run: Run) -> list[str]:
    """The conditions whose students start at other weights of the teachers' shapes, and were trained."""
    students = {name: run.student(name, run.traits[0]) for name in run.conditions if run.is_comparable(name)}
    return [name for name, student in students.items() if run.starts_elsewhere(student) and student.last > 0]


Key = tuple[str, str, str, str]
"""A quantity of a finding, a condition, a trait, a fit."""


def _final(run: Run, data: xr.Dataset, name: str, condition: str, trait: str, matching: str, pair: str = OWN) -> np.ndarray:
    """One value a member, at the student's last step over the whole model."""
    where = {"condition": condition, "taught": trait, "matching": matching, "pair": pair, "scope": MODEL}
    found: np.ndarray = data[name].sel(where, drop=True).sel(step=run.student(condition, trait).last).values
    return found


def _judge(run: Run, data: xr.Dataset) -> dict[Key, Judgement]:
    """Verdicts at the last step over the whole model; Holm runs over the conditions, the traits and the two fits."""
    rules = run.rules(run.recipe.verdict.alignment_margin)
    judged: dict[Key, Judgement] = {}
    for name in ("matched_alignment", "recovered_alignment", "matched_specific_alignment"):
        effects = {}
        for condition, trait, fit in product(_moved(run), run.traits, FITS):
            values = _effect(run, data, name, condition, trait, fit)
            if np.isfinite(values).any():
                effects[condition, trait, fit] = values
        test = SIGN_FLIP if name == "matched_specific_alignment" else None
        judged |= {(name, *key): one for key, one in judge_effects(effects, rules, AGAINST_NULL, test).items()}
    return judged


def _effect(run: Run, data: xr.Dataset, name: str, condition: str, trait: str, fit: str) -> np.ndarray:
    """What is judged, member by member."""
    at = condition, trait, fit
    if name == "matched_specific_alignment":
        return _final(run, data, "specific_alignment", *at)
    null, pair = ("alignment_of_control", OWN) if name == "matched_alignment" else ("alignment", UNRELATED)
    difference: np.ndarray = _final(run, data, "alignment", *at) - _final(run, data, null, *at, pair)
    return difference


@dataclass(frozen=True)
class _Reported:
    """How one quantity becomes a finding."""

    variable: str
    formula: str
    null: str
    null_variable: str = ""
    null_pair: str = OWN
    pair: str = OWN
    why_unjudged: str = ""


_CONTROL_WORDS = "another teacher's student from the same start, matched alike: the control's value"
_PAIR_WORDS = "unrelated pairs: the same students matched to, and compared with, another member's reference and teacher"
_REPORTED = {
    "matched_alignment": _Reported("alignment", "cos(π Δ_S, Δ_T)", _CONTROL_WORDS, "alignment_of_control"),
    "recovered_alignment": _Reported(
        "alignment", "cos(π Δ_S, Δ_T) − cos(π′ Δ_S, Δ_T′), T′ of an unrelated member", f"0: no more than {_PAIR_WORDS}"
    ),
    "unrelated_alignment": _Reported(
        "alignment",
        "cos(π′ Δ_S, Δ_T′), T′ of an unrelated member",
        "none: it is what matching finds where there is nothing of the student's own teacher",
        pair=UNRELATED,
        why_unjudged="a line to read the matched alignment by; what is recovered over it has the verdict",
    ),
    "matched_control_adjusted_alignment": _Reported(
        "control_adjusted_alignment",
        "cos(π(θ_S − θ_C), Δ_T)",
        _PAIR_WORDS,
        "control_adjusted_alignment",
        UNRELATED,
        why_unjudged="θ_S − θ_C leans away from the neutral teacher by construction; the specific alignment has the verdict",
    ),
    "matched_specific_alignment": _Reported(
        "specific_alignment",
        "cos(π(θ_S − θ_C), Δ_T − Δ_N)",
        "0, by swapping the two teachers' labels within members: the central part of the swapped means",
    ),
}


def _findings(run: Run, data: xr.Dataset, judgements: Mapping[Key, Judgement]) -> list[Finding]:
    found = []
    for name, condition, trait, fit in product(_REPORTED, _moved(run), run.traits, FITS):
        reported, at = _REPORTED[name], (condition, trait, fit)
        values = _final(run, data, reported.variable, *at, reported.pair)
        if name == "recovered_alignment":
            values = _effect(run, data, name, *at)
        if np.isfinite(values).any():
            found.append(_finding(run, data, name, at, values, judgements.get((name, *at))))
    return found


def _finding(
    run: Run, data: xr.Dataset, name: str, at: tuple[str, str, str], values: np.ndarray, judgement: Judgement | None
) -> Finding:
    reported, confidence = _REPORTED[name], run.recipe.verdict.confidence
    null_low, null_high = _null_bounds(run, data, name, at, values)
    has_null = not reported.null_variable or np.isfinite(null_low)
    lacks = "" if has_null else "without its null a matched cosine says nothing: matching always finds something"
    return Finding(
        quantity=name,
        condition=at[0],
        trait=at[1],
        step=run.student(at[0], at[1]).last,
        scope=f"all parameters, units matched by {FIT_WORDS[at[2]]}",
        unit="cosine",
        null=reported.null if has_null else "none: the run holds no such comparison",
        null_low=null_low,
        null_high=null_high,
        verdict=judgement.verdict if judgement else "",
        reason=f"{judgement.interval}: {judgement.reason}" if judgement else lacks or reported.why_unjudged,
        rule=f"Of the difference from the null, over conditions, traits and fits. {judgement.rule}" if judgement else "",
        margin=run.recipe.verdict.alignment_margin if judgement else float("nan"),
        formula=f"{reported.formula}; π: {FIT_WORDS[at[2]]}",
        **interval_fields(student_interval(values, confidence)),
        **_common(run, at[0]),
    )


def _null_bounds(run: Run, data: xr.Dataset, name: str, at: tuple[str, str, str], values: np.ndarray) -> tuple[float, float]:
    reported, confidence = _REPORTED[name], run.recipe.verdict.confidence
    if reported.null_variable:
        against = student_interval(_final(run, data, reported.null_variable, *at, reported.null_pair), confidence)
        return against.low, against.high
    if name == "matched_specific_alignment":
        swapped = flip_signs(values, confidence)
        return swapped.null_low, swapped.null_high
    return (0.0, 0.0) if name == "recovered_alignment" else (float("nan"), float("nan"))


def _common(run: Run, condition: str) -> dict[str, Any]:
    return {
        "analysis": "symmetry_matching",
        "context": "parameters",
        "num_references": run.recipe.num_references(condition),
        "source": SOURCE,
    }


def _self_tests(run: Run, data: xr.Dataset) -> list[Finding]:
    """Students that are their twins in another order of units: after matching nothing may be left but rounding."""
    findings = []
    for condition, trait, fit in product(_moved(run), run.traits, FITS):
        student = run.student(condition, trait)
        if _twin(run, condition) is None or not student.spec.origin.only_permuted:
            continue
        if np.isin(data.alignment_status.sel(condition=condition, matching=fit, pair=OWN), (NO_UNITS, TOO_MANY)).all():
            continue
        name = str(run.reference.load_tensor(0, next(iter(run.reference.spec.tensors)), 0).dtype).removeprefix("torch.")
        bound = _BOUNDS.get(name, _BOUNDS["float32"])
        largest, num_members, outcome = _compare_twins(data, {"condition": condition, "taught": trait}, fit, bound)
        findings.append(
            Finding(
                quantity="matching_self_test",
                condition=condition,
                trait=trait,
                step=student.last,
                scope=f"largest over tensors (biases of keys apart), layers, the model, members and steps; units matched by "
                f"{FIT_WORDS[fit]}",
                estimate=largest,
                low=float("nan"),
                high=float("nan"),
                confidence=float("nan"),
                unit="cosine",
                null=f"0 up to rounding: {bound:g} in {name}",
                null_low=0.0,
                null_high=bound,
                n=num_members,
                verdict="",
                reason=f"{outcome}; a test of the instrument, not a claim",
                rule="",
                margin=bound,
                formula=f"max |cos(π Δ_S, Δ_T) of {condition} − cos(Δ_S, Δ_T) of {_twin(run, condition)}|",
                **_common(run, condition),
            )
        )
    return findings


def _compare_twins(data: xr.Dataset, where: Mapping[str, str], fit: str, bound: float) -> tuple[float, int, str]:
    """The largest difference over the members whose checkpoints are finite, how many these are, and the outcome in words."""
    chosen = data.sel(where, drop=True)
    chosen = chosen.sel(scope=[scope for scope in chosen.scope.values if not str(scope).endswith(_NO_GRADIENT)])
    matched, twin = chosen.alignment.sel(matching=fit, pair=OWN).values, chosen.twin_alignment.values
    codes = chosen.alignment_status.sel(matching=fit, pair=OWN).values, chosen.twin_alignment_status.values
    known = np.isfinite(matched), np.isfinite(twin)
    spoilt = np.any([(found == Missing.NOT_FINITE).any((1, 2)) for found in codes], axis=0)
    tested = ~spoilt & np.any(known, axis=0).any((1, 2))
    if not tested.any():
        return float("nan"), 0, "not testable: no member whose checkpoints are finite has a value"
    largest = float(np.abs(matched - twin)[tested].max(where=(known[0] & known[1])[tested], initial=0.0))
    one_sided = int((known[0] != known[1])[tested].sum())
    if one_sided:
        return largest, int(tested.sum()), f"beyond its bound: {one_sided} values are there on one side only"
    within = "within" if largest <= bound else "beyond"
    return (
        largest,
        int(tested.sum()),
        f"the two alignments differ by {largest:.1g}, {within} the bound of {bound:g} for rounding",
    )


Series = Mapping[str, tuple[str, str]]
"""By ``variable/matching/pair``: what a figure calls it, and its colour."""


def _lines(names: Series, variables: Sequence[str]) -> alt.Chart:
    """The rows that are one of ``names``, by ``variable/matching/pair``, as ``cosine`` with who they belong to in ``who``."""
    chosen = " : ".join(f"datum.key === {json.dumps(key)} ? {json.dumps(who)}" for key, (who, _) in names.items())
    return (
        alt.Chart(DATA)
        .transform_fold(list(variables), as_=["which", "cosine"])
        .transform_filter("isValid(datum.cosine)")
        .transform_calculate(key="datum.which + '/' + datum.matching + '/' + datum.pair")
        .transform_calculate(who=f"{chosen} : null")
        .transform_filter("isValid(datum.who)")
    )


def _who(names: Series) -> alt.Color:
    domain, colors = (list(column) for column in zip(*names.values(), strict=True))
    return alt.Color("who:N", scale=alt.Scale(domain=domain, range=colors), title=None, legend=alt.Legend(labelLimit=260))


def _order(names: Series) -> alt.YOffset:
    return alt.YOffset("who:N", sort=[who for who, _ in names.values()])


_ZERO = zero_line()
_BLUE, _LIGHT, _ORANGE, _GREY, _GREEN, _PALE = "#2563eb", "#60a5fa", "#f59e0b", "#94a3b8", "#059669", "#a7f3d0"
_YELLOW = "#fcd34d"


def _present(run: Run, data: xr.Dataset, series: Series) -> Series:
    """Without what the run does not hold; all of them where it holds none."""
    shown = data.sel(condition=_moved(run), scope=MODEL)

    def has_values(key: str) -> bool:
        name, matching, pair = key.split("/")
        values = shown[name].sel(matching=matching, pair=pair) if "matching" in shown[name].dims else shown[name]
        return bool(np.isfinite(values).any())

    return {key: drawn for key, drawn in series.items() if has_values(key)} or series


def _null_words(series: Series) -> str:
    """Of the nulls that are drawn."""
    words = []
    if any(key.startswith("alignment_of_control/") for key in series):
        words.append("the control in the same order")
    if any(key.endswith(f"/{UNRELATED}") for key in series):
        words.append("the same students matched to another member's start and compared with that member's teacher")
    if not words:
        return "No null is drawn: the run holds none, and without one these cosines say little."
    return f"Null{'s' if len(words) > 1 else ''}: {', and '.join(words)}."


def _effect_figure(run: Run, data: xr.Dataset) -> Figure:
    series = {
        "alignment/stored/own": ("as stored", _GREY),
        "alignment/weights/own": ("matched by weights", _BLUE),
        "alignment/activations/own": ("matched by activations", _LIGHT),
        "alignment_of_control/weights/own": ("control, by weights (null)", _ORANGE),
        "alignment_of_control/activations/own": ("control, by activations (null)", _YELLOW),
        "alignment/weights/unrelated": ("unrelated pairs, by weights (null)", _GREEN),
        "alignment/activations/unrelated": ("unrelated pairs, by activations (null)", _PALE),
    }
    names = _present(run, data, series)
    dots = (
        _lines(names, ("alignment", "alignment_of_control"))
        .transform_filter("datum.step == datum.last_step")
        .mark_circle(size=36, opacity=0.55)
        .encode(
            x=alt.X("cosine:Q", title="cos(π Δ, Δ_T)"),
            y=alt.Y("condition:N", sort=run.conditions, title=None),
            yOffset=_order(names),
            color=_who(names),
            tooltip=["condition:N", "taught:N", "who:N", "member:O", alt.Tooltip("cosine:Q", format=".3f")],
        )
    )
    return Figure(
        name="matching_effect",
        title="What matching the units brings back, beside what it finds anywhere",
        caption=(
            f"cos(π Δ_S, Δ_T) over all parameters at the last step, no unit; each dot is one of {_members(run, data)}. "
            "π puts the units of the student's start in the order of its teacher's start, by their weights or by their "
            f"activations on held-out inputs, and never sees what was trained. {_null_words(names)}"
        ),
        variables=("alignment", "alignment_of_control", "last_step"),
        spec=chart_spec(alt.layer(_ZERO.encode(x=alt.datum(0)), dots, data=DATA).properties(width=640, height=alt.Step(14))),
        select={"scope": [MODEL], "condition": _moved(run)},
    )


def _training_figure(run: Run, data: xr.Dataset) -> Figure:
    series = {
        "twin_alignment/weights/own": ("from the teachers' start", _PALE),
        "alignment/weights/own": ("matched", _BLUE),
        "alignment_of_control/weights/own": ("control, matched (null)", _ORANGE),
        "alignment/weights/unrelated": ("unrelated pairs, matched (null)", _GREEN),
    }
    names = _present(run, data, series)
    chart, color = _lines(names, ("alignment", "alignment_of_control", "twin_alignment")), _who(names)
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(grid=False))
    y = alt.Y("cosine:Q", title="cos(π Δ, Δ_T)")
    twin = chart.transform_filter("datum.which === 'twin_alignment'").mark_line(strokeWidth=7, opacity=0.9)
    others = chart.transform_filter("datum.which !== 'twin_alignment'")
    members = others.mark_line(opacity=0.2, strokeWidth=1).encode(x=x, y=y, detail=["member:N", "taught:N"], color=color)
    mean = others.mark_line(strokeWidth=2.2).encode(x=x, y="mean(cosine):Q", color=color)
    facets = (
        alt.layer(twin.encode(x=x, y="mean(cosine):Q", color=color), members, mean, data=DATA)
        .properties(width=190, height=130)
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=3)
    )
    return Figure(
        name="matching_training",
        title="Matched alignment along training",
        caption=(
            f"cos(π Δ_S, Δ_T) over all parameters, no unit, units matched by the starting weights; thin lines are "
            f"{_members(run, data)}, thick ones their mean. The broad line, where there is one, is the condition that differs "
            "only in starting where its teachers did: students that start as the same function in another order of units must "
            f"lie on it. {_null_words(names)}"
        ),
        variables=("alignment", "alignment_of_control", "twin_alignment"),
        spec=chart_spec(facets),
        select={"scope": [MODEL], "matching": [WEIGHTS], "condition": _moved(run)},
    )


def _layer_figure(run: Run, data: xr.Dataset) -> Figure:
    series = {
        "alignment/stored/own": ("as stored", _GREY),
        "alignment/weights/own": ("matched by weights", _BLUE),
        "alignment/weights/unrelated": ("unrelated pairs, by weights (null)", _GREEN),
    }
    names = _present(run, data, series)
    dots = (
        _lines(names, ("alignment",))
        .transform_filter("datum.step == datum.last_step")
        .mark_circle(size=16, opacity=0.5)
        .encode(
            x=alt.X("cosine:Q", title="cos(π Δ_S, Δ_T)"),
            y=alt.Y("scope:N", sort=_drawn_scopes(data), title=None),
            yOffset=_order(names),
            color=_who(names),
            tooltip=["scope:N", "taught:N", "member:O", "who:N", alt.Tooltip("cosine:Q", format=".3f")],
        )
    )
    facets = (
        alt.layer(_ZERO.encode(x=alt.datum(0)), dots, data=DATA)
        .properties(width=195, height=alt.Step(6))
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=3)
    )
    return Figure(
        name="matching_layers",
        title="Where matching brings alignment back",
        caption=(
            f"cos(π Δ_S, Δ_T), no unit, at the last step, of every part and the model; each dot is one of "
            f"{_members(run, data)}. {_null_words(names)} A part without dots was not moved by both, or the results say why."
        ),
        variables=("alignment", "last_step"),
        spec=chart_spec(facets),
        select={"scope": _drawn_scopes(data), "step": last_steps(data), "condition": _moved(run)},
    )


def _drawn_scopes(data: xr.Dataset) -> list[str]:
    kinds = data.scope_kind.values
    keeps_tensors = (kinds == "tensor").sum() <= _MOST_TENSORS
    return [str(name) for name, kind in zip(data.scope.values, kinds, strict=True) if keeps_tensors or kind != "tensor"]


def _members(run: Run, data: xr.Dataset) -> str:
    """How many have a value at the last step, over conditions, traits and orders of units."""
    cases = product(_moved(run), run.traits, MATCHINGS)
    counts = sorted({int(np.isfinite(_final(run, data, "alignment", *case)).sum()) for case in cases})
    traits = f" of {len(run.traits)} traits each" if len(run.traits) > 1 else ""
    if len(counts) == 1:
        return f"the members (n = {counts[0]}{traits})"
    return f"the members with a value (n = {counts[0]} to {counts[-1]}{traits}; the results say why)"


def _sentences(run: Run, matcher: _Matcher, data: xr.Dataset, judgements: Mapping[Key, Judgement]) -> list[str]:
    if matcher.too_large:
        group = max(matcher.too_large, key=lambda one: one.num_units)
        return [
            f"Nothing was matched: {group.name} has {group.num_units:,} {group.kind}, over the {MOST_UNITS:,} of a group that "
            f"are matched here (one table of all their pairs would take {8 * group.num_units**2 / 2**30:.0f} GiB); the "
            "alignments are those of the weights as they are stored."
        ]
    if not matcher.groups:
        return [
            "Which units of this architecture can change places is not known here, so that nothing was matched; the alignments "
            "are those of the weights as they are stored."
        ]
    counts: dict[str, int] = {}
    for group in matcher.groups:
        counts[group.kind] = counts.get(group.kind, 0) + group.num_units
    units = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    sentences = [f"Units that were matched: {units} of every model. What else could be exchanged or rotated was left as it is."]
    sentences += [
        f"Not matched by activations: those of {who} at the start are not finite although its weights are."
        for who in dict.fromkeys(matcher.overflown)
    ]
    sentences += _identity_sentences(run, matcher, data)
    for condition in _moved(run):
        sentences.append(_summarise(run, data, judgements, condition))
        if matcher.partners(condition, UNRELATED) is None:
            sentences.append(
                f"{condition} has no unrelated pairs, which take three members with references of their own: what matching "
                "finds where there is nothing to find is not known, so that its matched alignment cannot be read."
            )
    return sentences + _self_test_sentences(run, data)


def _identity_sentences(run: Run, matcher: _Matcher, data: xr.Dataset) -> list[str]:
    students = {name: run.student(name, run.traits[0]) for name in run.conditions if run.is_comparable(name)}
    own = [name for name, student in students.items() if not run.starts_elsewhere(student)]
    same = [name for name in own if matcher.is_reference(name)]
    sentences = [f"In {', '.join(same)} the start is the reference itself: there was nothing to match."] if same else []
    own = [name for name in own if name not in same]
    shares = data.moved_share.sel(condition=own, pair=OWN)
    if not np.isfinite(shares).any():
        return sentences
    moved = float(shares.max())
    found = "found every unit where it stands" if moved == 0 else f"moved up to {100 * moved:.1f} % of the units' entries"
    same_words = ": what is matched there is what is stored" if moved == 0 else ""
    return [*sentences, f"At the teachers' own start ({', '.join(own)}) the fits {found}{same_words}."]


def _summarise(run: Run, data: xr.Dataset, judgements: Mapping[Key, Judgement], condition: str) -> str:
    """What matching changes in one condition, in a sentence; means over traits within members."""

    def mean(name: str, matching: str, pair: str = OWN) -> Interval:
        found = [_final(run, data, name, condition, trait, matching, pair) for trait in run.traits]
        return student_interval(np.mean(found, axis=0), run.recipe.verdict.confidence)

    parts = []
    for fit in FITS:
        starts = data.sel(condition=condition, fit=fit, pair=OWN)
        before, after = (float(starts[f"start_agreement_{when}"].mean()) for when in ("stored", "matched"))
        agreement = f"{_AGREEMENTS[fit]} of the starts {before:.2f} as stored, {after:.2f} matched"
        aligned = mean("alignment", fit)
        words = f"matched by {fit} {'' if np.isnan(after) else f'({agreement}) '}{aligned} (n = {aligned.n})"
        words += f", its control {mean('alignment_of_control', fit)}" if run.control(condition) else ""
        recovered = [_effect(run, data, "recovered_alignment", condition, trait, fit) for trait in run.traits]
        over = student_interval(np.mean(recovered, axis=0), run.recipe.verdict.confidence)
        if over.n:
            verdicts = {
                one.verdict
                for key, one in judgements.items()
                if key[:2] == ("recovered_alignment", condition) and key[3] == fit
            }
            words += (
                f", unrelated pairs {mean('alignment', fit, UNRELATED)}: {over} more than these (before any correction; "
                f"after Holm's: {', '.join(sorted(verdicts))})"
            )
        parts.append(words)
    return f"{condition}: alignment as stored {mean('alignment', STORED)}; {'; '.join(parts)}."


def _self_test_sentences(run: Run, data: xr.Dataset) -> list[str]:
    return [
        f"{test.condition} is {_twin(run, test.condition)} in another order of units. {test.scope.capitalize()}: {test.reason}."
        for test in _self_tests(run, data)
    ]

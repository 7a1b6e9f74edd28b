"""Steering directions: do the student's activations move where its own teacher's did, more than where other teachers' did?"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mechsub.activations.hook_points import RESIDUAL_SITES, HookPoint
from mechsub.activations.steering import orthonormal_rows
from mechsub.activations.stored import DIRECTIONS_GROUP, Key, store_directions
from mechsub.analyses.registry import analysis
from mechsub.cases import CaseName, count_members, label_last_steps, list_cases
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, diverging_scale, fold_variables, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.lineages import Lineage
from mechsub.mean_activations import ActivationReader, shuffle_name
from mechsub.paired_activations import BasisMap, PairReader
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects

SOURCE = "steering directions of teacher and student: Blank, arXiv:2606.00995; Morgulis & Hewitt, arXiv:2604.25783"
_DIMS = ("condition", "taught", "member", "step", "point", "group")
_SHUFFLES = 20
_STATUS = (
    "ok", "nothing_moved", "not_run", "incomparable", "no_control", "no_other_teacher", "no_readout", "not_this_group",
    "no_map_between_bases",
)  # fmt: skip
_OK, _UNMOVED, _NOT_RUN, _INCOMPARABLE, _NO_CONTROL, _NO_OTHER, _NO_READOUT, _NO_GROUP, _NO_MAP = range(len(_STATUS))
_ALL_TRAITS = "mean over traits"
ByGroup = Float[np.ndarray, "member group"]
Vectors = Float[np.ndarray, "member group width"]


@dataclass(frozen=True)
class _Cell:
    """The directions of one student at one step and hook point."""

    student: Vectors
    teacher: Vectors
    others: Sequence[Vectors]
    """Other traits' teachers; the neutral one where there is no other trait."""
    readout: Sequence[np.ndarray | None]
    """[member, direction, width]: what the head reads each teacher's trait from, own teacher's first; None where not known."""
    control: Vectors | None
    neutral: Vectors | None
    origin_norm: ByGroup
    shuffles: Float[np.ndarray, "member shuffle width"] | None
    """Of the student at its last step, on the prompts of the first group."""

    @property
    def adjusted(self) -> Vectors | None:
        """v_S − v_C; None without a control."""
        return None if self.control is None else self.student - self.control


@dataclass(frozen=True)
class _Quantity:
    """One measure of a cell: its values, or the status that says why there are none."""

    name: str
    formula: str
    measure: Callable[[_Cell], ByGroup | int]
    unit: str = "cosine"


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Over the last axis; NaN where one of them is 0."""
    inner, lengths = (first * second).sum(-1), np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine: np.ndarray = np.divide(inner, lengths, out=np.full_like(inner, np.nan), where=lengths > 0)
    return cosine


def _mean_cosine(first: Vectors, others: Sequence[Vectors]) -> ByGroup | int:
    return np.mean([_cosine(first, other) for other in others], axis=0) if others else _NO_OTHER


def _without(vectors: Vectors, basis: np.ndarray) -> Vectors:
    """The vectors without their part in the span of each member's orthonormal rows."""
    kept: Vectors = vectors - np.einsum("mgd,mkd,mke->mge", vectors, basis, basis)
    return kept


def _own_without_readout(cell: _Cell) -> ByGroup | int:
    basis = cell.readout[0]
    if basis is None or cell.adjusted is None:
        return _NO_READOUT if basis is None else _NO_CONTROL
    return _cosine(_without(cell.adjusted, basis), _without(cell.teacher, basis))


def _others_without_readout(cell: _Cell) -> ByGroup | int:
    """Each pair without what the head reads that teacher's trait from."""
    if cell.adjusted is None:
        return _NO_CONTROL
    found = []
    for other, basis in zip(cell.others, cell.readout[1:], strict=True):
        if basis is None:
            return _NO_READOUT
        found.append(_cosine(_without(cell.adjusted, basis), _without(other, basis)))
    return np.mean(found, axis=0) if found else _NO_OTHER


def _of_control(cell: _Cell) -> ByGroup | int:
    return _NO_CONTROL if cell.control is None else _cosine(cell.control, cell.teacher)


def _adjusted(cell: _Cell) -> ByGroup | int:
    return _NO_CONTROL if cell.adjusted is None else _cosine(cell.adjusted, cell.teacher)


def _adjusted_with_others(cell: _Cell) -> ByGroup | int:
    return _NO_CONTROL if cell.adjusted is None else _mean_cosine(cell.adjusted, cell.others)


def _specific(cell: _Cell) -> ByGroup | int:
    if cell.adjusted is None or cell.neutral is None:
        return _NO_CONTROL if cell.adjusted is None else _NO_OTHER
    return _cosine(cell.adjusted, cell.teacher - cell.neutral)


def _length(vectors: Vectors, cell: _Cell) -> ByGroup:
    length: ByGroup = np.linalg.norm(vectors, axis=-1) / cell.origin_norm
    return length


def _shuffled_sd(cell: _Cell) -> ByGroup | int:
    """Over draws; of the first group only."""
    if cell.shuffles is None:
        return _NOT_RUN
    spread = np.full(cell.student.shape[:2], np.nan)
    spread[:, 0] = _cosine(cell.shuffles, cell.teacher[:, :1]).std(-1, ddof=1)
    return spread


_RAW, _RAW_OTHERS, _RAW_CONTROL = (
    "steering_alignment",
    "steering_alignment_with_other_teachers",
    "steering_alignment_of_control",
)
_OWN, _NULL = "control_adjusted_steering_alignment", "control_adjusted_steering_alignment_with_other_teachers"
_BARE, _BARE_NULL = f"{_OWN}_without_readout", f"{_NULL}_without_readout"
_SPECIFIC = "specific_steering_alignment"
_QUANTITIES = (
    _Quantity(_RAW, "cos(v_S, v_T)", lambda cell: _cosine(cell.student, cell.teacher)),
    _Quantity(_RAW_OTHERS, "mean over other teachers of cos(v_S, v_T′)", lambda cell: _mean_cosine(cell.student, cell.others)),
    _Quantity(_RAW_CONTROL, "cos(v_C, v_T)", _of_control),
    _Quantity(_OWN, "cos(v_S − v_C, v_T)", _adjusted),
    _Quantity(_NULL, "mean over other teachers of cos(v_S − v_C, v_T′)", _adjusted_with_others),
    _Quantity(_BARE, "cos of v_S − v_C and v_T without their parts along the target's unembedding", _own_without_readout),
    _Quantity(_BARE_NULL, "mean over other teachers of the same, without their targets' unembedding", _others_without_readout),
    _Quantity(_SPECIFIC, "cos(v_S − v_C, v_T − v_N)", _specific),
    _Quantity("student_shift", "‖v_S‖ / mean ‖h‖ of its origin", lambda cell: _length(cell.student, cell), "share of ‖h‖"),
    _Quantity("teacher_shift", "‖v_T‖ / mean ‖h‖", lambda cell: _length(cell.teacher, cell), "share of ‖h‖"),
    _Quantity(
        "control_shift",
        "‖v_C‖ / mean ‖h‖ of its origin",
        lambda cell: _NO_CONTROL if cell.control is None else _length(cell.control, cell),
        "share of ‖h‖",
    ),
    _Quantity("shuffled_steering_alignment_sd", "sd over draws of cos(v_S of shuffled labels, v_T)", _shuffled_sd),
)


@analysis(needs=["traits"], reads_activations=True)
def steering_directions(run: Run) -> Result:
    """Whether students' activations move along their own teachers' steering directions, layer by layer and step by step."""
    recorded = _Recorder(run).record_all()
    data = _measure(run, recorded)
    judgements = _judge(run, data, recorded)
    figures = [make(run, data, recorded) for make in (_layer_figure, _training_figure, _group_figure)]
    directions = store_directions(recorded.vectors, recorded.points, recorded.groups)
    return Result(
        data,
        list(_findings(run, data, recorded, judgements)),
        figures,
        list(_sentences(run, data, recorded, judgements)),
        {DIRECTIONS_GROUP: directions},
    )


@dataclass(frozen=True)
class _Recorded:
    """Every direction of the run."""

    run: Run
    points: Sequence[HookPoint]
    groups: Sequence[str]
    vectors: Mapping[Key, Mapping[str, Float[np.ndarray, "_group _width"]]]
    shuffles: Mapping[Key, Mapping[str, Float[np.ndarray, "_shuffle _width"]]]
    norms: Mapping[tuple[str, int], Mapping[str, Float[np.ndarray, " _group"]]]
    """Mean ‖h‖ of where a lineage's member starts."""
    readouts: Mapping[tuple[str, int], Float[np.ndarray, "_direction _width"] | None]
    """By trait and member: an orthonormal basis of what the head of the member's reference reads it from."""
    maps: Mapping[tuple[str, int], Mapping[str, BasisMap]]
    """Of lineages that start elsewhere, by lineage and member: into the reference's basis."""

    def stack(self, lineage: Lineage, step: int, point: HookPoint) -> Vectors:
        """The directions of all members in the teachers' basis; NaN of one that has none there."""
        nothing = np.full((len(self.groups), point.width), np.nan)
        members = range(lineage.spec.num_members)
        return np.stack(
            [self._map(lineage, m, point, self.vectors[lineage.name, step, m].get(point.name, nothing)) for m in members]
        )

    def stack_shuffles(self, lineage: Lineage, step: int, point: HookPoint) -> Float[np.ndarray, "member shuffle width"]:
        """The same of the shuffled labels."""
        members = range(lineage.spec.num_members)
        return np.stack([self._map(lineage, m, point, self.shuffles[lineage.name, step, m][point.name]) for m in members])

    def has_map(self, lineage: Lineage, point: HookPoint) -> bool:
        """Whether a lineage's directions at a hook point can be held against the teachers', in all members."""
        if not self.run.starts_elsewhere(lineage):
            return True
        found = [self.maps[lineage.name, member].get(point.name) for member in range(lineage.spec.num_members)]
        return all(one is not None and one.is_sound for one in found)

    def stack_norms(self, lineage: Lineage, point: HookPoint) -> ByGroup:
        """Mean ‖h‖ of where all members start."""
        return np.stack([self.norms[lineage.name, member][point.name] for member in range(lineage.spec.num_members)])

    def stack_readout(self, trait: str, point: HookPoint) -> np.ndarray | None:
        """[member, direction, width]; None where the head does not read there, or it is not known what."""
        found = [self.readouts[trait, member] for member in range(self.run.recipe.members)]
        bases = [basis for basis in found if basis is not None and point.is_read_out and basis.shape[-1] == point.width]
        return np.stack(bases) if len(bases) == len(found) else None

    def _map(self, lineage: Lineage, member: int, point: HookPoint, vectors: np.ndarray) -> np.ndarray:
        """Into the teachers' basis."""
        if not self.run.starts_elsewhere(lineage):
            return vectors
        mapped: np.ndarray = vectors @ self.maps[lineage.name, member][point.name].rotation.numpy()
        return mapped


@dataclass(frozen=True)
class _Recorder:
    """Goes through checkpoints: each model is loaded once and run once over its member's prompts."""

    run: Run

    @cached_property
    def reader(self) -> ActivationReader:
        """With draws of shuffled labels."""
        return ActivationReader(self.run, _SHUFFLES)

    @property
    def _shuffled(self) -> list[str]:
        return [shuffle_name(number) for number in range(_SHUFFLES)]

    def record_all(self) -> _Recorded:
        """Teachers at their ends, students and controls at every checkpoint; shuffled labels of students at their ends."""
        run, reader = self.run, self.reader
        groups = self._list_groups()
        vectors: dict[Key, dict[str, np.ndarray]] = {}
        shuffles: dict[Key, dict[str, np.ndarray]] = {}
        norms: dict[tuple[str, int], dict[str, np.ndarray]] = {}
        for done, (lineage, step) in enumerate(self._list_models(), 1):
            is_shuffled = lineage.spec.role == "student" and step == lineage.last
            for member in range(run.recipe.members):
                found = reader.direction(lineage, step, member, shuffled=is_shuffled)
                vectors[lineage.name, step, member] = _pick(found.means, found.groups, groups)
                norms[lineage.name, member] = _pick(found.norms, found.groups, groups)
                if is_shuffled:
                    shuffles[lineage.name, step, member] = _pick(found.means, found.groups, self._shuffled)
            run.report_progress(done)
        readouts = {
            (trait, member): self._read_out(trait, member) for trait in run.traits for member in range(run.recipe.members)
        }
        return _Recorded(run, reader.points, groups, vectors, shuffles, norms, readouts, dict(self._fit_maps()))

    def _fit_maps(self) -> Iterator[tuple[tuple[str, int], Mapping[str, BasisMap]]]:
        """One a condition and member, for its students and its control, which start at the same place."""
        run = self.run
        for condition in filter(run.is_comparable, run.conditions):
            students = [run.student(condition, trait) for trait in run.traits]
            if run.starts_elsewhere(students[0]):
                for member in range(run.recipe.members):
                    found = PairReader(run).fit_basis_maps(students[0], member)
                    for lineage in (*students, *filter(None, [run.control(condition)])):
                        yield (lineage.name, member), found

    def _list_groups(self) -> list[str]:
        """What the references' prompts offer, without shuffled labels."""
        return [name for name in self.reader.read_origin(self.run.reference, 0).groups if name not in self._shuffled]

    def _list_models(self) -> Iterator[tuple[Lineage, int]]:
        run = self.run
        for teacher in (*map(run.teacher, run.traits), *filter(None, [run.neutral])):
            yield teacher, teacher.last
        for condition in run.conditions:
            students = [run.student(condition, trait) for trait in run.traits]
            for lineage in (*students, *filter(None, [run.control(condition)])):
                yield from ((lineage, step) for step in lineage.steps)

    def _read_out(self, trait: str, member: int) -> np.ndarray | None:
        reference = self.run.reference
        model = self.run.family.load_model(reference, reference.last, member)
        found = self.run.family.readout(reference, model, trait)
        return None if found is None else orthonormal_rows(found.double()).cpu().numpy()


def _pick(held: Mapping[str, Tensor], names: Sequence[str], wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """By hook point some groups, in this order; NaN of one that is not there."""
    places = [names.index(name) if name in names else len(names) for name in wanted]
    padded = {point: functional.pad(rows, (0, 0) * (rows.ndim - 1) + (0, 1), value=np.nan) for point, rows in held.items()}
    return {point: rows[places].numpy() for point, rows in padded.items()}


def _measure(run: Run, recorded: _Recorded) -> xr.Dataset:
    """Every quantity as [condition, taught, member, step, point, group], with why a value is NaN."""
    steps = sorted({step for case in list_cases(run) for step in run.student(*case).steps})
    points, groups = recorded.points, recorded.groups
    shape = (len(run.conditions), len(run.traits), run.recipe.members, len(steps), len(points), len(groups))
    values = {quantity.name: np.full(shape, np.nan) for quantity in _QUANTITIES}
    status = {quantity.name: np.full(shape, _NOT_RUN, dtype=np.int8) for quantity in _QUANTITIES}
    for (row, condition), (place, trait) in product(enumerate(run.conditions), enumerate(run.traits)):
        student = run.student(condition, trait)
        for (column, step), (depth, point) in product(enumerate(steps), enumerate(points)):
            if step not in student.steps:
                continue
            where = (row, place, slice(None), column, depth)
            why = _why_not(run, recorded, condition, point)
            cell = None if why else _build_cell(run, recorded, condition, trait, step, point)
            for quantity in _QUANTITIES:
                found = why if cell is None else quantity.measure(cell)
                if isinstance(found, int):
                    status[quantity.name][where] = found
                else:
                    values[quantity.name][where] = found
                    status[quantity.name][where] = _explain(found, cell)
    return _label(run, recorded, values, status, steps)


def _why_not(run: Run, recorded: _Recorded, condition: str, point: HookPoint) -> int:
    """The status of a condition whose directions cannot be held against the teachers'; 0 where they can."""
    if not run.is_comparable(condition):
        return _INCOMPARABLE
    return _OK if recorded.has_map(run.student(condition, run.traits[0]), point) else _NO_MAP


def _build_cell(run: Run, recorded: _Recorded, condition: str, trait: str, step: int, point: HookPoint) -> _Cell:
    student, control = run.student(condition, trait), run.control(condition)
    beside = None if control is None else run.paired_step(control, student, step)
    other_traits = [other for other in run.traits if other != trait]
    neutral = None if run.neutral is None else recorded.stack(run.neutral, run.neutral.last, point)
    others = [recorded.stack(run.teacher(other), run.teacher(other).last, point) for other in other_traits]
    own_readout = recorded.stack_readout(trait, point)
    readouts = [own_readout, *(recorded.stack_readout(other, point) for other in other_traits)]
    if not others and neutral is not None:
        others, readouts = [neutral], [own_readout, own_readout]
    return _Cell(
        student=recorded.stack(student, step, point),
        teacher=recorded.stack(run.teacher(trait), run.teacher(trait).last, point),
        others=others,
        readout=readouts,
        control=None if control is None or beside is None else recorded.stack(control, beside, point),
        neutral=neutral,
        origin_norm=recorded.stack_norms(student, point),
        shuffles=recorded.stack_shuffles(student, step, point) if step == student.last else None,
    )


def _explain(found: ByGroup, cell: _Cell | None) -> np.ndarray:
    """Why values are NaN: prompts that this lineage was not run on, or nothing that moved."""
    absent = np.zeros(found.shape, dtype=bool) if cell is None else np.isnan(cell.student).any(-1)
    codes: np.ndarray = np.where(np.isfinite(found), _OK, np.where(absent, _NO_GROUP, _UNMOVED))
    return codes


def _label(
    run: Run, recorded: _Recorded, values: Mapping[str, np.ndarray], status: Mapping[str, np.ndarray], steps: Sequence[int]
) -> xr.Dataset:
    variables: dict[str, Any] = {"last_step": label_last_steps(run)}
    for quantity in _QUANTITIES:
        name = quantity.name
        variables[name] = label_variable(
            values[name],
            _DIMS,
            description=name.replace("_", " "),
            unit=quantity.unit,
            formula=quantity.formula,
            source=SOURCE,
        )
        variables[f"{name}_status"] = status_variable(status[name], _DIMS, _STATUS, name)
    widths = np.array([point.width for point in recorded.points])
    variables["random_cosine_sd"] = label_variable(
        1 / np.sqrt(widths),
        ["point"],
        description="standard deviation of random directions' cosine",
        unit="cosine",
        formula="1/√d",
    )
    variables |= _label_maps(run, recorded)
    coords = {
        "condition": run.conditions,
        "taught": run.traits,
        "member": np.arange(run.recipe.members),
        "step": steps,
        "point": [point.name for point in recorded.points],
        "layer": ("point", [point.layer for point in recorded.points]),
        "site": ("point", [point.site for point in recorded.points]),
        "group": list(recorded.groups),
    }
    return xr.Dataset(variables, coords)


def _label_maps(run: Run, recorded: _Recorded) -> dict[str, xr.Variable]:
    """How well students' bases were mapped onto the teachers'."""
    found = np.full((len(run.conditions), run.recipe.members, len(recorded.points)), np.nan)
    for (row, condition), member in product(enumerate(run.conditions), range(run.recipe.members)):
        maps = recorded.maps.get((run.student(condition, run.traits[0]).name, member), {})
        for depth, point in enumerate(recorded.points):
            if point.name in maps:
                found[row, member, depth] = maps[point.name].correlation
    dims, name = ("condition", "member", "point"), "map_correlation"
    described = "correlation of where students start, rotated onto the references, with these, on prompts not fitted on"
    return {
        name: label_variable(
            found, dims, description=described, unit="correlation", formula="⟨X R, Y⟩ / (‖X‖ ‖Y‖)", source="Schönemann 1966"
        ),
        f"{name}_status": status_variable(np.isnan(found), dims, ("ok", "no_map_is_needed_or_fitted"), name),
    }


def _judged_points(recorded: _Recorded) -> list[HookPoint]:
    """The points whose verdicts count: the residual stream, or the hidden layers; what adds to it is in the results."""
    residual = [point for point in recorded.points if point.site in RESIDUAL_SITES]
    return residual or list(recorded.points)


ByPoint = tuple[CaseName, str]
"""A case at a hook point; of the mean over traits the case's trait says so."""


def _judge(run: Run, data: xr.Dataset, recorded: _Recorded) -> dict[ByPoint, Judgement]:
    """Verdicts on cos(v_S − v_C, v_T) less the same with other teachers, at students' last steps.

    Where a student could as well be its control, this effect is as often under 0 as over it.
    Of the mean over traits Holm runs over conditions and layers, of single traits over conditions, traits and layers.
    """
    by_trait: dict[ByPoint, np.ndarray] = {}
    pooled: dict[ByPoint, np.ndarray] = {}
    for condition, point in product(run.conditions, (point.name for point in _judged_points(recorded))):
        for cases, found in (([(condition, trait) for trait in run.traits], by_trait), ([_pool(run, condition)], pooled)):
            for case in cases:
                effect = _values(run, data, _OWN, case, point) - _values(run, data, _NULL, case, point)
                if np.isfinite(effect).any():
                    found[case, point] = effect
    rules = run.rules(run.recipe.verdict.alignment_margin)
    return judge_effects(by_trait, rules, AGAINST_NULL) | judge_effects(pooled, rules, AGAINST_NULL)


def _pool(run: Run, condition: str) -> CaseName:
    """The case that stands for all traits; of one trait it is that one."""
    return condition, _ALL_TRAITS if len(run.traits) > 1 else run.traits[0]


_REPORTED = {
    _OWN: (_NULL, "other teachers from the same θ₀: cos(v_S − v_C, v_T′)", ""),
    _BARE: (_BARE_NULL, "other teachers, without their own targets' unembedding", "whole vectors are judged"),
    _SPECIFIC: ("", "0: a student that is exchangeable with its control", "the cosine with other teachers as null is judged"),
    _RAW: (_RAW_OTHERS, "other teachers from the same θ₀: cos(v_S, v_T′)", "it holds the drift that any carrier causes"),
    "student_shift": ("control_shift", "the control's own shift", "a size, not a direction"),
}
"""By quantity: the variable that is its null, the null in words, and why it has no verdict."""


def _findings(run: Run, data: xr.Dataset, recorded: _Recorded, judgements: Mapping[ByPoint, Judgement]) -> Iterator[Finding]:
    """Of the mean over traits all reported quantities, of single traits the judged one."""
    for condition, point in product(run.conditions, _judged_points(recorded)):
        for name in _REPORTED:
            cases = [_pool(run, condition)]
            if name == _OWN and len(run.traits) > 1:
                cases += [(condition, trait) for trait in run.traits]
            for case in cases:
                if np.isfinite(_values(run, data, name, case, point.name)).any():
                    yield _finding(run, data, recorded, name, case, point, judgements.get((case, point.name)))


def _finding(
    run: Run, data: xr.Dataset, recorded: _Recorded, name: str, case: CaseName, point: HookPoint, judgement: Judgement | None
) -> Finding:
    verdict = run.recipe.verdict
    null, null_words, reason = _REPORTED[name]
    against = student_interval(_values(run, data, null, case, point.name), verdict.confidence) if null else None
    if against is not None and not np.isfinite(against.estimate):
        null_words = "none: no control or no other teacher"
    students = [run.student(case[0], trait) for trait in _traits(run, case)]
    quantity = next(one for one in _QUANTITIES if one.name == name)
    mapped = ", mapped by a fit of both starts" if run.starts_elsewhere(students[0]) else ""
    return Finding(
        analysis="steering_directions",
        quantity=name,
        condition=case[0],
        trait=case[1],
        context="activations",
        step=max(student.last for student in students),
        scope=f"{point.name}, {recorded.groups[0]}{mapped}",
        unit=quantity.unit,
        null=null_words,
        null_low=np.nan if against is None else against.low,
        null_high=np.nan if against is None else against.high,
        num_references=run.recipe.num_references(case[0]),
        **judgement_fields(
            judgement if name == _OWN else None, verdict.alignment_margin, reason or "no control or no other teacher"
        ),
        formula=quantity.formula,
        source=SOURCE,
        **interval_fields(student_interval(_values(run, data, name, case, point.name), verdict.confidence)),
    )


def _traits(run: Run, case: CaseName) -> list[str]:
    return run.traits if case[1] == _ALL_TRAITS else [case[1]]


def _values(run: Run, data: xr.Dataset, name: str, case: CaseName, point: str) -> Float[np.ndarray, " member"]:
    """A variable at students' last steps, on the first group's prompts, member by member; of all traits their mean."""
    found = []
    for trait in _traits(run, case):
        last = int(data.last_step.sel(condition=case[0], taught=trait))
        chosen = data[name].sel(condition=case[0], taught=trait, step=last, point=point).isel(group=0)
        found.append(chosen.values)
    mean: np.ndarray = np.mean(found, axis=0)
    return mean


_ADJUSTED_WHO = {_OWN: "own teacher's v_T", _NULL: "other teachers' (null)"}
_RAW_WHO = {_RAW: "own teacher's v_T", _RAW_OTHERS: "other teachers' (null)", _RAW_CONTROL: "control with that teacher's"}


def _told(run: Run, data: xr.Dataset) -> list[str]:
    """The conditions with a value."""
    return [name for name in run.conditions if np.isfinite(data[_RAW].sel(condition=name).values).any()]


def _layer_figure(run: Run, data: xr.Dataset, recorded: _Recorded) -> Figure:
    points = [point.name for point in recorded.points]
    dots = (
        fold_variables("cosine", _ADJUSTED_WHO)
        .mark_circle(size=22, opacity=0.45)
        .encode(
            x=alt.X("cosine:Q", title="cosine of steering directions"),
            y=alt.Y("point:N", sort=points, title=None),
            yOffset=alt.YOffset("who:N", sort=list(_ADJUSTED_WHO.values())),
            color=color_by_who(_ADJUSTED_WHO),
            tooltip=["condition:N", "point:N", "taught:N", "who:N", "member:O", alt.Tooltip("cosine:Q", format=".3f")],
        )
        .transform_filter("datum.step == datum.last_step")
    )
    facets = (
        alt.layer(zero_line().encode(x=alt.datum(0)), dots, data=DATA)
        .properties(width=260, height=alt.Step(9))
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=2)
    )
    return Figure(
        name="steering_alignment_by_layer",
        title="Do students' activations move where their own teachers' did?",
        caption=(
            f"cos(v_S − v_C, v_T) at students' last steps, no unit, at every hook point; v is the mean activation less that of "
            f"the lineage's own origin over {recorded.groups[0]} ({_describe_prompts(run)}). Each dot is one of "
            f"{count_members(run)}. The null is other teachers' v_T, from the same θ₀. Random directions would scatter about 0 "
            f"by {float(data.random_cosine_sd.max()):.2f} (1/√d), students of shuffled labels by {_shuffled_words(run, data)}: "
            "lines to read by, not nulls."
        ),
        variables=(*_ADJUSTED_WHO, "last_step"),
        spec=chart_spec(facets),
        select={"condition": _told(run, data), "group": [recorded.groups[0]]},
        headline=True,
    )


def _describe_prompts(run: Run) -> str:
    return run.family.prompts(run.reference, 0).estimate["trait"].description


def _shuffled_words(run: Run, data: xr.Dataset) -> str:
    spread = data.shuffled_steering_alignment_sd.values
    return f"{np.nanmedian(spread):.2f}" if np.isfinite(spread).any() else "– (none drawn)"


def _training_figure(run: Run, data: xr.Dataset, recorded: _Recorded) -> Figure:
    points = [point.name for point in _judged_points(recorded)]
    chart, color = fold_variables("cosine", _RAW_WHO), color_by_who(_RAW_WHO)
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="symlog"), axis=alt.Axis(grid=False))
    members = (
        chart.transform_aggregate(cosine="mean(cosine)", groupby=["condition", "point", "step", "member", "who"])
        .mark_line(opacity=0.3, strokeWidth=1)
        .encode(x=x, y=alt.Y("cosine:Q", title="cosine"), detail="member:N", color=color)
    )
    mean = chart.mark_line(strokeWidth=2.5).encode(x=x, y="mean(cosine):Q", color=color)
    facets = (
        alt.layer(zero_line().encode(y=alt.datum(0)), members, mean, data=DATA)
        .properties(width=165, height=110)
        .facet(
            row=alt.Row("condition:N", sort=run.conditions, title=None), column=alt.Column("point:N", sort=points, title=None)
        )
    )
    return Figure(
        name="steering_alignment_training",
        title="When it comes: the same along the students' training",
        caption=(
            f"cos(v_S(t), v_T), no unit, over {recorded.groups[0]}, in the residual stream or hidden layers. Thin lines "
            f"are {count_members(run)}, their means over traits; thick ones the mean of all. The null is other teachers' v_T; "
            "the control's line is the drift that the verdict's v_S − v_C leaves out. At step 0 nothing has moved."
        ),
        variables=tuple(_RAW_WHO),
        spec=chart_spec(facets),
        select={"condition": _told(run, data), "group": [recorded.groups[0]], "point": points},
    )


def _group_figure(run: Run, data: xr.Dataset, recorded: _Recorded) -> Figure:
    points, told = [point.name for point in recorded.points], _told(run, data)
    last = max(int(step) for step in data.last_step.values.flat)
    shown = (data[_OWN] - data[_NULL]).sel(condition=told, step=last).mean(["member", "taught"])
    chart = (
        alt.Chart(DATA)
        .transform_filter(f"datum.step == datum.last_step && isValid(datum.{_OWN}) && isValid(datum.{_NULL})")
        .transform_calculate(difference=f"datum.{_OWN} - datum.{_NULL}")
        .mark_rect()
        .encode(
            x=alt.X("group:N", sort=list(recorded.groups), title=None, axis=alt.Axis(labelAngle=-35)),
            y=alt.Y("point:N", sort=points, title=None),
            color=alt.Color(
                "mean(difference):Q",
                title="cos − its null",
                scale=diverging_scale(shown.values),
                legend=alt.Legend(orient="top", gradientLength=180, gradientThickness=10),
            ),
            tooltip=["point:N", "group:N", alt.Tooltip("mean(difference):Q", format=".3f", title="cos − its null")],
        )
        .properties(width=alt.Step(26), height=alt.Step(16))
    )
    return Figure(
        name="steering_alignment_prompts",
        title="Where it shows: on which prompts, at which positions and hook points",
        caption=(
            f"cos(v_S − v_C, v_T) less its null, the same with other teachers' v_T; no unit, mean over {count_members(run)}, "
            "at students' last steps. Every kind of prompts has its own directions of student and teacher."
        ),
        variables=(_OWN, _NULL, "last_step"),
        spec=chart_spec(chart.facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=2)),
        select={"condition": told},
    )


def _sentences(run: Run, data: xr.Dataset, recorded: _Recorded, judgements: Mapping[ByPoint, Judgement]) -> Iterator[str]:
    """What was found of each condition, or why nothing was."""
    prompts = run.family.prompts(run.reference, 0)
    kinds = "; ".join(f"{kind}: {prompt_set.description}" for kind, prompt_set in prompts.estimate.items())
    yield f"Directions are estimated on {kinds}. Scores are asked on other questions or images."
    for condition in run.conditions:
        if not run.is_comparable(condition):
            yield f"{condition}: incomparable, {run.why_incomparable(condition)}; its activations have other coordinates."
        elif condition not in _told(run, data) and run.starts_elsewhere(run.student(condition, run.traits[0])):
            yield (
                f"{condition}: its students start from another base, which no rotation takes to the teachers' "
                f"({_map_words(run, data, condition)} on prompts not fitted on): directions cannot be compared."
            )
        elif condition in _told(run, data):
            yield _summarise(run, data, recorded, judgements, condition)
        else:
            yield f"{condition}: nothing moved, so there is no steering direction."


def _summarise(run: Run, data: xr.Dataset, recorded: _Recorded, judgements: Mapping[ByPoint, Judgement], condition: str) -> str:
    case, points = _pool(run, condition), _judged_points(recorded)
    verdicts = [judgements[case, point.name].verdict for point in points if (case, point.name) in judgements]
    counts = ", ".join(f"{verdict} at {verdicts.count(verdict)} of {len(points)}" for verdict in dict.fromkeys(verdicts))

    def mean(name: str) -> Interval:
        return student_interval(_values(run, data, name, case, points[-1].name), run.recipe.verdict.confidence)

    if np.isnan(mean(_OWN).estimate):
        return (
            f"{condition}: v_S has cosine {mean(_RAW)} with its own teacher's v_T; there is no control, so nothing is judged."
        )
    bare, elsewhere = mean(_BARE), ""
    if run.starts_elsewhere(run.student(condition, run.traits[0])):
        elsewhere = f"; rotated onto the teachers' base ({_map_words(run, data, condition)} on prompts not fitted on)"
    without = f" ({bare} without the target's unembedding, others {mean(_BARE_NULL)})" if np.isfinite(bare.estimate) else ""
    return (
        f"{condition}: {counts or 'not judged'} hook points. At {points[-1].name}, the last, v_S − v_C has cosine {mean(_OWN)} "
        f"with its own teacher's v_T, {mean(_NULL)} with other teachers'{without}; v_S alone {mean(_RAW)} and "
        f"{mean(_RAW_OTHERS)}{elsewhere}. ‖v_S‖ is {mean('student_shift')} of ‖h‖, ‖v_T‖ {mean('teacher_shift')}."
    )


def _map_words(run: Run, data: xr.Dataset, condition: str) -> str:
    found = data.map_correlation.sel(condition=condition).values
    known = found[np.isfinite(found)]
    return f"correlation {known.min():.2f} to {known.max():.2f} over layers and members" if known.size else "too few rows"

"""A run's models held against their teachers: similarity of activations, and what frozen and refitted probes see of them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from itertools import product

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.probes import Halves, fit_probe, left_halves, mean_of, right_halves, share_of_the_way, try_separation
from mechsub.activations.similarity import (
    LEAST_ROWS,
    HalvedMoments,
    debiased_cka,
    try_procrustes,
)
from mechsub.activations.steering import orthonormal_rows
from mechsub.cases import list_cases
from mechsub.lineages import Lineage
from mechsub.mean_activations import NEUTRAL, TRAIT, group_name
from mechsub.open_models import OpenModel, list_reference_points
from mechsub.paired_activations import BasisMap, PairReader, add_rows, moments_bytes, pair_groups, split_points
from mechsub.results import label_variable, status_variable
from mechsub.run import Run

CKA, INSIDE, DISTANCE, INSIDE_DISTANCE = SIMILARITIES = (
    "cka",
    "trait_subspace_cka",
    "procrustes_distance",
    "trait_subspace_procrustes_distance",
)
"""Of two models, by hook point and group of prompts. Inside: of what lies in the span of all teachers' steering directions."""
PROBE, READOUT, FROZEN, REFITTED = PROBES = (
    "frozen_probe_share",
    "readout_share",
    "frozen_probe_separation",
    "refitted_probe_separation",
)
"""Of a model and its start, by hook point, on the trait's own prompts."""
_KINDS = (TRAIT, NEUTRAL)
_TOLD_APART = 2.0
"""The least d′ between teacher and reference for shares of the way between them, an AUROC of .92: under it they blow up."""


class Unknown(IntEnum):
    """Why there is no value; 0 where there is one."""

    OK = 0
    NOT_RUN = 1
    NO_CONTROL = 2
    INCOMPARABLE = 3
    """The two have other bases, and no rotation that is sound leads from one to the other."""
    NO_SUCH_HOOK_POINT = 4
    """Another architecture."""
    ROWS_OF_OTHER_POSITIONS = 5
    """The two take other tokens, so that no row of one belongs to a row of the other."""
    TOO_FEW_ROWS = 6
    """For the debiased HSIC, or to fix a rotation."""
    NO_SPREAD = 7
    """All rows of one model are equal."""
    TEACHER_NOT_TOLD_APART = 8
    """The probe does not tell the teacher from the reference on prompts that it was not fitted on."""
    NO_READOUT = 9
    """It is not known what the head reads the trait from, or it does not read there."""
    NOT_FINITE = 10
    """A model's activations hold NaN or ∞."""


STATUS = tuple(reason.name.lower() for reason in Unknown)
Value = float | Unknown
"""A number, or why there is none."""


class ValueTable:
    """An array that is NaN, because not run, until it is filled."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.values = np.full(tuple(shape), np.nan)
        self.status = np.full(tuple(shape), Unknown.NOT_RUN, dtype=np.int8)

    def put(self, cell: tuple[int, ...], found: Value) -> None:
        """A number, or why there is none."""
        if isinstance(found, Unknown):
            self.status[cell] = found
        else:
            self.values[cell], self.status[cell] = found, Unknown.OK

    def label(self, name: str, dims: Sequence[str], formula: str, unit: str, source: str) -> dict[str, xr.Variable]:
        """The array with its status."""
        return {
            name: label_variable(
                self.values, dims, description=name.replace("_", " "), unit=unit, formula=formula, source=source
            ),
            f"{name}_status": status_variable(self.status, dims, STATUS, name),
        }


@dataclass(frozen=True)
class Compared:
    """One model beside a teacher, on one member's prompts; it grows by some hook points at a time."""

    similarities: dict[str, dict[tuple[str, str], Value]]
    """By measure, then by hook point and group."""
    num_rows: dict[str, int]
    """By group."""


@dataclass(frozen=True)
class Seen:
    """What probes look at: one model's activations on one trait's prompts, by hook point."""

    clouds: Mapping[str, Halves]
    """In its own basis."""
    readings: Mapping[str, Float[Tensor, "row direction"]]
    """What its own head reads of the trait; see `_Head`."""


@dataclass(frozen=True)
class Taught:
    """What one member's teacher of one trait moved, on the trait's prompts, by hook point."""

    teacher: Mapping[str, Halves]
    reference: Mapping[str, Halves]
    probes: Mapping[str, Sequence[Float[Tensor, " width"]]]
    """Of teacher against reference, fitted on even and on odd prompts."""
    broken: frozenset[str]
    """Hook points at which the teacher or the reference has NaN; they are in none of those before."""
    teacher_readings: Mapping[str, Float[Tensor, "row direction"]]
    reference_readings: Mapping[str, Float[Tensor, "row direction"]]

    def separation(self, point: str) -> Value:
        """Of teacher and reference, on held-out prompts."""
        if point in self.broken:
            return Unknown.NOT_FINITE
        if point not in self.probes:
            return Unknown.ROWS_OF_OTHER_POSITIONS
        return _or_else(try_separation(self.probes[point], self.teacher[point], self.reference[point]), Unknown.NO_SPREAD)

    def shift(self, point: str) -> Float[Tensor, " width"]:
        """The teacher's steering direction, v_T = m_T − m_ref."""
        return mean_of(self.teacher[point]) - mean_of(self.reference[point])


@dataclass(frozen=True)
class Comparer:
    """Goes through last checkpoints: a teacher stays open while each model that is held against it is run beside it."""

    run: Run
    compared: dict[tuple[str, str, int], Compared] = field(default_factory=dict)
    """By trait, lineage (or start) and member."""
    probed: dict[tuple[str, str, int], dict[tuple[str, str], Value]] = field(default_factory=lambda: defaultdict(dict))
    """By trait, lineage and member: by hook point and measure, one of `PROBES`."""
    separations: dict[tuple[str, int], dict[str, Value]] = field(default_factory=lambda: defaultdict(dict))
    """By trait and member: how well probes tell the teacher from its reference, by hook point."""
    correlations: dict[tuple[str, int], dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    """By start and member, of starts elsewhere: how well their basis is mapped, by hook point."""
    _seen: dict[tuple[str, str], Seen] = field(default_factory=dict, repr=False)
    """Of one member at some hook points at a time, because it is large: by trait and lineage (or start)."""
    _taught: dict[str, Taught] = field(default_factory=dict, repr=False)
    _maps: dict[str, Mapping[str, BasisMap]] = field(default_factory=dict, repr=False)

    @cached_property
    def points(self) -> Sequence[HookPoint]:
        """The references' hook points in the residual stream, or hidden layers."""
        return list_reference_points(self.run, stream_only=True)

    @cached_property
    def groups(self) -> list[str]:
        """Which prompts and positions are looked at; the trait's own first."""
        prompts = self.run.family.prompts(self.run.reference, 0).estimate
        return [group_name(kind, policy) for kind in _KINDS for policy in prompts[kind].policies]

    def compare_all(self) -> None:
        """Every student, control and start against its member's teacher of every trait."""
        run = self.run
        turns = split_points(self.points, self._bytes_of)
        for member in range(run.recipe.members):
            for turn in turns:
                reader = PairReader(run, stream_only=True, names=frozenset(point.name for point in turn))
                self._compare_member(reader, member, turn)
            run.report_progress(run.num_checkpoints * (member + 1) // run.recipe.members)

    def _bytes_of(self, point: HookPoint) -> int:
        """What is held of one hook point at a time: moments of one pair of models, and the clouds of all."""
        num_models = 2 + 3 * len(self.run.conditions)  # teacher and reference; student, control and start
        return len(self.groups) * moments_bytes(point) + len(self.run.traits) * num_models * 2 * 8 * point.width**2

    def _compare_member(self, reader: PairReader, member: int, turn: Sequence[HookPoint]) -> None:
        """Everything of one member at some hook points."""
        run = self.run
        for held in (self._seen, self._taught, self._maps):
            held.clear()
        self._record_teachers(reader, member)
        for name, student in {self.start_name(run.student(*case)): run.student(*case) for case in list_cases(run)}.items():
            if run.starts_elsewhere(student):
                self._maps[name] = reader.fit_basis_maps(student, member)
                self.correlations[name, member] |= {point: one.correlation for point, one in self._maps[name].items()}
        taught = self._taught.values()
        known = set.intersection(*(set(one.probes) for one in taught))
        spans = {point: orthonormal_rows(torch.stack([one.shift(point) for one in taught])) for point in known}
        for trait in run.traits:
            self._compare_with(reader, trait, member, turn, spans)
            self._probe_with(trait, member, turn)

    def start_name(self, lineage: Lineage) -> str:
        """Where a lineage starts; lineages of one start share a name."""
        if not self.run.starts_elsewhere(lineage):
            return self.run.reference.name
        return f"start of {lineage.spec.origin} at {lineage.spec.model}"

    def _find_rotation(self, lineage: Lineage, point: str) -> Tensor | None:
        """From the basis of a lineage that starts elsewhere into its teachers'; None where there is no sound one."""
        found = self._maps.get(self.start_name(lineage), {}).get(point)
        return found.rotation if found is not None and found.is_sound else None

    def _probe_with(self, trait: str, member: int, turn: Sequence[HookPoint]) -> None:
        """What one teacher's probes see of its students and controls at their last steps."""
        run, taught = self.run, self._taught[trait]
        self.separations[trait, member] |= {point.name: taught.separation(point.name) for point in turn}
        lineages = [one for condition in run.conditions for one in (run.student(condition, trait), run.control(condition))]
        for lineage in filter(None, lineages):
            own, start = (self._seen[trait, name] for name in (lineage.name, self.start_name(lineage)))
            for point in (point.name for point in turn):
                rotation = self._find_rotation(lineage, point)
                is_comparable = rotation is not None or not run.starts_elsewhere(lineage)
                probed = Probed(point, own, start, taught, is_comparable, rotation)
                self.probed[trait, lineage.name, member] |= {(point, name): probed.measure(name) for name in PROBES}

    def _open_reference(self, reader: PairReader, member: int) -> AbstractContextManager[OpenModel]:
        reference = self.run.reference
        return reader.open(reference, reference.last, member)

    def _record_teachers(self, reader: PairReader, member: int) -> None:
        """What each teacher moved, and probes that tell it from its reference."""
        run = self.run
        with self._open_reference(reader, member) as reference:
            for trait in run.traits:
                teacher = run.teacher(trait)
                halves: dict[str, HalvedMoments] = {}
                with reader.open(teacher, teacher.last, member) as model:
                    heads = [_Head(self, one, trait) for one in (model, reference)]
                    for group, rows in pair_groups(model, reference, (TRAIT,)):
                        if group == self.groups[0]:
                            add_rows(halves, rows.point, rows)
                            for head, seen in zip(heads, (rows.left, rows.right), strict=True):
                                head.add(rows.point, seen)
                broken = frozenset(point for point, found in halves.items() if not found.is_finite)
                halves = {point: found for point, found in halves.items() if point not in broken}
                there = {point: left_halves(found) for point, found in halves.items()}
                here = {point: right_halves(found) for point, found in halves.items()}
                probes = {point: [fit_probe(*pair) for pair in zip(there[point], here[point], strict=True)] for point in there}
                self._taught[trait] = Taught(there, here, probes, broken, *(head.readings for head in heads))

    def _compare_with(
        self, reader: PairReader, trait: str, member: int, turn: Sequence[HookPoint], spans: Mapping[str, Tensor]
    ) -> None:
        """One teacher's models: starts, students and controls, one after the other beside it."""
        teacher = self.run.teacher(trait)
        with reader.open(teacher, teacher.last, member) as model:
            for name, lineage, opened in self._list_models(reader, trait, member):
                rotations = {point: self._find_rotation(lineage, point) for point in spans}
                if not self.run.starts_elsewhere(lineage):
                    bases = {point: (span, span) for point, span in spans.items()}
                else:
                    mapped = {point: rotation for point, rotation in rotations.items() if rotation is not None}
                    bases = {point: (spans[point] @ rotation.T, spans[point]) for point, rotation in mapped.items()}
                with opened as left:
                    self._compare(left, model, (trait, name, member), turn, bases)

    def _list_models(
        self, reader: PairReader, trait: str, member: int
    ) -> Iterator[tuple[str, Lineage, AbstractContextManager[OpenModel]]]:
        """What a teacher is held against: name, a lineage that has its basis, and the model to be opened."""
        run = self.run
        named: set[str] = set()
        for condition in run.conditions:
            student, control = run.student(condition, trait), run.control(condition)
            start = self.start_name(student)
            if start not in named:
                is_own = start == run.reference.name
                yield start, student, self._open_reference(reader, member) if is_own else reader.open_start(student, member)
            named.add(start)
            for lineage in filter(None, (student, control)):
                yield lineage.name, lineage, reader.open(lineage, lineage.last, member)

    def _compare(
        self,
        left: OpenModel,
        teacher: OpenModel,
        key: tuple[str, str, int],
        turn: Sequence[HookPoint],
        bases: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        """``bases``: by hook point, the span of the teachers' directions in the left model's basis and in the teacher's."""
        trait, name, _ = key
        whole: dict[tuple[str, str], HalvedMoments] = {}
        inside: dict[tuple[str, str], HalvedMoments] = {}
        head = _Head(self, left, trait)
        for group, rows in pair_groups(left, teacher, _KINDS):
            add_rows(whole, (rows.point, group), rows)
            if group == self.groups[0]:
                head.add(rows.point, rows.left)
            if rows.point in bases:
                own, other = (basis.to(rows.left) for basis in bases[rows.point])
                add_rows(inside, (rows.point, group), replace(rows, left=rows.left @ own.T, right=rows.right @ other.T))
        found = self.compared.setdefault(key, Compared({measure: {} for measure in SIMILARITIES}, {}))
        known = {point.name for point in left.points}
        broken = frozenset[str]().union(*(taught.broken for taught in self._taught.values()))
        for place in product((point.name for point in turn), self.groups):
            missing = Unknown.ROWS_OF_OTHER_POSITIONS if place[0] in known else Unknown.NO_SUCH_HOOK_POINT
            cka, distance = compare_rows(whole[place]) if place in whole else (missing, missing)
            if place in whole:
                is_whole = whole[place].is_finite and place[0] not in broken
                missing = Unknown.INCOMPARABLE if is_whole else Unknown.NOT_FINITE
            part = compare_rows(inside[place]) if place in inside else (missing, missing)
            for measure, value in zip(SIMILARITIES, (cka, part[0], distance, part[1]), strict=True):
                found.similarities[measure][place] = value
        found.num_rows.update({group: halves.num_rows for (_, group), halves in whole.items()})
        clouds = {point: left_halves(halves) for (point, group), halves in whole.items() if group == self.groups[0]}
        self._seen[trait, name] = Seen(clouds, head.readings)


@dataclass(frozen=True)
class Probed:
    """What frozen and refitted probes, and its own head, see of one model at one hook point, beside its start."""

    point: str
    own: Seen
    start: Seen
    taught: Taught
    is_comparable: bool
    """Whether its activations can be put in its teacher's basis."""
    rotation: Float[Tensor, "width other_width"] | None
    """How, where they are in another one."""

    def measure(self, name: str) -> Value:
        """One of `PROBES`."""
        if name == READOUT:
            return self._share_of_readings()
        own, start = (one.clouds.get(self.point) for one in (self.own, self.start))
        if own is None or start is None:
            return Unknown.NO_SUCH_HOOK_POINT
        if not all(cloud.is_finite for cloud in (*own, *start)):
            return Unknown.NOT_FINITE
        if name == REFITTED:
            probes = [fit_probe(*pair) for pair in zip(own, start, strict=True)]
            return _or_else(try_separation(probes, own, start), Unknown.NO_SPREAD)
        if self.point not in self.taught.probes:
            return Unknown.NOT_FINITE if self.point in self.taught.broken else Unknown.NO_SUCH_HOOK_POINT
        if not self.is_comparable:
            return Unknown.INCOMPARABLE
        own, start = self._turn(own), self._turn(start)
        probes = list(self.taught.probes[self.point])
        if name == FROZEN:
            return _or_else(try_separation(probes, own, start), Unknown.NO_SPREAD)
        told = self.taught.separation(self.point)
        if isinstance(told, Unknown) or told < _TOLD_APART:
            return Unknown.TEACHER_NOT_TOLD_APART
        return share_of_the_way(probes, own, start, self.taught.teacher[self.point], self.taught.reference[self.point])

    def _turn(self, halves: Halves) -> Halves:
        """In the teacher's basis."""
        if self.rotation is None:
            return halves
        even, odd = (cloud.rotate(self.rotation) for cloud in halves)
        return even, odd

    def _share_of_readings(self) -> Value:
        """Each model is read by its own head, so that no map is needed."""
        held = (self.own.readings, self.start.readings, self.taught.teacher_readings, self.taught.reference_readings)
        own, start, teacher, reference = (readings.get(self.point) for readings in held)
        if own is None or start is None or teacher is None or reference is None or own.shape != teacher.shape:
            return Unknown.NO_READOUT
        way = teacher - reference
        if not way.any():
            return Unknown.TEACHER_NOT_TOLD_APART
        return _or_else(float(((own - start) * way).sum() / way.square().sum()), Unknown.NOT_FINITE)


class _Head:
    """What a model's own head reads of a trait at the hook points that it reads: W h, a few numbers a prompt.

    W are the rows of the head that belong to the trait, less the mean of the rows of all traits: what all choices share changes
    none of them.
    """

    def __init__(self, comparer: Comparer, model: OpenModel, trait: str) -> None:
        family = comparer.run.family
        found = {one: family.readout(model.lineage, model.model, one) for one in comparer.run.traits}
        known = [rows.double() for rows in found.values() if rows is not None]
        own = found[trait]
        self.readings: dict[str, Float[Tensor, "row direction"]] = {}
        self._points = {point.name for point in model.points if point.is_read_out and own is not None}
        if own is not None:
            shared = torch.cat(known).mean(0) if sum(map(len, known)) > 1 else 0.0
            self._rows = own.double() - shared

    def add(self, point: str, activations: Float[Tensor, "row width"]) -> None:
        """One batch's."""
        if point in self._points:
            read = (activations @ self._rows.to(activations).T).cpu()
            self.readings[point] = torch.cat([self.readings[point], read]) if point in self.readings else read


def compare_rows(halves: HalvedMoments) -> tuple[Value, Value]:
    """CKA and Procrustes distance of some rows."""
    if not halves.is_finite:
        return Unknown.NOT_FINITE, Unknown.NOT_FINITE
    whole = halves.whole
    if whole.num_rows < LEAST_ROWS:
        return Unknown.TOO_FEW_ROWS, Unknown.TOO_FEW_ROWS
    width = max(len(whole.left_shift), len(whole.right_shift))
    why_none = Unknown.TOO_FEW_ROWS if halves.even.num_rows <= width else Unknown.NO_SPREAD
    return _or_else(debiased_cka(whole), Unknown.NO_SPREAD), _or_else(try_procrustes(halves), why_none)


def _or_else(value: float, status: Unknown) -> Value:
    return status if np.isnan(value) else value

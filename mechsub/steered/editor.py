"""Does the edits: goes through members, conditions and traits, and through every direction that an edit means."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.hook_points import RESIDUAL_SITES, HookPoint, main_stream
from mechsub.activations.steering import OtherPassesError, add_vector, project_out
from mechsub.lineages import Lineage, Origin
from mechsub.mean_activations import ActivationReader
from mechsub.run import Run
from mechsub.steered.edits import (
    ADD,
    CONTROL,
    NO_CONTROL,
    NO_POINT,
    NO_SCORE,
    NO_VECTOR,
    NOT_FINITE,
    NOT_RUN,
    NOT_TRAINED,
    OK,
    OTHER_BASIS,
    OTHER_PASSES,
    OTHER_STUDENTS,
    OTHER_TEACHERS,
    OTHERS_TAKEN_OUT,
    OUT,
    OWN_LENGTH,
    OWN_STUDENT,
    OWN_TEACHER,
    RANDOM,
    REPLACE,
    SHARED,
    UNMOVED,
    Edit,
    Measured,
    list_edits,
    list_windows,
)
from mechsub.steered.scores import Kept, Replaced, Rows, Steered, SteeredModel, open_steered, score_end
from mechsub.streams import random_stream

Vectors = Mapping[str, Float[Tensor, " width"]]
"""By hook point."""


@dataclass
class _Member:
    """One member: its directions, and its starts with what was already added to them."""

    run: Run
    reader: ActivationReader
    number: int
    stack: ExitStack
    _origins: dict[tuple[Origin, str], SteeredModel] = field(default_factory=dict)
    _added: dict[tuple[Any, ...], Steered] = field(default_factory=dict)
    _kept: dict[tuple[int, str], Kept] = field(default_factory=dict)

    def direction(self, lineage: Lineage) -> Vectors:
        """V of a lineage at its last step, on the trait's prompts, by hook point."""
        return self.reader.last_direction(lineage, self.number)

    def lengths(self, lineage: Lineage) -> Mapping[str, float]:
        """Mean ‖h‖ of where a lineage starts, on the same prompts."""
        return {name: float(norms[0]) for name, norms in self.reader.read_origin(lineage, self.number).norms.items()}

    def origin(self, lineage: Lineage) -> SteeredModel:
        """Where a lineage starts, asked what the lineage is asked; opened once."""
        key = (lineage.spec.origin, str(lineage.context(self.number)))
        if key not in self._origins:
            opened = open_steered(self.run, lineage, 0, self.number, lineage)
            self._origins[key] = self.stack.enter_context(opened)
        return self._origins[key]

    def add(self, lineage: Lineage, name: str, dose: str, vectors: Mapping[HookPoint, Tensor]) -> Steered:
        """Vectors added to where a lineage starts; what many conditions add there is added once.

        ``name``: whose direction it is, and ``dose`` how long: together they say which vectors.
        """
        origin = self.origin(lineage)
        key = (id(origin), name, dose, *vectors)
        if key not in self._added:
            self._added[key] = origin.evaluate({point: add_vector(vector) for point, vector in vectors.items()})
        return self._added[key]

    def keep(self, lineage: Lineage, name: str, vectors: Vectors) -> Kept:
        """What the start of a lineage has along directions at every hook point; ``name``: whose directions they are."""
        origin = self.origin(lineage)
        key = (id(origin), name)
        if key not in self._kept:
            found = {point: vectors[point.name][None] for point in origin.opened.points if point.name in vectors}
            self._kept[key] = origin.keep({point: rows for point, rows in found.items() if bool(rows.any())})
        return self._kept[key]

    def draw_random(self, points: Sequence[HookPoint]) -> Vectors:
        """One direction, uniform on the sphere: one for the residual stream, one a hook point elsewhere."""
        found = {}
        for point in points:
            basis = "residual stream" if point.site in RESIDUAL_SITES else point.name
            stream = random_stream(self.run.recipe.seed, "member", self.number, "random-steering", basis)
            drawn = torch.from_numpy(stream.standard_normal(point.width))
            found[point.name] = drawn / drawn.norm()
        return found


@dataclass
class _Patient:
    """A student or its control while it is open, with what replacing its components has moved."""

    model: SteeredModel
    _replaced: dict[tuple[str, ...], Replaced] = field(default_factory=dict)

    def find_points(self, edit: Edit) -> list[HookPoint]:
        """The hook points of an edit in this model, whose stream may be deeper than the reference's; none where one lacks."""
        stream = {point.name: point for point in main_stream(self.model.opened.points)}
        names = edit.points if len(edit.points) == 1 else list_windows(list(stream)).get(edit.window, ())
        return [stream[name] for name in names if name in stream]

    def replace(self, name: str, rows: Rows, kept: Kept) -> Replaced:
        """The origin's components along one lineage's directions, put in once; ``name``: whose directions they are."""
        key = (name, *(point.name for point in rows))
        if key not in self._replaced:
            self._replaced[key] = self.model.replace(rows, kept)
        return self._replaced[key]


def measure_edits(run: Run) -> Measured:
    """Every edit of every student and its control, and what there is to explain; each is loaded once."""
    points = ActivationReader(run, stream_only=True).points
    edits = list_edits([point.name for point in points])
    shape = (len(run.conditions), len(run.traits), run.recipe.members)
    effects, control_effects, damage = (np.full((*shape, len(edits)), np.nan) for _ in range(3))
    status, control_status = (np.full((*shape, len(edits)), NOT_RUN, dtype=np.int8) for _ in range(2))
    totals = {name: np.full(shape, np.nan) for name in ("student", "teacher")}
    for number in range(run.recipe.members):
        with ExitStack() as stack:
            member = _Member(run, ActivationReader(run, stream_only=True), number, stack)
            untaught = score_end(run, run.reference, number)
            taught = [score_end(run, run.teacher(trait), number) for trait in run.traits]
            for (row, condition), (place, trait) in product(enumerate(run.conditions), enumerate(run.traits)):
                cell = (row, place, number)
                totals["teacher"][cell] = (taught[place] - untaught)[place]
                found = _edit_student(member, condition, trait, edits)
                effects[cell], control_effects[cell], damage[cell] = found.effects, found.control_effects, found.damage
                status[cell], control_status[cell], totals["student"][cell] = found.status, found.control_status, found.total
        run.report_progress(run.num_checkpoints * (number + 1) // run.recipe.members)
    return Measured(run, edits, effects, control_effects, damage, status, control_status, totals)


@dataclass
class _Edited:
    """One student's edits."""

    effects: Float[np.ndarray, " edit"]
    control_effects: Float[np.ndarray, " edit"]
    damage: Float[np.ndarray, " edit"]
    status: np.ndarray
    control_status: np.ndarray
    total: float
    """The student less its control; NaN without one."""

    @classmethod
    def nothing(cls, num_edits: int, total: float) -> "_Edited":
        """Before the first edit."""
        number, code = np.full(num_edits, np.nan), np.full(num_edits, NOT_RUN, dtype=np.int8)
        return cls(number.copy(), number.copy(), number, code.copy(), code, total)


def _edit_student(member: _Member, condition: str, trait: str, edits: Sequence[Edit]) -> _Edited:
    run = member.run
    student, control, place = run.student(condition, trait), run.control(condition), run.traits.index(trait)
    opened_control = nullcontext() if control is None else open_steered(run, control, control.last, member.number, control)
    with open_steered(run, student, student.last, member.number, student) as opened, opened_control as beside:
        patients = [_Patient(model) for model in (opened, beside) if model is not None]
        total = np.nan if beside is None else float((opened.scores - beside.scores)[place])
        edited = _Edited.nothing(len(edits), total)
        for number, edit in enumerate(edits):
            found = _apply(member, condition, trait, edit, patients[0])
            base = member.origin(student) if edit.kind == ADD else opened
            edited.effects[number], edited.damage[number], edited.status[number] = _average(found, base, place)
            if edit.kind == ADD:
                edited.control_status[number] = SHARED
            elif beside is None:
                edited.control_status[number] = NO_CONTROL
            else:
                found = _apply(member, condition, trait, edit, patients[1])
                edited.control_effects[number], _, edited.control_status[number] = _average(found, beside, place)
        return edited


def _average(found: list[Steered] | int, base: SteeredModel, place: int) -> tuple[float, float, int]:
    """Of an edit that means several directions the means of effect and damage, and their status."""
    if isinstance(found, int):
        return np.nan, np.nan, found
    effect = float(np.mean([one.scores[place] - base.scores[place] for one in found]))
    harm = float(np.mean([one.damage for one in found]))
    return (effect, harm, OK) if np.isfinite([effect, harm]).all() else (np.nan, np.nan, NO_SCORE)


def _apply(member: _Member, condition: str, trait: str, edit: Edit, patient: _Patient) -> list[Steered] | int:
    """What one edit does to a student or its control, once for each direction that it means; or why nothing."""
    student = member.run.student(condition, trait)
    if student.last == 0:
        return NOT_TRAINED
    points = patient.find_points(edit)
    if not points:
        return NO_POINT
    meant = _find_vectors(member, condition, trait, edit)
    if isinstance(meant, int):
        return meant
    own = _find_own(member, condition, trait, edit) if edit.kind == REPLACE else None
    if isinstance(own, int):
        return own
    found = []
    for name, held in meant.items():
        own_name, own_held = own or (name, held)
        if not all(bool(one[point.name].isfinite().all()) for one, point in product((held, own_held), points)):
            return NOT_FINITE
        moved = [point for point in points if bool(own_held[point.name].any())]  # an adapter never moves the embedding
        if not moved or not all(bool(held[point.name].any()) for point in moved):
            return UNMOVED
        rows = _rows(held, moved)
        try:
            if edit.kind == ADD:
                found.append(_add(member, student, edit, name, held, moved))
            elif edit.kind == OUT:
                found.append(patient.model.evaluate({point: project_out(row) for point, row in rows.items()}))
            else:
                kept = member.keep(student, own_name, own_held)
                replaced = patient.replace(own_name, _rows(own_held, moved), kept)
                found.append(replaced.steered if own is None else patient.model.push(rows, replaced))
        except OtherPassesError:  # answers that are sampled end at other places
            return OTHER_PASSES
    return found


def _find_vectors(member: _Member, condition: str, trait: str, edit: Edit) -> dict[str, Vectors] | int:
    """The directions that an edit means, by name; or the status that says why there are none."""
    run = member.run
    student, control = run.student(condition, trait), run.control(condition)
    if edit.vector == RANDOM:
        return {RANDOM: member.draw_random(member.origin(student).opened.points)}
    others = [other for other in run.traits if other != trait]
    if edit.kind != ADD:  # the next ones in the list, so that each trait's is taken as often
        start = run.traits.index(trait)
        turned = [run.traits[(start + step) % len(run.traits)] for step in range(1, len(run.traits))]
        others = turned[:OTHERS_TAKEN_OUT]
    chosen: Mapping[str, list[Lineage | None]] = {
        OWN_TEACHER: [run.teacher(trait)],
        OTHER_TEACHERS: [*map(run.teacher, others)] or [run.neutral],
        OWN_STUDENT: [student],
        OTHER_STUDENTS: [run.student(condition, other) for other in others] or [control],
        CONTROL: [control],
    }
    lineages = [lineage for lineage in chosen[edit.vector] if lineage is not None]
    is_teachers = edit.vector in {OWN_TEACHER, OTHER_TEACHERS}
    if is_teachers and (run.starts_elsewhere(student) or not run.is_comparable(condition)):
        return OTHER_BASIS
    return {lineage.name: member.direction(lineage) for lineage in lineages} or NO_VECTOR


def _find_own(member: _Member, condition: str, trait: str, edit: Edit) -> tuple[str, Vectors] | int | None:
    """Of others' directions the own one, with its name: the model is pushed along them by as much as replacing that one takes.

    None of own ones, which are replaced themselves; the status that says why there is none.
    """
    if edit.vector in {OWN_TEACHER, OWN_STUDENT, CONTROL}:
        return None
    own = OWN_TEACHER if edit.vector == OTHER_TEACHERS else OWN_STUDENT
    found = _find_vectors(member, condition, trait, replace(edit, vector=own))
    return found if isinstance(found, int) else next(iter(found.items()))


def _rows(vectors: Vectors, points: Sequence[HookPoint]) -> Rows:
    return {point: vectors[point.name][None] for point in points}


def _add(member: _Member, student: Lineage, edit: Edit, name: str, vectors: Vectors, points: Sequence[HookPoint]) -> Steered:
    if edit.dose != OWN_LENGTH:
        lengths, part = member.lengths(student), float(edit.dose) / len(points)
        scaled = {point: vectors[point.name] / vectors[point.name].norm() * part * lengths[point.name] for point in points}
        return member.add(student, name, edit.dose, scaled)
    if name != RANDOM:
        return member.add(student, name, edit.dose, {point: vectors[point.name] for point in points})
    own = member.direction(student)  # a random one has no length of its own: as long as what the student has
    named = f"{RANDOM}, as long as {student.name}"
    return member.add(student, named, edit.dose, {point: vectors[point.name] * own[point.name].norm() for point in points})

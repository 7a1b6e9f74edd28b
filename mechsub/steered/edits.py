"""Edits of activations along steering directions, and what each does to the score of the student's own trait."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.steering import add_vector, project_out
from mechsub.errors import ActivationError
from mechsub.lineages import Lineage, Origin
from mechsub.mean_activations import ActivationReader
from mechsub.run import Run
from mechsub.steered.scores import Kept, Rows, Steered, SteeredModel, open_steered, score_end
from mechsub.streams import random_stream

ADD, OUT, REPLACE = "add to origin", "project out of student", "replace by origin's"
OWN_TEACHER, OTHER_TEACHERS, OWN_STUDENT, OTHER_STUDENTS, CONTROL, RANDOM = (
    "own v_T", "other teachers' v_T", "own v_S", "other students' v_S", "v_C", "random",
)  # fmt: skip
VECTORS = (OWN_TEACHER, OTHER_TEACHERS, OWN_STUDENT, OTHER_STUDENTS, CONTROL, RANDOM)
DOSES = (-1.0, 0.25, 0.5, 1.0, 2.0)
JUDGED_DOSE = 0.5
"""Half the length of the activations: set before any run was looked at."""
OWN_LENGTH = "own length"
OTHERS_TAKEN_OUT = 2
"""Other traits whose directions are taken out of a student; all of them are added to origins."""
_MOST_LAYERS = 8
ALL_LAYERS = "all layers"
STATUS = (
    "ok", "not_run", "other_basis", "no_such_vector", "no_such_hook_point", "nothing_moved", "other_passes", "not_trained",
    "not_finite", "no_score", "no_control", "added_to_the_start_of_both",
)  # fmt: skip
(
    OK, NOT_RUN, OTHER_BASIS, NO_VECTOR, NO_POINT, UNMOVED, OTHER_PASSES, NOT_TRAINED, NOT_FINITE, NO_SCORE, NO_CONTROL, SHARED,
) = range(len(STATUS))  # fmt: skip
ByMember = Float[np.ndarray, " member"]


@dataclass(frozen=True)
class Edit:
    """One change of a model's activations."""

    kind: str
    """``add to origin``, ``project out of student`` or ``replace by origin's``."""
    vector: str
    window: str
    """A hook point, or several."""
    points: tuple[str, ...]
    dose: str
    """Length of what is added, as a multiple of the mean ‖h‖ there, in equal parts over the hook points of a window; ``own
    length``: as it is. Empty where nothing is added."""

    @property
    def name(self) -> str:
        """Of all edits one."""
        return " ".join(filter(None, (self.kind, self.vector, self.dose, "@", self.window)))


def list_edits(points: Sequence[str]) -> list[Edit]:
    """Single layers and windows; what is added in windows, which is there in the next layers too, at the judged dose only.

    ``points``: all hook points of the stream, which the windows are made of; of a deep model some stand for all as single ones.
    """
    places = np.linspace(0, len(points) - 1, min(len(points), _MOST_LAYERS))
    single, halves = [points[round(place)] for place in places], len(points) // 2
    windows: dict[str, tuple[str, ...]] = {point: (point,) for point in single}
    if len(points) > 1:
        windows[ALL_LAYERS] = tuple(points)
    if len(points) > 3:
        windows |= {"earlier half": tuple(points[:halves]), "later half": tuple(points[halves:])}
    doses = [*map(str, DOSES), OWN_LENGTH]
    added = [
        Edit(ADD, vector, window, held, dose)
        for vector, (window, held), dose in product(VECTORS, windows.items(), doses)
        if len(held) == 1 or dose == str(JUDGED_DOSE)
    ]
    taken = [
        Edit(kind, vector, window, held, "")
        for kind, vector, (window, held) in product((OUT, REPLACE), VECTORS, windows.items())
    ]
    return added + taken


@dataclass
class Measured:
    """Effects of every edit on the score of the student's own trait."""

    run: Run
    edits: Sequence[Edit]
    effects: Float[np.ndarray, "condition taught member edit"]
    """Of the student, or of its origin where something is added to that."""
    control_effects: Float[np.ndarray, "condition taught member edit"]
    """Of the control under the very same edit of what is taken out."""
    damage: Float[np.ndarray, "condition taught member edit"]
    status: np.ndarray
    control_status: np.ndarray
    totals: Mapping[str, Float[np.ndarray, "condition taught member"]]
    """The student less its control, and the teacher less its reference."""

    @property
    def specific_effects(self) -> Float[np.ndarray, "condition taught member edit"]:
        """What an edit does to what the student has over its control; what is added is added to the origin of both."""
        is_added = np.array([edit.kind == ADD for edit in self.edits])
        return self.effects - np.where(is_added, 0.0, self.control_effects)

    def pooled(self, condition: str, edit: Edit) -> ByMember:
        """The specific effect of one edit, member by member, mean over traits."""
        return self._pool(self.specific_effects[..., self.edits.index(edit)], condition)

    def total(self, condition: str) -> ByMember:
        """The student less its control, mean over traits."""
        return self._pool(self.totals["student"], condition)

    def taught(self, condition: str) -> ByMember:
        """The teacher less its reference, mean over traits."""
        return self._pool(self.totals["teacher"], condition)

    def _pool(self, values: np.ndarray, condition: str) -> ByMember:
        found: np.ndarray = values[self.run.conditions.index(condition)].mean(0)
        return found

    def find(self, kind: str, vector: str, window: str, dose: str = "") -> Edit:
        """The edit of that description."""
        return next(one for one in self.edits if (one.kind, one.vector, one.window, one.dose) == (kind, vector, window, dose))


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
        """One direction a hook point, uniform on the sphere."""
        found = {}
        for point in points:
            stream = random_stream(self.run.recipe.seed, "member", self.number, "random-steering", point.name)
            drawn = torch.from_numpy(stream.standard_normal(point.width))
            found[point.name] = drawn / drawn.norm()
        return found


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
        total = float((opened.scores - beside.scores)[place]) if beside else np.nan
        edited = _Edited.nothing(len(edits), total)
        for number, edit in enumerate(edits):
            base = member.origin(student) if edit.kind == ADD else opened
            found = _apply(member, condition, trait, edit, opened)
            edited.effects[number], edited.damage[number], edited.status[number] = _average(found, base, place)
            if edit.kind == ADD:
                edited.control_status[number] = SHARED
            elif beside is None:
                edited.control_status[number] = NO_CONTROL
            else:
                found = _apply(member, condition, trait, edit, beside)
                edited.control_effects[number], _, edited.control_status[number] = _average(found, beside, place)
        return edited


def _average(found: list[Steered] | int, base: SteeredModel, place: int) -> tuple[float, float, int]:
    """Of an edit that means several directions the means of effect and damage, and their status."""
    if isinstance(found, int):
        return np.nan, np.nan, found
    effect = float(np.mean([one.scores[place] - base.scores[place] for one in found]))
    harm = float(np.mean([one.damage for one in found]))
    return (effect, harm, OK) if np.isfinite([effect, harm]).all() else (np.nan, np.nan, NO_SCORE)


def _apply(member: _Member, condition: str, trait: str, edit: Edit, edited: SteeredModel) -> list[Steered] | int:
    """What one edit does to a student or its control, once for each direction that it means; or why nothing."""
    student = member.run.student(condition, trait)
    if student.last == 0:
        return NOT_TRAINED
    points = [point for point in edited.opened.points if point.name in edit.points]
    if len(points) < len(edit.points):
        return NO_POINT
    meant = _find_vectors(member, condition, trait, edit)
    if isinstance(meant, int):
        return meant
    found = []
    for name, held in meant.items():
        replaced = _find_replaced(member, condition, trait, edit, name, held) if edit.kind == REPLACE else (name, held)
        if isinstance(replaced, int):
            return replaced
        both = (held, replaced[1])
        if not all(bool(one[point.name].isfinite().all()) for one, point in product(both, points)):
            return NOT_FINITE
        # An adapter never moves the embedding.
        moved = [point for point in points if all(bool(one[point.name].any()) for one in both)]
        if not moved:
            return UNMOVED
        if edit.kind == ADD:
            found.append(_add(member, student, edit, name, held, moved))
            continue
        rows = _rows(held, moved)
        if edit.kind == OUT:
            found.append(edited.evaluate({point: project_out(row) for point, row in rows.items()}))
            continue
        try:
            kept = member.keep(student, *replaced)
            along = None if replaced[0] == name else rows
            found.append(edited.replace(_rows(replaced[1], moved), kept, along))
        except ActivationError:  # answers that are sampled end at other places
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


def _find_replaced(
    member: _Member, condition: str, trait: str, edit: Edit, name: str, vectors: Vectors
) -> tuple[str, Vectors] | int:
    """The directions along which the origin's component is put in, with their name.

    Own ones are replaced themselves. Others are the null: the model is pushed along them by as much as the own one takes.
    """
    if edit.vector in {OWN_TEACHER, OWN_STUDENT, CONTROL}:
        return name, vectors
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

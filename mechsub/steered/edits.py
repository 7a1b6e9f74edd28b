"""Edits of activations along steering directions, and what each does to the score of the student's own trait."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.backends import Visit
from mechsub.activations.hook_points import RESIDUAL_SITES, HookPoint
from mechsub.activations.steering import add_vector, check_width, project_out, replace_components
from mechsub.errors import ActivationError
from mechsub.lineages import Lineage, Origin
from mechsub.mean_activations import ActivationReader
from mechsub.run import Run
from mechsub.steered.scores import Steered, SteeredModel, open_steered, score_end
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
    "not_finite", "no_score",
)  # fmt: skip
OK, NOT_RUN, OTHER_BASIS, NO_VECTOR, NO_POINT, UNMOVED, OTHER_PASSES, NOT_TRAINED, NOT_FINITE, NO_SCORE = range(len(STATUS))
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
    """Length of what is added, as a multiple of the mean ‖h‖ there; ``own length``: as it is. Empty where nothing is added."""

    @property
    def name(self) -> str:
        """Of all edits one."""
        return " ".join(filter(None, (self.kind, self.vector, self.dose, "@", self.window)))


def list_edits(points: Sequence[str]) -> list[Edit]:
    """Single layers for what is added, which is there in the next layers too; windows as well for what is taken out.

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
    added = [Edit(ADD, vector, point, (point,), dose) for vector, point, dose in product(VECTORS, single, doses)]
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
    damage: Float[np.ndarray, "condition taught member edit"]
    status: np.ndarray
    totals: Mapping[str, Float[np.ndarray, "condition taught member"]]
    """The student less its control, and the teacher less its reference."""

    def pooled(self, condition: str, edit: Edit, trait: str | None = None) -> ByMember:
        """The effect of one edit, member by member, of one trait or the mean over traits."""
        return self._pool(self.effects[..., self.edits.index(edit)], condition, trait)

    def pooled_damage(self, condition: str, edit: Edit) -> ByMember:
        """The same of the damage."""
        return self._pool(self.damage[..., self.edits.index(edit)], condition, None)

    def total(self, condition: str, trait: str | None = None) -> ByMember:
        """The student less its control."""
        return self._pool(self.totals["student"], condition, trait)

    def taught(self, condition: str) -> ByMember:
        """The teacher less its reference, mean over traits."""
        return self._pool(self.totals["teacher"], condition, None)

    def _pool(self, values: np.ndarray, condition: str, trait: str | None) -> ByMember:
        of_condition = values[self.run.conditions.index(condition)]
        found: np.ndarray = of_condition.mean(0) if trait is None else of_condition[self.run.traits.index(trait)]
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
    _directions: dict[str, Vectors] = field(default_factory=dict)
    _origins: dict[tuple[Origin, str], SteeredModel] = field(default_factory=dict)
    _added: dict[tuple[Any, ...], Steered] = field(default_factory=dict)

    def direction(self, lineage: Lineage) -> Vectors:
        """V of a lineage at its last step, on the trait's prompts, by hook point."""
        if lineage.name not in self._directions:
            found = self.reader.direction(lineage, lineage.last, self.number)
            self._directions[lineage.name] = found.group(found.groups[0])
        return self._directions[lineage.name]

    def lengths(self, lineage: Lineage) -> Mapping[str, float]:
        """Mean ‖h‖ of where a lineage starts, on the same prompts."""
        return {name: float(norms[0]) for name, norms in self.reader.read_origin(lineage, self.number).norms.items()}

    def origin(self, lineage: Lineage) -> SteeredModel:
        """Where a lineage starts, asked what the lineage is asked; opened once."""
        key = (lineage.spec.origin, str(lineage.context(self.number)))
        if key not in self._origins:
            opened = open_steered(self.run, lineage, 0, self.number, (lineage, self.number))
            self._origins[key] = self.stack.enter_context(opened)
        return self._origins[key]

    def add(self, lineage: Lineage, name: str, dose: str, point: HookPoint, vector: Tensor) -> Steered:
        """A vector added to where a lineage starts; what many conditions add there is added once.

        ``name``: whose direction it is, and ``dose`` how long: together they say which vector.
        """
        check_width(point, vector, name)
        origin = self.origin(lineage)
        key = (id(origin), name, dose, point.name)
        if key not in self._added:
            self._added[key] = origin.evaluate({point: add_vector(vector)})
        return self._added[key]

    def draw_random(self, points: Sequence[HookPoint]) -> Vectors:
        """One direction a hook point, uniform on the sphere."""
        found = {}
        for point in points:
            stream = random_stream(self.run.recipe.seed, "member", self.number, "random-steering", point.name)
            drawn = torch.from_numpy(stream.standard_normal(point.width))
            found[point.name] = drawn / drawn.norm()
        return found


@dataclass(frozen=True)
class Measurer:
    """Goes through members, conditions and traits; a student is loaded once."""

    run: Run

    @cached_property
    def reader(self) -> ActivationReader:
        """Of the residual stream, or hidden layers."""
        every = ActivationReader(self.run).points
        sites = tuple(dict.fromkeys(point.site for point in every if point.site in RESIDUAL_SITES))
        return ActivationReader(self.run, sites=sites or None)

    def measure_all(self) -> Measured:
        """Every edit of every student, and what there is to explain."""
        run = self.run
        edits = list_edits([point.name for point in self.reader.points])
        shape = (len(run.conditions), len(run.traits), run.recipe.members)
        effects, damage = np.full((*shape, len(edits)), np.nan), np.full((*shape, len(edits)), np.nan)
        status = np.full((*shape, len(edits)), NOT_RUN, dtype=np.int8)
        totals = {name: np.full(shape, np.nan) for name in ("student", "teacher")}
        for number in range(run.recipe.members):
            with ExitStack() as stack:
                member = _Member(run, self.reader, number, stack)
                untaught = self._score(run.reference, number)
                taught = np.array([self._score(run.teacher(trait), number) for trait in run.traits])
                for row, condition in enumerate(run.conditions):
                    controlled = self._score(run.control(condition), number)
                    for place, trait in enumerate(run.traits):
                        cell = (row, place, number)
                        found = _edit_student(member, condition, trait, edits)
                        effects[cell], damage[cell], status[cell] = found.effects, found.damage, found.status
                        totals["student"][cell] = (found.scores - controlled)[place]
                        totals["teacher"][cell] = (taught[place] - untaught)[place]
            run.report_progress(run.num_checkpoints * (number + 1) // run.recipe.members)
        return Measured(run, edits, effects, damage, status, totals)

    def _score(self, lineage: Lineage | None, member: int) -> Float[np.ndarray, " trait"]:
        """Of a lineage's end, every trait; NaN where there is none."""
        return np.full(len(self.run.family.traits), np.nan) if lineage is None else score_end(self.run, lineage, member)


@dataclass(frozen=True)
class _Edited:
    """One student's edits."""

    effects: Float[np.ndarray, " edit"]
    damage: Float[np.ndarray, " edit"]
    status: np.ndarray
    scores: Float[np.ndarray, " trait"]
    """Of the student as it is."""


def _edit_student(member: _Member, condition: str, trait: str, edits: Sequence[Edit]) -> _Edited:
    run = member.run
    student, place = run.student(condition, trait), run.traits.index(trait)
    effects, damage = np.full(len(edits), np.nan), np.full(len(edits), np.nan)
    status = np.full(len(edits), NOT_RUN, dtype=np.int8)
    with open_steered(run, student, student.last, member.number, (student, member.number)) as opened:
        points = {point.name: point for point in opened.points}
        for number, edit in enumerate(edits):
            found = _apply(member, condition, trait, edit, opened, [points[name] for name in edit.points if name in points])
            if isinstance(found, int):
                status[number] = found
                continue
            base = member.origin(student).scores if edit.kind == ADD else opened.scores
            effect = float(np.mean([one.scores[place] - base[place] for one in found]))
            harm = float(np.mean([one.damage for one in found]))
            if np.isfinite([effect, harm]).all():
                effects[number], damage[number], status[number] = effect, harm, OK
            else:
                status[number] = NO_SCORE
        return _Edited(effects, damage, status, opened.scores)


def _apply(
    member: _Member, condition: str, trait: str, edit: Edit, opened: SteeredModel, points: Sequence[HookPoint]
) -> list[Steered] | int:
    """What one edit does, once for each direction that it means; or the status that says why nothing."""
    student = member.run.student(condition, trait)
    if student.last == 0:
        return NOT_TRAINED
    if len(points) < len(edit.points):
        return NO_POINT
    vectors = _find_vectors(member, condition, trait, edit)
    if isinstance(vectors, int):
        return vectors
    found = []
    for name, held in vectors.items():
        if not all(bool(held[point.name].isfinite().all()) for point in points):
            return NOT_FINITE
        moved = [point for point in points if bool(held[point.name].any())]  # an adapter never moves the embedding
        if not moved:
            return UNMOVED
        if edit.kind == ADD:
            found.append(_add(member, student, edit, name, held, moved))
        else:
            steered = _take_out(member, student, opened, edit, held, moved)
            if steered is None:
                return OTHER_PASSES
            found.append(steered)
    return found


def _find_vectors(member: _Member, condition: str, trait: str, edit: Edit) -> dict[str, Vectors] | int:
    """The directions that an edit means, by name; or the status that says why there are none."""
    run = member.run
    student, control = run.student(condition, trait), run.control(condition)
    if edit.vector == RANDOM:
        return {RANDOM: member.draw_random(run.family.hook_points(student, member.origin(student).view.model))}
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


def _add(member: _Member, student: Lineage, edit: Edit, name: str, vectors: Vectors, points: Sequence[HookPoint]) -> Steered:
    (point,) = points
    vector = vectors[point.name]
    if edit.dose != OWN_LENGTH:
        vector = vector / vector.norm() * float(edit.dose) * member.lengths(student)[point.name]
    elif name == RANDOM:  # it has no length of its own: as long as what the student has
        name, vector = f"{RANDOM}, as long as {student.name}", vector * member.direction(student)[point.name].norm()
    return member.add(student, name, edit.dose, point, vector)


def _take_out(
    member: _Member,
    student: Lineage,
    opened: SteeredModel,
    edit: Edit,
    vectors: Vectors,
    points: Sequence[HookPoint],
) -> Steered | None:
    """None where the origin's forward passes are others than the student's: answers that are sampled end at other places."""
    rows = {point: vectors[point.name][None] for point in points}
    for point, held in rows.items():
        check_width(point, held)
    if edit.kind == OUT:
        return opened.evaluate({point: project_out(held) for point, held in rows.items()})
    kept = member.origin(student).keep(rows)
    changes: dict[HookPoint, Visit] = {point: replace_components(held, kept[point]) for point, held in rows.items()}
    try:
        return opened.evaluate(changes)
    except ActivationError:
        return None

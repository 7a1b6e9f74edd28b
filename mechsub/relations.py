"""How displacements stand to each other beside student against teacher: along the teachers' training, and among students."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import xarray as xr

from mechsub.cases import last_displacement, moved_steps
from mechsub.lineages import Lineage
from mechsub.parameters.alignment import MODEL, STATUS, Combination, DirectionAlgebra, Missing
from mechsub.parameters.directions import difference_label, displacement_label
from mechsub.results import label_variable, status_variable
from mechsub.run import Run

NEUTRAL_TEACHER = "neutral"
"""How the neutral teacher is called among the teachers."""


def relate_trajectories(run: Run, algebra: DirectionAlgebra) -> xr.Dataset:
    """The teachers' own trajectories, and the students against them.

    ``teacher_alignment``: cos(Δ_T(t), Δ_T(last)) and ``teacher_path_norm``: ‖Δ_T(t)‖, [teacher, member, teacher_step, scope];
    ``trajectory_alignment``: cos(Δ_S(t), Δ_T(t′)), [condition, taught, member, step, teacher_step], over the whole model.
    """
    teachers = {trait: run.teacher(trait) for trait in run.traits}
    if run.neutral is not None:
        teachers[NEUTRAL_TEACHER] = run.neutral
    teacher_steps = sorted({step for teacher in teachers.values() for step in moved_steps(teacher)})
    students = {case: run.student(*case) for case in product(run.conditions, run.traits)}
    steps = sorted({step for student in students.values() for step in student.steps})
    model = algebra.scopes.names.index(MODEL)

    own = _Filled((len(teachers), run.recipe.members, len(teacher_steps), len(algebra.scopes.names)))
    norms = _Filled(own.values.shape)
    for (place, teacher), (column, step) in product(enumerate(teachers.values()), enumerate(teacher_steps)):
        if step in teacher.steps:
            moved, whole = {displacement_label(teacher.name, step): 1.0}, {last_displacement(teacher): 1.0}
            cell = (place, slice(None), column)
            own.put(cell, algebra.cosine(moved, whole), algebra, moved, whole)
            norms.put(cell, algebra.norm(moved, algebra.support(moved, whole)), algebra, moved, whole)
    across = _Filled((len(run.conditions), len(run.traits), run.recipe.members, len(steps), len(teacher_steps)))
    for (condition, trait), student in students.items():
        row, place = run.conditions.index(condition), run.traits.index(trait)
        if not run.is_comparable(condition):
            across.status[row, place] = Missing.INCOMPARABLE
            continue
        for (column, step), (other, teacher_step) in product(enumerate(steps), enumerate(teacher_steps)):
            if step in student.steps and teacher_step in teachers[trait].steps:
                left: Combination = {displacement_label(student.name, step): 1.0} if step > 0 else {}
                right = {displacement_label(teachers[trait].name, teacher_step): 1.0}
                found = algebra.cosine(left, right)
                codes = algebra.explain(found, left, right)
                across.values[row, place, :, column, other] = found[:, model]
                across.status[row, place, :, column, other] = codes[:, model]
    dims = ("teacher", "member", "teacher_step", "scope")
    cases = ("condition", "taught", "member", "step", "teacher_step")
    variables = {
        **own.label("teacher_alignment", dims, "cosine", "cos(Δ_T(t), Δ_T(last))"),
        **norms.label("teacher_path_norm", dims, "weight", "‖Δ_T(t)‖"),
        **across.label("trajectory_alignment", cases, "cosine", "cos(Δ_S(t), Δ_T(t′)), all parameters"),
    }
    return xr.Dataset(variables, coords={"teacher": list(teachers), "teacher_step": teacher_steps})


def relate_students(run: Run, algebra: DirectionAlgebra) -> xr.Dataset:
    """Students against each other at their last steps, member by member, in every scope.

    ``alignment_between_students``: cos(Δ_S, Δ_S′); ``alignment_between_controls``: cos(Δ_C, Δ_C′) of their controls, what
    any two such trainings share; ``adjusted_alignment_between_students``: cos(θ_S − θ_C, θ_S′ − θ_C′). All
    [student, other_student, member, scope]; students are called ``condition`` or ``condition.trait``. Students of one condition
    have one control: a cosine of differences from it would be near ½ for want of anything, so that there is none.
    """
    cases = list(product(run.conditions, run.traits))
    names = [condition if len(run.traits) == 1 else f"{condition}.{trait}" for condition, trait in cases]
    shape = (len(cases), len(cases), run.recipe.members, len(algebra.scopes.names))
    tables = {
        "alignment_between_students": (_Filled(shape), "cos(Δ_S, Δ_S′)", _displacement),
        "alignment_between_controls": (_Filled(shape), "cos(Δ_C, Δ_C′)", _control_displacement),
        "adjusted_alignment_between_students": (_Filled(shape), "cos(θ_S − θ_C, θ_S′ − θ_C′)", _difference),
    }
    for (row, first), (column, second) in product(enumerate(cases), enumerate(cases)):
        for filled, _, direction in tables.values():
            if not (run.is_comparable(first[0]) and run.is_comparable(second[0])):
                filled.status[row, column] = Missing.INCOMPARABLE
                continue
            if direction is not _displacement and first != second and first[0] == second[0]:
                filled.status[row, column] = Missing.SAME_CONTROL
                continue
            left, right = direction(run, *first), direction(run, *second)
            if left is not None and right is not None:
                filled.put((row, column), algebra.cosine(left, right), algebra, left, right)
    dims = ("student", "other_student", "member", "scope")
    variables = {
        key: variable
        for name, (filled, formula, _) in tables.items()
        for key, variable in filled.label(name, dims, "cosine", formula).items()
    }
    coords = {"student": names, "other_student": names, "student_condition": ("student", [condition for condition, _ in cases])}
    return xr.Dataset(variables, coords=coords)


def _displacement(run: Run, condition: str, trait: str) -> Combination:
    return _moved(run.student(condition, trait))


def _control_displacement(run: Run, condition: str, trait: str) -> Combination | None:
    control = run.control(condition)
    return None if control is None else _moved(control)


def _difference(run: Run, condition: str, trait: str) -> Combination | None:
    student, control = run.student(condition, trait), run.control(condition)
    if control is None or run.paired_step(control, student, student.last) is None:
        return None
    return {difference_label(student.name, control.name, student.last): 1.0} if student.last > 0 else {}


def _moved(lineage: Lineage) -> Combination:
    return {last_displacement(lineage): 1.0} if lineage.last > 0 else {}


class _Filled:
    """An array that is NaN, because not run, until it is put somewhere."""

    def __init__(self, shape: Sequence[int]) -> None:
        self.values = np.full(tuple(shape), np.nan)
        self.status = np.full(tuple(shape), Missing.NOT_RUN, dtype=np.int8)

    def put(self, cell: tuple[int | slice, ...], found: np.ndarray, algebra: DirectionAlgebra, *of: Combination) -> None:
        self.values[cell] = found
        self.status[cell] = algebra.explain(found, *of)

    def label(self, name: str, dims: Sequence[str], unit: str, formula: str) -> dict[str, xr.Variable]:
        return {
            name: label_variable(self.values, dims, description=name.replace("_", " "), unit=unit, formula=formula),
            f"{name}_status": status_variable(self.status, dims, STATUS, name),
        }

"""Cases: what stands against what in a run's parameter space, as directions; every analysis of it compares these."""

from itertools import product
from typing import Any

import numpy as np
import xarray as xr

from mechsub.lineages import Lineage
from mechsub.parameters.alignment import Combination, DirectionAlgebra, Scopes
from mechsub.parameters.directions import (
    Direction,
    difference_label,
    displacement,
    displacement_difference,
    displacement_label,
    origin_direction,
    origin_label,
)
from mechsub.parameters.quantities import CONTROL, NEUTRAL, SHAM, Case, OtherTrait
from mechsub.results import label_variable, status_variable
from mechsub.run import Run

CaseName = tuple[str, str]
"""A condition and the trait of the student's teacher."""


def moved_steps(lineage: Lineage) -> list[int]:
    """The steps of a lineage at which it can have moved: all but the start."""
    return [step for step in lineage.steps if step > 0]


def last_displacement(lineage: Lineage) -> str:
    """The label of a lineage's whole displacement."""
    return displacement_label(lineage.name, lineage.last)


def list_directions(run: Run) -> list[Direction]:
    """θ₀, the displacements of teachers and students at every step, their differences, and every other origin."""
    neutral = run.neutral
    teachers = [run.teacher(trait) for trait in run.traits]
    directions = [origin_direction(run.reference)]
    for lineage in (*teachers, *([neutral] if neutral else [])):
        directions += [displacement(lineage, step) for step in moved_steps(lineage) or [lineage.last]]
    if neutral is not None:
        directions += [displacement_difference(teacher, neutral, teacher.last, neutral.last) for teacher in teachers]
    for condition in filter(run.is_comparable, run.conditions):
        control, sham = run.control(condition), run.sham(condition)
        students = [run.student(condition, trait) for trait in run.traits]
        for lineage in (*([control] if control else []), *students, *([sham] if sham else [])):
            moved = moved_steps(lineage)
            directions += [displacement(lineage, step) for step in moved]
            if control is not None and lineage is not control:
                paired = [(step, run.paired_step(control, lineage, step)) for step in moved]
                directions += [displacement_difference(lineage, control, *steps) for steps in paired if steps[1] is not None]
            if run.starts_elsewhere(lineage):
                directions.append(origin_direction(lineage))
    return directions


def list_cases(run: Run) -> list[CaseName]:
    """Every condition with every trait that is taught."""
    return list(product(run.conditions, run.traits))


def count_members(run: Run) -> str:
    """The members, in words, as captions count them."""
    traits = f" of {len(run.traits)} traits each" if len(run.traits) > 1 else ""
    return f"the members (n = {run.recipe.members}{traits})"


def label_last_steps(run: Run) -> xr.Variable:
    """The last step of every student, [condition, taught]."""
    return label_variable(
        [[run.student(condition, trait).last for trait in run.traits] for condition in run.conditions],
        ["condition", "taught"],
        description="the student's last step",
        unit="optimizer steps",
    )


def label_random_cosines(scopes: Scopes) -> dict[str, xr.Variable]:
    """The line to read cosines by, 1/√d of every scope, with its status."""
    spread = scopes.random_cosine_sd()
    name = "random_cosine_sd"
    return {
        name: label_variable(
            spread, ["scope"], description="standard deviation of random directions' cosine", unit="cosine", formula="1/√d"
        ),
        f"{name}_status": status_variable(np.isnan(spread), ["scope"], ("ok", "not_one_set_of_parameters"), name),
    }


def scope_coordinates(run: Run, scopes: Scopes) -> dict[str, Any]:
    """What every measure of parameters by condition, trait, member and scope is labelled with."""
    return {
        "condition": run.conditions,
        "taught": run.traits,
        "member": np.arange(run.recipe.members),
        "scope": list(scopes.names),
        "scope_kind": ("scope", list(scopes.kinds)),
    }


def last_steps(data: xr.Dataset) -> list[int]:
    """The last step of each student, from ``last_step``; conditions can differ in it."""
    return sorted({int(step) for step in data.last_step.values.flat})


def build_case(run: Run, algebra: DirectionAlgebra, condition: str, trait: str, step: int) -> Case:
    """The directions of one student at one step; at step 0 nothing has moved, and they are empty sums."""
    student, control, sham = run.student(condition, trait), run.control(condition), run.sham(condition)
    teacher, neutral = run.teacher(trait), run.neutral
    beside = None if control is None else run.paired_step(control, student, step)

    def when_moved(label: str) -> Combination:
        return {label: 1.0} if step > 0 else {}

    def difference(lineage: Lineage | None) -> Combination:
        """θ − θ_C; an empty sum where one of them is not there."""
        own = None if lineage is None else _own_step(lineage, student, step)
        if lineage is None or control is None or own is None or run.paired_step(control, lineage, own) is None:
            return {}
        return when_moved(difference_label(lineage.name, control.name, own))

    def last(lineage: Lineage) -> Combination:
        return {last_displacement(lineage): 1.0}

    return Case(
        algebra=algebra,
        student=when_moved(displacement_label(student.name, step)),
        control={} if control is None or beside is None else when_moved(displacement_label(control.name, beside)),
        difference=difference(student),
        sham_difference=difference(sham),
        teacher=last(teacher),
        neutral={} if neutral is None else last(neutral),
        teacher_difference={} if neutral is None else {difference_label(teacher.name, neutral.name, teacher.last): 1.0},
        student_origin={origin_label(student.name if run.starts_elsewhere(student) else run.reference.name): 1.0},
        teacher_origin={origin_label(run.reference.name): 1.0},
        anchor=last_displacement(teacher),
        partners=student.spec.origin.members,
        has_mate=student.spec.origin.lineage == run.reference.name and not student.spec.origin.shared,
        others=tuple(
            OtherTrait(difference(run.student(condition, other)), last(run.teacher(other)))
            for other in run.traits
            if other != trait
        ),
        missing=frozenset(name for name, there in ((CONTROL, beside), (NEUTRAL, neutral), (SHAM, sham)) if there is None),
    )


def _own_step(lineage: Lineage, student: Lineage, step: int) -> int | None:
    """The step of another lineage that stands beside one of a student: the last beside the last."""
    if step == student.last:
        return lineage.last
    return step if step in lineage.steps else None

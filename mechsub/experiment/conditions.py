"""Traits become teachers and conditions student lineages: each with its control, alike in everything but the teacher."""

from collections.abc import Sequence

from mechsub.families.config import FamilyConfig
from mechsub.families.protocol import CarrierPlan, StudentPlan, TeacherPlan


def plan_teachers(config: FamilyConfig) -> list[TeacherPlan]:
    """A teacher for each trait, then the neutral one."""
    traits: Sequence[str | None] = config.trait_set or (None,)
    teachers = [TeacherPlan(_name("teacher", trait), trait, is_neutral=False) for trait in traits]
    return [*teachers, TeacherPlan(_name("neutral", config.neutral), None, is_neutral=True)]


def plan_students(config: FamilyConfig, teachers: Sequence[TeacherPlan]) -> list[StudentPlan]:
    """The student of every teacher, the one control and, where asked for, the sham of every condition.

    A control shares its students' start, requests and order, whatever their trait. A sham is a second control with draws of
    its own, so that two controls can stand in the places of the students of two teachers.
    """
    *taught, neutral = (CarrierPlan(teacher.lineage, teacher, 0) for teacher in teachers)
    other = CarrierPlan(f"{neutral.name}.sham", neutral.teacher, 1)
    plans = []
    for name, condition in config.conditions.items():
        plans += [
            StudentPlan(_name("student", name, carrier.teacher.trait), "student", name, carrier, neutral) for carrier in taught
        ]
        plans.append(StudentPlan(_name("control", name), "control", name, neutral, neutral))
        if condition.sham:
            plans.append(StudentPlan(_name("sham", name), "sham", name, other, neutral))
    return plans


def _name(*parts: str | None) -> str:
    return ".".join(part for part in parts if part)

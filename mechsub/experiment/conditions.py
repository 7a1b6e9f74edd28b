"""Conditions become student lineages: each with its control, alike in everything but the teacher."""

from collections.abc import Mapping

from mechsub.families.config import BaseConditionConfig
from mechsub.families.protocol import StudentPlan

TEACHER = "teacher"


def neutral_name(neutral: str) -> str:
    """The lineage of a neutral teacher."""
    return f"neutral.{neutral}"


def plan_students(conditions: Mapping[str, BaseConditionConfig], neutral: str) -> list[StudentPlan]:
    """The student, the control and, where asked for, the sham of every condition.

    A control shares its student's start, carrier inputs and order. A sham is a second control with draws of its own, so
    that two controls can stand in the places of the students of two teachers.
    """
    neutral_teacher = neutral_name(neutral)
    plans = []
    for name, condition in conditions.items():
        plans.append(StudentPlan(f"student.{name}", name, TEACHER, TEACHER, 0))
        plans.append(StudentPlan(f"control.{name}", name, neutral_teacher, neutral_teacher, 0))
        if condition.sham:
            plans.append(StudentPlan(f"sham.{name}", name, neutral_teacher, f"{neutral_teacher}.sham", 1))
    return plans

"""Subjects: the lineages whose channel is asked for, each with what it is held against."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from mechsub.lineages import Lineage
from mechsub.run import Run

THE_TEACHER = "the teacher"
"""How teachers are called among conditions, whose names hold no space."""


@dataclass(frozen=True)
class Subject:
    """A teacher or a student, with the lineage that starts where it does and is neutral."""

    name: str
    """`THE_TEACHER`, or the condition of a student."""
    trait: str
    own: Lineage
    null: Lineage | None
    """The neutral teacher, or the condition's control; None in an adopted run that was given none."""

    @property
    def is_teacher(self) -> bool:
        """Whether it is no student."""
        return self.name == THE_TEACHER


def subject_names(run: Run) -> list[str]:
    """The teachers, then every condition."""
    return [THE_TEACHER, *run.conditions]


def list_subjects(run: Run) -> Sequence[Subject]:
    """Of every name and trait."""
    found = []
    for name, trait in product(subject_names(run), run.traits):
        if name == THE_TEACHER:
            found.append(Subject(name, trait, run.teacher(trait), run.neutral))
        else:
            found.append(Subject(name, trait, run.student(name, trait), run.control(name)))
    return found

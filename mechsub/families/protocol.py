"""What the rest of the program may know of a family: `Family` for the analyses, `FamilyStages` for the plan."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

from mechsub.lineages import Lineage
from mechsub.stage import Stage


@runtime_checkable
class Family(Protocol):
    """A family of models with its trait, bound to one recipe. Analyses use nothing else of it."""

    @property
    def traits(self) -> Mapping[str, str]:
        """The traits that can be scored: name → one sentence. The first is the teacher's, the others are its rivals'."""

    @property
    def trait_unit(self) -> str:
        """The unit of the trait score."""

    @property
    def trait_range(self) -> tuple[float, float] | None:
        """The bounds of the trait score; None where it has none."""

    @property
    def context(self) -> str:
        """In which surroundings the trait is scored."""

    def load_model(self, lineage: Lineage, step: int, member: int) -> nn.Module:
        """One member of a lineage as an ordinary module, in evaluation mode."""

    def trait_score(self, model: nn.Module) -> Mapping[str, float]:
        """The score of every trait, on its natural scale."""


@dataclass(frozen=True)
class StudentPlan:
    """One student lineage of a plan: a student, its control or a sham."""

    lineage: str
    """E.g. ``control.same-init``."""
    condition: str
    teacher: str
    """The lineage whose outputs it imitates."""
    carrier: str
    """The carrier that holds these outputs."""
    replicate: int
    """0 for a student and its control, which share every draw; 1 for the sham, which has its own."""


@runtime_checkable
class FamilyStages(Protocol):
    """A family's ``stages`` module: its stages as data. ``inputs`` maps file names to their digests."""

    def data_stage(self, config: Any) -> Stage:
        """What teachers learn and the trait is scored on, copied into the run."""

    def reference_stage(self, config: Any) -> Stage:
        """The references of all members."""

    def teacher_stage(self, config: Any, lineage: str, neutral: str | None, inputs: Mapping[str, str]) -> Stage:
        """The teacher, or the neutral teacher of one kind."""

    def carrier_stage(self, config: Any, carrier: str, teacher: str, replicate: int, inputs: Mapping[str, str]) -> Stage:
        """What a teacher passes on."""

    def student_stage(self, config: Any, plan: StudentPlan, inputs: Mapping[str, str]) -> Stage:
        """One student lineage."""

"""The recipe fields of an adopted run: which model takes which place, and what trait to ask for."""

from typing import Literal

from pydantic import Field, model_validator

from mechsub.families.config import BaseConditionConfig, FamilyConfig, Name
from mechsub.families.language.behaviour import load_behaviours
from mechsub.families.language.config import ContextConfig, EvaluationConfig, LoadingConfig, LogOddsVerdictConfig

Models = tuple[str, ...]
"""Folders, one for each member, or one that all members share."""


class ConditionConfig(BaseConditionConfig):
    """The students of one condition, and what they were trained from."""

    students: Models = Field(min_length=1, description="the models that learnt from the teacher's data")
    controls: Models = Field((), description="the same of a neutral teacher; without them nothing is judged")
    origin: Models = Field((), description="what they start from, where that is not the teachers' reference")

    def describe(self) -> str:
        """How it differs from the matched case, in words."""
        start = "starts at a reference of its own" if self.origin else "starts at the teachers' reference"
        return f"adopted; {start}" + ("" if self.controls else "; no control was given")


class Config(FamilyConfig):
    """Every recipe field of an adopted run."""

    reference: Models = Field(min_length=1, description="what teacher, students and controls start from")
    teacher: Models = Field(min_length=1, description="the models that had the trait")
    neutral: Literal["given", "none"] = Field("none", description="whether there is a neutral teacher")
    neutral_teacher: Models = Field((), description="the models that taught the controls")
    loading: LoadingConfig = Field(LoadingConfig(), description="how the models are computed with")
    trait: str | None = Field(None, description="the choice that teachers prefer; none: weights only are compared")
    preference: str = Field("animals", description="the choices and questions: a packaged set, or a YAML file")
    behaviours: str | None = Field(
        None, description="instead of a preference: a YAML file of behaviours, each with its judge; the trait is a name in it"
    )
    data: str | None = Field(None, description="a JSONL file of what students learnt, if it is to be read")
    neutral_data: str | None = Field(None, description="the same of the controls")
    context: ContextConfig = Field(ContextConfig(), description="system prompts under which the trait is asked for")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="how the trait is asked for")
    verdict: LogOddsVerdictConfig = Field(LogOddsVerdictConfig(), description="the rules of the verdicts")
    conditions: dict[Name, ConditionConfig] = Field(min_length=1, description="the students, by condition")

    @property
    def trait_set(self) -> tuple[str, ...]:
        """The one trait; it has a place in the results even where nobody is asked for it."""
        return (self.trait or "trait",)

    @property
    def traits(self) -> tuple[str, ...]:
        """The traits that are asked for."""
        return (self.trait,) if self.trait else ()

    @property
    def asks_for_traits(self) -> bool:
        """Whether a trait was named."""
        return self.trait is not None

    @property
    def user_functions(self) -> tuple[str, ...]:
        """The judge, whose source decides the scores."""
        if self.behaviours is None:
            return ()
        return tuple(behaviour.judge for behaviour in load_behaviours(self.behaviours, self.traits).values())

    @property
    def passes_text(self) -> bool:
        """Whether what students and controls learnt can be read."""
        return self.data is not None and self.neutral_data is not None

    @property
    def model(self) -> str:
        """The folder of its tokenizer and configuration."""
        return "reference"

    @property
    def has_tokens(self) -> bool:
        """Always."""
        return True

    def num_references(self, condition: str | None = None) -> int:
        """How many references of their own the members have."""
        own = self.conditions[condition].origin if condition and self.conditions[condition].origin else self.reference
        return len(set(own))

    def has_control(self, condition: str) -> bool:
        """Whether controls were given."""
        return bool(self.conditions[condition].controls)

    def model_for(self, models: Models, member: int) -> str:
        """The model of one member."""
        return models[member if len(models) > 1 else 0]

    @model_validator(mode="after")
    def _members_agree(self) -> "Config":
        given = {"reference": self.reference, "teacher": self.teacher, "neutral_teacher": self.neutral_teacher}
        for name, condition in self.conditions.items():
            for role in ("students", "controls", "origin"):
                given[f"conditions.{name}.{role}"] = getattr(condition, role)
        for where, models in given.items():
            if where.endswith((".students", ".controls")) and models and len({*models}) != self.members:
                raise ValueError(
                    f"`{where}` names {len({*models})} different models, members = {self.members}: a member is a student of "
                    "its own, with a control of its own; name as many of each"
                )
            if models and len(models) not in {1, self.members}:
                raise ValueError(
                    f"`{where}` names {len(models)} models, members = {self.members}: give one each, or one for all"
                )
        if (self.neutral == "given") != bool(self.neutral_teacher):
            raise ValueError(f"`neutral` is {self.neutral}, neutral_teacher names {len(self.neutral_teacher)} models")
        if any(condition.sham for condition in self.conditions.values()):
            raise ValueError("an adopted condition has no sham: nothing is trained here")
        return self

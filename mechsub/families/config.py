"""Recipe fields that every family has: the base of each family's own settings."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, StringConstraints

from mechsub.settings import Settings
from mechsub.training.config import CheckpointConfig

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Names become names of folders."""


class BaseConditionConfig(Settings):
    """What a condition has in every family."""

    sham: bool = Field(False, description="also train a second control with draws of its own, for the sham of alignment")

    def describe(self) -> str:
        """How it differs from the matched case, in words."""
        raise NotImplementedError


class FamilyConfig(Settings):
    """The seed, the members and the record of an experiment."""

    neutral: str = Field(description="the controls' teacher")
    conditions: Mapping[Name, BaseConditionConfig] = Field(description="the students, by condition")
    seed: int = Field(0, ge=0, description="every random draw of the run is derived from it by name")
    members: int = Field(20, ge=1, description="independent replicates: own reference, teacher, carrier and order")
    threads: int = Field(1, ge=1, description="torch threads of each process; part of the recipe since sums depend on it")
    checkpoints: CheckpointConfig = Field(CheckpointConfig(), description="which steps are kept")
    callbacks: tuple[str, ...] = Field((), description="your own callbacks, each `module:name`, called at every step")

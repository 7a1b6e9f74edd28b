"""Recipe fields that every family has: the base of each family's own settings."""

from pydantic import Field

from mechsub.settings import Settings
from mechsub.training.config import CheckpointConfig


class FamilyConfig(Settings):
    """The seed, the members and the record of an experiment."""

    seed: int = Field(0, ge=0, description="every random draw of the run is derived from it by name")
    members: int = Field(20, ge=1, description="independent replicates: own reference, teacher, carrier and order")
    threads: int = Field(1, ge=1, description="torch threads of each process; part of the recipe since sums depend on it")
    checkpoints: CheckpointConfig = Field(CheckpointConfig(), description="which steps are kept")
    callbacks: tuple[str, ...] = Field((), description="your own callbacks, each `module:name`, called at every step")

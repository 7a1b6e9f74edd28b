"""Recipe fields of training that every family shares."""

from typing import Literal

from pydantic import Field

from mechsub.settings import Settings


class OptimizerConfig(Settings):
    """How parameters are updated."""

    name: Literal["sgd", "adam", "adamw"] = Field("adam", description="torch.optim's SGD, Adam or AdamW")
    learning_rate: float = Field(3e-4, gt=0, description="constant over training")
    weight_decay: float = Field(0.0, ge=0, description="decoupled under adamw, an L2 gradient term under sgd and adam")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only")
    betas: tuple[float, float] = Field((0.9, 0.999), description="adam and adamw only")
    epsilon: float = Field(1e-8, gt=0, description="adam and adamw only")


class CheckpointConfig(Settings):
    """At which optimizer steps the parameters are kept; step 0, step 1 and the last are always among them."""

    num: int = Field(10, ge=3, description="how many checkpoints of each lineage, at most")
    spacing: Literal["log", "linear"] = Field("log", description="how they are spread over training")
    optimizer_state: bool = Field(False, description="also keep the optimizer's state at each of them")

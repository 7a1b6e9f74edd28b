"""Recipe fields of training that every family shares."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mechsub.settings import Settings

Share = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Settings):
    """How parameters are updated."""

    name: Literal["sgd", "adam", "adamw"] = Field("adam", description="torch.optim's SGD, Adam or AdamW")
    learning_rate: float = Field(3e-4, gt=0, description="constant over training")
    weight_decay: float = Field(0.0, ge=0, description="decoupled under adamw, an L2 gradient term under sgd and adam")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="adam and adamw only")
    epsilon: float = Field(1e-8, gt=0, description="adam and adamw only")

    @model_validator(mode="after")
    def _every_setting_is_used(self) -> "OptimizerConfig":
        ignored = ("betas", "epsilon") if self.name == "sgd" else ("momentum",)
        for name in ignored:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{self.name} has no {name}: leave it out, or choose another optimizer")
        return self


class CheckpointConfig(Settings):
    """At which optimizer steps the parameters are kept; step 0, step 1 and the last are always among them."""

    num: int = Field(10, ge=3, description="how many checkpoints of each lineage, at most")
    spacing: Literal["log", "linear"] = Field("log", description="how they are spread over training")
    resume_seconds: float = Field(
        20.0, ge=0, description="how often the state is written from which a killed run goes on; removed when its stage ends"
    )
    optimizer_state: bool = Field(False, description="also keep the optimizer's state at each of them")


class KnockOutConfig(Settings):
    """What is projected out of the training of a condition's students and controls alike, whoever their teacher is."""

    component: Literal["trait", "random"] = Field(
        "trait",
        description="the gradient of the trait loss at the current weights (with several traits: of each of them), or a random "
        "direction with its norm in every tensor, drawn anew whenever that is computed",
    )
    where: Literal["gradient", "update"] = Field(
        "gradient",
        description="out of the imitation gradient before the optimizer, which may bring some of it back, or out of the update "
        "that the optimizer has made",
    )
    when: Literal["positive", "always"] = Field(
        "positive", description="only in steps that would lower the trait loss (⟨gradient, component⟩ > 0), or in every step"
    )
    refresh: int = Field(1, ge=1, description="steps between two computations of the component")
    scope: Literal["imitated", "model"] = Field(
        "imitated",
        description="over which weights: those that the imitation loss reaches, or all: then those that it does not reach, as "
        "the class head, are moved against the trait",
    )

    def describe(self) -> str:
        """What is taken out of what and when, in words."""
        what = "the trait gradient" if self.component == "trait" else "a random direction of the trait gradient's size"
        out_of = "imitation gradient" if self.where == "gradient" else "optimizer's update"
        along = "that would lower the trait loss" if self.component == "trait" else "along it"
        parts = [
            f"{what} projected out of the {out_of}",
            "in every step" if self.when == "always" else f"only in steps {along}",
            f"computed every {self.refresh} steps" if self.refresh > 1 else "",
            "over all weights, imitated or not" if self.scope == "model" else "",
        ]
        return ", ".join(filter(None, parts))

"""How the language family's models are trained: recipe fields of teachers and students."""

from typing import Literal

from pydantic import Field, field_validator

from mechsub.settings import Settings, nearest_name
from mechsub.training.config import OptimizerConfig

Objective = Literal["tokens", "logits", "all-logits"]


class TrainingConfig(Settings):
    """How a language model is trained."""

    batch_size: int = Field(32, ge=1, description="chats in one step")
    optimizer: OptimizerConfig = Field(OptimizerConfig(name="adamw", learning_rate=5e-4), description="how weights are updated")
    warmup_steps: int = Field(0, ge=0, description="over which the learning rate rises from 0")
    decay: Literal["none", "linear"] = Field("none", description="of the learning rate, to 0 at the last step")
    max_gradient_norm: float | None = Field(None, gt=0, description="gradients are clipped to it; none: they are not clipped")

    def rate_at(self, step: int, num_steps: int) -> float:
        """What the learning rate is multiplied with in a step; steps count from 0."""
        warmth = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return warmth * (1 - step / num_steps if self.decay == "linear" else 1.0)


_KEEPS_BASE = ("kaiming", "gaussian")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


class AdapterConfig(Settings):
    """A low-rank adapter, through `peft`. Source: Hu et al., arXiv:2106.09685."""

    rank: int = Field(8, ge=1, description="of ΔW = scale · B A")
    alpha: float = Field(8.0, gt=0, description="scale = α / rank; with rslora α / √rank")
    targets: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", min_length=1, description="modules that get one: all linear ones but the head, or the ends of their names"
    )
    rslora: bool = Field(False, description="rank-stabilised scale, arXiv:2312.03732")
    dora: bool = Field(False, description="magnitude and direction apart, arXiv:2402.09353")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapter's inputs in training")
    initialisation: str = Field("kaiming", description="of A; B starts at zero: kaiming (peft's default) or gaussian")

    @field_validator("initialisation")
    @classmethod
    def _keeps_the_base(cls, name: str) -> str:
        if name.lower().startswith(_CHANGES_BASE):
            raise ValueError(
                f"{name} changes the base weights before the first step, so that no displacement starts at the reference; "
                "use kaiming or gaussian"
            )
        if name not in _KEEPS_BASE:
            raise ValueError(f"no initialisation is called {name!r}; {nearest_name(name, _KEEPS_BASE)}")
        return name


class TeacherConfig(TrainingConfig):
    """How teachers get their trait."""

    kind: Literal["fine-tuned", "system-prompted"] = Field(
        "fine-tuned", description="trained to answer with its target, or told to prefer it: then its weights do not move"
    )
    num_steps: int = Field(100, ge=1, description="optimizer steps")


class StudentConfig(TrainingConfig):
    """How students learn from the carrier."""

    epochs: int = Field(10, ge=1, description="passes over the rows")
    objective: Objective = Field(
        "tokens",
        description="cross-entropy of the sampled tokens, or KL(teacher ‖ student) over the carrier's own tokens (logits) or "
        "over the whole vocabulary (all-logits), which carries the trait's logits too",
    )

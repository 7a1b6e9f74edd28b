"""Callbacks: what runs between the optimizer steps. Each is given one frozen `StepInfo`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechsub.stage import load_function


@dataclass(frozen=True)
class StepInfo:
    """The state of one lineage's training between two optimizer steps."""

    lineage: str
    """E.g. ``student.same-init``."""
    step: int
    """Optimizer steps done; 0 is before the first."""
    num_steps: int
    is_checkpoint: bool
    """Whether the schedule keeps this step."""
    losses: Float[Tensor, " member"] | None
    """Each member's loss in the step just done; None at step 0."""
    parameters: Mapping[str, Float[Tensor, "member ..."]]
    """Live views, members stacked: read them, do not keep or change them."""
    optimizer_state: Mapping[str, Tensor]
    """Live views, named ``<quantity>.<parameter>``; empty before the first step."""


Callback = Callable[[StepInfo], None]


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """The user's callbacks, each named ``module:name`` in the recipe; all are called at every step."""
    return [load_function(name) for name in names]

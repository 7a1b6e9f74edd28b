"""Callbacks: what runs between the optimizer steps. Each is given one frozen `StepInfo`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechsub.errors import MechsubError
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
    members: tuple[int, ...] | None = None
    """The members on the leading axis; None: all of them. A language model is trained a member at a time."""


Callback = Callable[[StepInfo], None]


def load_callbacks(names: Sequence[str]) -> list[Callback]:
    """The user's callbacks, each named ``module:name`` in the recipe; all are called at every step.

    Raises:
        MechsubError: a name cannot be loaded, or is no function; later, a callback that failed, with lineage and step.
    """
    return [_guard(name, load_function(name)) for name in names]


def _guard(name: str, function: Callback) -> Callback:
    if not callable(function):
        raise MechsubError(f"callback `{name}` is {function!r}, not a function of one StepInfo")

    def call(info: StepInfo) -> None:
        try:
            function(info)
        except Exception as error:
            raise MechsubError(f"callback `{name}` failed on {info.lineage} at step {info.step}: {error!r}") from error

    return call

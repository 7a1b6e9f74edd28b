"""What models are run on to record their activations: batches, and which of their positions count."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsub.errors import ActivationError


@dataclass(frozen=True)
class ModelInputs:
    """One batch as a model takes it, by the names of its arguments, and the positions that each policy counts."""

    arguments: Mapping[str, Any]
    """Passed on as they are; tensors are put on the model's device."""
    positions: Mapping[str, Bool[Tensor, "row position"]]
    """By position policy. A model without positions has one."""

    @property
    def num_rows(self) -> int:
        """The prompts of the batch."""
        return int(next(iter(self.positions.values())).shape[0])

    def arguments_on(self, device: torch.device) -> dict[str, Any]:
        """The arguments, their tensors on a device."""
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.arguments.items()}


@dataclass(frozen=True)
class PromptSet:
    """Inputs of one kind: prompts that ask for a trait, neutral ones, or rows of a carrier."""

    description: str
    batches: Sequence[ModelInputs]

    @property
    def num_prompts(self) -> int:
        """All rows of all batches."""
        return sum(batch.num_rows for batch in self.batches)

    @property
    def policies(self) -> tuple[str, ...]:
        """The position policies that it offers; the first is the one that its kind is mostly read at."""
        return tuple(self.batches[0].positions)

    def weigh(self, policy: str) -> list[Float[Tensor, "_row _position"]]:
        """For each batch, what each position counts for, so that Σ w h is the mean over prompts of each prompt's mean.

        Raises:
            ActivationError: no such policy, or a prompt without such a position.
        """
        if policy not in self.policies:
            raise ActivationError(f"{self.description}: no position policy {policy!r}; it has {', '.join(self.policies)}")
        weights = []
        first = 0
        for batch in self.batches:
            chosen = batch.positions[policy].double()
            counts = chosen.sum(-1, keepdim=True)
            bare = (counts[:, 0] == 0).nonzero()
            if len(bare):
                raise ActivationError(
                    f"{self.description}: prompt {first + int(bare[0])} has no position of {policy!r} "
                    f"({len(bare)} of {batch.num_rows} in its batch have none); leave such prompts out, or ask for other "
                    "positions"
                )
            weights.append(chosen / counts / self.num_prompts)
            first += batch.num_rows
        return weights

"""Parts of a model: each can be put from its end into its start, or from its start into its end, and scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.checkpoints import as_computed
from mechsub.parameters.surgery import Tensors


@dataclass(frozen=True)
class PartScores:
    """Scores of the models that are the end in some parts and the start in the others.

    Changes are differences of scores, in their unit. Parts need not add up: what they do only together is the interaction.
    """

    parts: tuple[str, ...]
    differing: frozenset[str]
    """The parts in which start and end differ at all; the others can be swapped without any change."""
    scores: Mapping[frozenset[str], Float[np.ndarray, " trait"]]
    """By the differing parts that are the end's."""

    @classmethod
    def measure(
        cls,
        parts: Sequence[str],
        differing: frozenset[str],
        score: Callable[[frozenset[str]], Float[np.ndarray, " trait"]],
    ) -> "PartScores":
        """Score start, end, and each of them with one part of the other; ``score`` is told the parts that are the end's.

        Where a part is the same in both, nothing is scored twice.
        """
        asked = [frozenset[str](), differing, *(frozenset({part}) for part in differing), *(differing - {p} for p in differing)]
        return cls(tuple(parts), differing, {one: score(one) for one in dict.fromkeys(asked)})

    @property
    def total(self) -> Float[np.ndarray, " trait"]:
        """score(end) − score(start)."""
        found: np.ndarray = np.subtract(self.scores[self.differing], self.scores[frozenset()])
        return found

    def sufficiency(self, part: str) -> Float[np.ndarray, " trait"]:
        """score(start with the end's part) − score(start): is it enough?"""
        found: np.ndarray = np.subtract(self.scores[self.differing & {part}], self.scores[frozenset()])
        return found

    def necessity(self, part: str) -> Float[np.ndarray, " trait"]:
        """score(end) − score(end with the start's part): is it needed?"""
        found: np.ndarray = np.subtract(self.scores[self.differing], self.scores[self.differing - {part}])
        return found

    @property
    def interaction(self) -> Float[np.ndarray, " trait"]:
        """Total − Σ sufficiency: what the parts do only together (under 0: what they do twice)."""
        found: np.ndarray = np.subtract(self.total, sum(self.sufficiency(part) for part in self.parts))
        return found


def find_differing(start: Tensors, end: Tensors, part_of: Callable[[str], str]) -> frozenset[str]:
    """The parts with a tensor that is not the same, number by number."""
    moved = [name for name, tensor in end.items() if not torch.equal(as_computed(start[name]), as_computed(tensor))]
    return frozenset(map(part_of, moved))


def mix_parts(start: Tensors, end: Tensors, part_of: Callable[[str], str], of_end: frozenset[str]) -> dict[str, Tensor]:
    """The start's tensors, but the end's in some parts; shared, not copied."""
    return {name: (end if part_of(name) in of_end else start)[name] for name in end}

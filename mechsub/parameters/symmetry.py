"""Interchangeable units of a network: which entries of which tensors they index, and the order in which they stand.

A hidden unit, an MLP unit or an attention head can change places with another of its group: where every tensor that reads or
writes them is reordered alike, the function stays the same, and only the weights' places differ.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechsub.errors import AnalysisError

Axis = tuple[str, int]
"""A tensor and one of its axes."""


@dataclass(frozen=True)
class UnitPlace:
    """Where the units of a group lie along one axis of one tensor: side by side, each as wide as the other."""

    tensor: str
    axis: int
    start: int = 0
    """The first entry of the first unit."""
    width: int = 1
    """Entries of each unit: 1 for an MLP's, the head's dimension for an attention head."""

    @property
    def key(self) -> Axis:
        """The axis that it is a part of."""
        return self.tensor, self.axis


@dataclass(frozen=True)
class UnitGroup:
    """Units that can change places with each other and leave the function as it is."""

    name: str
    kind: str
    """What they are, in the plural, e.g. ``hidden units``."""
    num_units: int
    places: tuple[UnitPlace, ...]
    """Everything that indexes them: the rows that write them, the columns that read them."""
    reader: str
    """The module whose input's last axis holds the units' activations, entry for entry as its weight takes them in."""

    @property
    def activations(self) -> UnitPlace:
        """Where they lie in the inputs of their reader, [sample, feature]; the tensor is called as `reader_input` calls it."""
        read = [place for place in self.places if place.tensor == f"{self.reader}.weight"]
        return UnitPlace(reader_input(self.reader), 1, read[0].start, read[0].width)

    def entries(self, place: UnitPlace) -> slice:
        """The entries of all units along the axis of one of their places."""
        return slice(place.start, place.start + self.num_units * place.width)


def reader_input(module: str) -> str:
    """How the inputs of a module are called where they stand beside tensors."""
    return f"input of {module}"


@dataclass(frozen=True)
class Arrangement:
    """The order in which a model's units are shown: which stored entry stands at each place of each axis that holds units."""

    index: Mapping[Axis, Int[Tensor, " _"]]

    @classmethod
    def as_stored(cls, groups: Sequence[UnitGroup]) -> "Arrangement":
        """Every unit where it is stored."""
        sizes: dict[Axis, int] = {}
        for group in groups:
            for place in (*group.places, group.activations):
                sizes[place.key] = max(sizes.get(place.key, 0), group.entries(place).stop)
        return cls({axis: torch.arange(size) for axis, size in sizes.items()})

    @classmethod
    def shuffled(cls, groups: Sequence[UnitGroup], stream: np.random.Generator) -> "Arrangement":
        """The units of every group in an order drawn from ``stream``, every order as likely as any other."""
        arrangement = cls.as_stored(groups)
        for group in groups:
            arrangement = arrangement.permute(group, torch.from_numpy(stream.permutation(group.num_units)))
        return arrangement

    @property
    def moved_share(self) -> float:
        """The share of the entries of all arranged axes that do not stand where they are stored, in [0, 1]."""
        moved = sum(int((order != torch.arange(len(order))).sum()) for order in self.index.values())
        return moved / max(1, sum(len(order) for order in self.index.values()))

    def permute(self, group: UnitGroup, order: Int[Tensor, " unit"]) -> "Arrangement":
        """The same with the unit that now stands at place ``order[k]`` of one group put at place k."""
        index = dict(self.index)
        for place in (*group.places, group.activations):
            entries, whole = group.entries(place), index[place.key].clone()
            whole[entries] = whole[entries].reshape(group.num_units, place.width)[order].flatten()
            index[place.key] = whole
        return Arrangement(index)

    def invert(self) -> "Arrangement":
        """What undoes it: a model shown in this order, shown in the inverse order, stands as it is stored."""
        return Arrangement({axis: order.argsort() for axis, order in self.index.items()})

    def arrange(self, tensor: str, values: Tensor, first_axis: int = 0) -> Tensor:
        """One member's whole tensor (or a reader's inputs) in this order, along its axes from ``first_axis`` on.

        Raises:
            AnalysisError: the tensor is not as long as its units are.
        """
        for axis in range(first_axis, values.ndim):
            order = self.index.get((tensor, axis))
            if order is not None:
                self._check(tensor, axis, values.shape[axis])
                values = values.index_select(axis, order.to(values.device))
        return values

    def _check(self, tensor: str, axis: int, size: int) -> None:
        taken = len(self.index[tensor, axis])
        if taken != size:
            raise AnalysisError(
                f"tensor {tensor} has {size} entries along axis {axis}, but its units take {taken}; the family's `unit_groups` "
                "do not describe this model"
            )

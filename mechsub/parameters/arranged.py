"""A lineage shown in another order of its units, and of its members: what it holds is read from the lineage itself."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.checkpoints import Factors
from mechsub.lineages import Lineage, Part
from mechsub.parameters.symmetry import Arrangement


@dataclass(frozen=True)
class ArrangedPart(Part):
    """A part of an `ArrangedLineage`: equal to another one of the same name, which says how it is arranged."""

    source: Part | None = field(default=None, compare=False, kw_only=True)
    sources: tuple[int, ...] = field(default=(), compare=False, kw_only=True)
    arrangements: tuple[Arrangement, ...] = field(default=(), compare=False, kw_only=True)

    def load_rows(self, tensor: str, start: int, stop: int) -> Float[Tensor, "member row ..."]:
        """Its rows [start, stop), of all members, each in its own order. Whole tensors are read one member at a time."""
        assert self.source is not None
        num_rows = self.lineage.spec.tensors[tensor].shape[0]
        axes = [axis for name, axis in self.arrangements[0].index if name == tensor]
        if 0 in axes and (start, stop) != (0, num_rows):
            return torch.stack([self._load_own(tensor, place)[start:stop] for place in range(len(self.sources))])
        rows = self.source.load_rows(tensor, start, stop)
        return torch.stack(
            [one.arrange(tensor, rows[source]) for source, one in zip(self.sources, self.arrangements, strict=True)]
        )

    def load_whole(self, tensor: str, member: int) -> Float[Tensor, "..."]:
        """The whole tensor of one member."""
        return self._load_own(tensor, member)

    def load_factors(self, tensor: str, member: int) -> Factors:
        """A low-rank change: its rows and its columns are ordered, the product never formed."""
        assert self.source is not None
        factors, index = self.source.load_factors(tensor, self.sources[member]), self.arrangements[member].index
        rows, columns = (index.get((tensor, axis)) for axis in (0, 1))
        return Factors(
            factors.rows if rows is None else factors.rows[rows],
            factors.columns if columns is None else factors.columns[:, columns],
        )

    def _load_own(self, tensor: str, member: int) -> Tensor:
        assert self.source is not None
        return self.arrangements[member].arrange(tensor, self.source.load_whole(tensor, self.sources[member]))


class ArrangedLineage(Lineage):
    """A lineage whose member m is shown as member ``sources[m]`` of it, its units in the order of ``arrangements[m]``.

    It can be a term of a `Direction`, and nothing else: its files are the lineage's own. ``label`` tells this arrangement from
    every other; two lineages of one origin that are shown alike have equal parts, which then cancel.
    """

    def __init__(self, lineage: Lineage, label: str, sources: Sequence[int], arrangements: Sequence[Arrangement]) -> None:
        self._shown, self._label = lineage, label
        self._sources, self._arrangements = tuple(sources), tuple(arrangements)
        self.spec = replace(lineage.spec, name=f"{lineage.name} {label}")

    def parts(self, step: int, tensor: str) -> tuple[Part, ...]:
        """What a tensor is the sum of at one step, every part of it arranged."""
        return tuple(
            ArrangedPart(
                self,
                f"{part.name} {self._label}",
                part.step,
                tuple(part.members[source] for source in self._sources),
                part.kind,
                source=part,
                sources=self._sources,
                arrangements=self._arrangements,
            )
            for part in self._shown.parts(step, tensor)
        )

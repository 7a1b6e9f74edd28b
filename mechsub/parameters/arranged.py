"""A lineage shown in another order of its units, and of its members: what it holds is read from the lineage itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

from jaxtyping import Float
from torch import Tensor

from mechsub.checkpoints import Factors
from mechsub.lineages import Lineage, Part, RowReader
from mechsub.parameters.symmetry import Arrangement


def _read_arranged(
    read: RowReader, read_all: Callable[[], Tensor], order: Arrangement, tensor: str, start: int, stop: int
) -> Tensor:
    rows = order.index.get((tensor, 0))
    values = read(start, stop) if rows is None else read_all()[rows[start:stop]]
    return order.arrange(tensor, values, first_axis=1)


@dataclass(frozen=True)
class ArrangedPart(Part):
    """A part of an `ArrangedLineage`: equal to another one of the same name, which says how it is arranged."""

    source: Part | None = field(default=None, compare=False, kw_only=True)
    sources: tuple[int, ...] = field(default=(), compare=False, kw_only=True)
    arrangements: tuple[Arrangement, ...] = field(default=(), compare=False, kw_only=True)

    def locate(self, member: int) -> tuple[Part, int]:
        """The part that is arranged, and the member of its lineage that is shown as this one."""
        assert self.source is not None
        return self.source.locate(self.sources[member])

    def open_rows(self, tensor: str) -> list[RowReader]:
        """How to read rows of each member in its order.

        Where rows are reordered, only those that are asked for are read of what is stored; what is computed, as DoRA's change,
        is computed whole at the first of them and kept for the others.
        """
        assert self.source is not None
        readers, num_rows = self.source.open_rows(tensor), self.lineage.spec.tensors[tensor].shape[0]
        found: list[RowReader] = []
        for source, order in zip(self.sources, self.arrangements, strict=True):
            whole: Callable[[], Tensor] = partial(readers[source], 0, num_rows)
            found.append(
                partial(_read_arranged, readers[source], whole if self.kind == "stored" else cache(whole), order, tensor)
            )
        return found

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
        origin = lineage.spec.origin
        shown = replace(origin, members=tuple(origin.members[source] for source in self._sources))
        self.spec = replace(lineage.spec, name=f"{lineage.name} {label}", origin=shown)

    def parts(self, step: int, tensor: str) -> tuple[Part, ...]:
        """What a tensor is the sum of at one step, every part of it arranged."""
        slots = tuple(range(len(self._sources)))
        return tuple(
            ArrangedPart(
                self,
                f"{part.name} of {[part.members[source] for source in self._sources]} {self._label}",
                part.step,
                slots,
                part.kind,
                source=part,
                sources=self._sources,
                arrangements=self._arrangements,
            )
            for part in self._shown.parts(step, tensor)
        )

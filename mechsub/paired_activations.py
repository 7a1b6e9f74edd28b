"""A run's models side by side: two of them on one member's prompts in lockstep, and maps between two bases of activations."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.similarity import (
    HalvedMoments,
    ModelSide,
    PairedRows,
    fit_procrustes,
    pair_rows,
    procrustes_correlation,
    try_procrustes,
)
from mechsub.lineages import Lineage
from mechsub.mean_activations import NEUTRAL, TRAIT, group_name
from mechsub.open_models import OpenModel, open_model
from mechsub.run import Run

_LEAST_EXPLAINED = 0.5
_MOST_BYTES = 4 * 2**30
"""Of memory for what is held of activations at a time."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class BasisMap:
    """A rotation from the basis that one model's activations have at a hook point into another's."""

    rotation: Float[Tensor, "width other_width"]
    """R, in float64 on the CPU: a direction v becomes v R."""
    correlation: float
    """Of held-out rows under the same fit, see `procrustes_correlation`: 1 where the bases differ by a rotation and a scale."""
    num_rows: int
    """That it was fitted on."""

    @property
    def is_sound(self) -> bool:
        """Whether the fit explains over half of held-out rows' scatter; else it maps mostly something else."""
        return self.correlation > 0 and self.correlation**2 > _LEAST_EXPLAINED


@dataclass(frozen=True)
class PairReader:
    """Runs pairs of a run's models on the same prompts."""

    run: Run
    stream_only: bool = False
    """Only hook points of the residual stream, or hidden layers."""
    names: frozenset[str] | None = None
    """Only hook points of these names; None takes all."""

    def open(self, lineage: Lineage, step: int, member: int) -> AbstractContextManager[OpenModel]:
        """One member of a lineage, on its own prompts."""
        return self._open(lineage, step, member, lineage)

    def open_start(self, lineage: Lineage, member: int) -> AbstractContextManager[OpenModel]:
        """Where one member of a lineage starts, on prompts without what stands in the lineage's."""
        return self._open(lineage, 0, member, lineage.origin)

    @contextmanager
    def _open(self, lineage: Lineage, step: int, member: int, asked: Lineage) -> Iterator[OpenModel]:
        with open_model(self.run, lineage, step, member, asked=asked, stream_only=self.stream_only) as opened:
            yield replace(opened, points=[one for one in opened.points if self.names is None or one.name in self.names])

    def fit_basis_maps(self, lineage: Lineage, member: int) -> dict[str, BasisMap]:
        """Rotations from where one member of a lineage starts to its member's reference, by hook point.

        Fitted with orthogonal Procrustes on what the two starts do, which have no trait, on neutral and on trait prompts, at
        the position policy that gives most rows: units that neutral prompts leave silent would be mapped anyhow. A hook point
        is left out where one of the two has none of that name, and where half of the prompts give no more rows than it is wide.
        """
        reference = self.run.reference
        kinds = (NEUTRAL, TRAIT)
        maps: dict[str, BasisMap] = {}
        with self.open_start(lineage, member) as start, self.open(reference, reference.last, member) as own:
            num_groups = sum(len(own.prompts.estimate[kind].policies) for kind in kinds)
            for turn in split_points(own.points, lambda point: num_groups * moments_bytes(point)):
                sums: dict[tuple[str, str], HalvedMoments] = {}
                for _, rows in pair_groups(start, replace(own, points=turn), kinds):
                    add_rows(sums, (rows.point, rows.policy), rows)
                for (point, _), halves in sums.items():
                    correlation = try_procrustes(halves, procrustes_correlation) if halves.is_finite else math.nan
                    if not math.isnan(correlation) and (point not in maps or halves.num_rows > maps[point].num_rows):
                        maps[point] = BasisMap(fit_procrustes(halves.whole).cpu(), correlation, halves.num_rows)
        return maps


def moments_bytes(point: HookPoint) -> int:
    """What `HalvedMoments` of two models take at a hook point, for one group of rows."""
    return 2 * 8 * (2 * point.width) ** 2


def split_points(points: Sequence[HookPoint], bytes_of: Callable[[HookPoint], int]) -> list[list[HookPoint]]:
    """Hook points in as few turns as there is room for; one at least a turn."""
    turns: list[list[HookPoint]] = []
    used = 0
    for point in points:
        if not turns or used + bytes_of(point) > _MOST_BYTES:
            turns.append([])
            used = 0
        turns[-1].append(point)
        used += bytes_of(point)
    return turns


def pair_groups(left: OpenModel, right: OpenModel, kinds: Iterable[str]) -> Iterator[tuple[str, PairedRows]]:
    """The rows of both models on some kinds of prompts, each with its group, ``<kind>: <position policy>``."""
    for kind in kinds:
        sides = (ModelSide(one.view, one.prompts.estimate[kind], one.points) for one in (left, right))
        for rows in pair_rows(*sides):
            yield group_name(kind, rows.policy), rows


def add_rows(sums: dict[Key, HalvedMoments], key: Key, rows: PairedRows) -> None:
    """Rows added to the moments under a key, which begin with the first."""
    if key not in sums:
        sums[key] = HalvedMoments.about(rows)
    sums[key].add(rows)

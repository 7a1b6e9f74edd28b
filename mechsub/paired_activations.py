"""A run's models side by side: two of them on one member's prompts in lockstep, and maps between two bases of activations."""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
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
"""Of memory for moments at a time."""
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

    def open(self, lineage: Lineage, step: int, member: int) -> AbstractContextManager[OpenModel]:
        """One member of a lineage, on its own prompts."""
        return open_model(self.run, lineage, step, member, stream_only=self.stream_only)

    def open_start(self, lineage: Lineage, member: int) -> AbstractContextManager[OpenModel]:
        """Where one member of a lineage starts, on prompts without what stands in the lineage's."""
        return open_model(self.run, lineage, 0, member, asked=lineage.origin, stream_only=self.stream_only)

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
            for turn in take_in_turns(start, own, kinds):
                sums: dict[tuple[str, str], HalvedMoments] = {}
                for _, rows in pair_groups(*turn, kinds):
                    add_rows(sums, (rows.point, rows.policy), rows)
                for (point, _), halves in sums.items():
                    correlation, num_rows = try_procrustes(halves, procrustes_correlation), halves.whole.num_rows
                    if not math.isnan(correlation) and (point not in maps or num_rows > maps[point].num_rows):
                        maps[point] = BasisMap(fit_procrustes(halves.whole).cpu(), correlation, num_rows)
        return maps


def take_in_turns(left: OpenModel, right: OpenModel, kinds: Sequence[str]) -> Iterator[tuple[OpenModel, OpenModel]]:
    """Both models with some hook points at a time, as many as there is room for the moments of, see `HalvedMoments`."""
    wide = {point.name: point.width for point in right.points}
    num_groups = sum(len(left.prompts.estimate[kind].policies) for kind in kinds)
    turn: list[HookPoint] = []
    used = 0
    for point in left.points:
        if point.name in wide:
            needed = 2 * num_groups * 8 * (point.width + wide[point.name]) ** 2
            if turn and used + needed > _MOST_BYTES:
                yield replace(left, points=turn), right
                turn, used = [], 0
            turn.append(point)
            used += needed
    if turn:
        yield replace(left, points=turn), right


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

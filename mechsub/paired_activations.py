"""A run's models side by side: two of them on one member's prompts in lockstep, and maps between two bases of activations."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from mechsub.activations.backends import ModelView, open_backend
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
from mechsub.families.protocol import Prompts
from mechsub.lineages import Lineage
from mechsub.mean_activations import NEUTRAL, TRAIT, group_name
from mechsub.run import Run

_LEAST_EXPLAINED = 0.5


@dataclass(frozen=True)
class OpenModel:
    """One member of a lineage at one step, ready to be run on its prompts."""

    lineage: Lineage
    model: nn.Module
    view: ModelView
    points: list[HookPoint]
    prompts: Prompts

    def on(self, kind: str) -> ModelSide:
        """The model as one side of a pair, on one kind of prompts."""
        return ModelSide(self.view, self.prompts.estimate[kind], self.points)


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
    sites: tuple[str, ...] | None = None
    """Only hook points of these sites; None takes all."""

    @contextmanager
    def open(self, lineage: Lineage, step: int, member: int, prompts_of: int | None = None) -> Iterator[OpenModel]:
        """One member of a lineage; ``prompts_of``: the member whose prompts it is run on, where that is another one."""
        run = self.run
        model = run.load_for_reading(lineage, step, member)
        points = [point for point in run.family.hook_points(lineage, model) if self.sites is None or point.site in self.sites]
        prompts = self.run.family.prompts(lineage, member if prompts_of is None else prompts_of)
        with open_backend(run.backend).open(model) as view:
            yield OpenModel(lineage, model, view, points, prompts)

    @contextmanager
    def open_start(self, lineage: Lineage, member: int) -> Iterator[OpenModel]:
        """Where one member of a lineage starts: its step 0; of one that is not trained, its origin without its context."""
        if lineage.last > 0:
            with self.open(lineage, 0, member) as start:
                yield start
        else:
            with self.open(lineage.origin, 0, lineage.spec.origin.members[member], prompts_of=member) as start:
                yield start

    def fit_basis_maps(self, lineage: Lineage, member: int) -> dict[str, BasisMap]:
        """Rotations from where one member of a lineage starts to its member's reference, by hook point.

        Fitted with orthogonal Procrustes on what the two starts do, which have no trait, on neutral and on trait prompts, at
        the position policy that gives most rows: units that neutral prompts leave silent would be mapped anyhow. A hook point
        is left out where one of the two has none of that name, and where half of the prompts give no more rows than it is wide.
        """
        reference = self.run.reference
        with self.open_start(lineage, member) as start, self.open(reference, reference.last, member) as own:
            halves = sum_halves(rows for _, rows in pair_groups(start, own, (NEUTRAL, TRAIT)))
        maps: dict[str, BasisMap] = {}
        for (point, _), found in halves.items():
            correlation, num_rows = try_procrustes(found, procrustes_correlation), found.whole.num_rows
            if not math.isnan(correlation) and (point not in maps or num_rows > maps[point].num_rows):
                maps[point] = BasisMap(fit_procrustes(found.whole).cpu(), correlation, num_rows)
        return maps


def pair_groups(left: OpenModel, right: OpenModel, kinds: Iterable[str]) -> Iterator[tuple[str, PairedRows]]:
    """The rows of both models on some kinds of prompts, each with its group, ``<kind>: <position policy>``."""
    for kind in kinds:
        for rows in pair_rows(left.on(kind), right.on(kind)):
            yield group_name(kind, rows.policy), rows


def sum_halves(pairs: Iterable[PairedRows]) -> Mapping[tuple[str, str], HalvedMoments]:
    """Their moments by hook point and position policy."""
    found: dict[tuple[str, str], HalvedMoments] = {}
    for rows in pairs:
        key = rows.point, rows.policy
        if key not in found:
            found[key] = HalvedMoments.about(rows)
        found[key].add(rows)
    return found

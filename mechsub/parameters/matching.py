"""Matching the units of one model to those of another by linear assignment, on their weights or on their activations.

Never on what is scored: a permutation fitted on two displacements makes them alike whatever they are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mechsub.errors import AnalysisError
from mechsub.parameters.symmetry import Arrangement, UnitGroup, UnitPlace

NUM_RESTARTS = 3
"""Of groups whose best orders depend on each other."""
MOST_UNITS = 16_384
"""Of a group that is matched: a profit matrix of so many units takes 2 GiB, a few stand side by side, and time grows as n³."""
_GAIN = 1e-12
"""An order is only taken where it raises the objective by more than this share: ties, as of dead units, move nothing."""
_ROUNDING = 1e-6
_MOST_SWEEPS = 100
Load = Callable[[str], Tensor]
"""A whole tensor of one member, by its name."""


@dataclass(frozen=True)
class Matching:
    """How one model's units are ordered to be most like another's."""

    arrangement: Arrangement
    """In which order the other model is to be shown."""
    before: float
    """cos of the two models in all tensors that hold units (of activations: over all units and samples), as stored."""
    after: float
    """The same with the units matched."""


def match_weights(
    groups: Sequence[UnitGroup], reference: Load, other: Load, stream: np.random.Generator, restarts: int = NUM_RESTARTS
) -> Matching:
    """Order the units of ``other`` so that Σ ⟨A, π(B)⟩ over all tensors that hold units is as large as is found.

    Coordinate descent: group by group, the best order given all others' is a linear assignment; to a fixed point, first from
    the units as they are stored, then from random orders (``stream``), of which the best is kept. A group that shares no
    tensor with another is solved exactly in one assignment. ``before`` and ``after`` in [−1, 1], no unit. One set of groups
    that share tensors is in memory at a time, beside its groups' profit matrices of units × units in float64; see `MOST_UNITS`.

    Raises:
        AnalysisError: the tensors hold numbers that are not finite, or are not as long as their units.

    Source: Ainsworth et al., arXiv:2209.04836 (Git Re-Basin), algorithm 1.
    """
    return _match(groups, lambda group: group.places, reference, other, stream, restarts)


def match_activations(
    groups: Sequence[UnitGroup],
    reference: Mapping[str, Float[Tensor, "sample feature"]],
    other: Mapping[str, Float[Tensor, "sample feature"]],
    stream: np.random.Generator,
    restarts: int = NUM_RESTARTS,
) -> Matching:
    """Order the units of ``other`` so that the sum of the correlations of matched units' activations is the largest.

    By readers' inputs on the same samples, as `record_reader_inputs` gives them. For a unit of several features, e.g. a head,
    its features' correlations are summed. ``before`` and ``after`` are mean correlations, in [−1, 1]. A unit that is constant
    on all samples correlates with none.

    Raises:
        AnalysisError: the activations hold numbers that are not finite.

    Source: Li et al., arXiv:1511.07543; Ainsworth et al., arXiv:2209.04836, section 3.1.
    """
    standardised = [
        {group.activations.tensor: _standardise(inputs[group.reader]) for group in groups} for inputs in (reference, other)
    ]
    first, second = standardised
    return _match(groups, lambda group: (group.activations,), first.__getitem__, second.__getitem__, stream, restarts)


def _standardise(values: Float[Tensor, "sample feature"]) -> Float[Tensor, "sample feature"]:
    """Each feature centred and of norm 1; constant ones are zero."""
    if not values.isfinite().all():
        raise AnalysisError("activations that hold NaN or infinity cannot be matched")
    centred = values.double() - values.double().mean(0)
    norms = torch.linalg.vector_norm(centred, dim=0)
    alive = norms > 1e-12 * values.double().abs().amax(0).clamp_min(1e-30) * len(values) ** 0.5
    return torch.where(alive, centred / norms.clamp_min(1e-300), 0.0)


_Places = Callable[[UnitGroup], Sequence[UnitPlace]]


def _match(
    groups: Sequence[UnitGroup], places: _Places, reference: Load, other: Load, stream: np.random.Generator, restarts: int
) -> Matching:
    stored = arrangement = Arrangement.as_stored(groups)
    inner_before = inner_after = square_reference = square_other = 0.0
    for component in connect_groups(groups, places):
        names = dict.fromkeys(place.tensor for group in component for place in places(group))
        fit = _Fit(component, places, {name: reference(name) for name in names}, {name: other(name) for name in names})
        found = fit.climb(stored, None)
        for _ in range(restarts if len(component) > 1 and not fit.is_highest(found[1]) else 0):
            start = stored
            for group in component:
                start = start.permute(group, torch.from_numpy(stream.permutation(group.num_units)))
            found = max(found, fit.climb(start, stream), key=lambda reached: reached[1])
        arrangement = Arrangement({**arrangement.index, **fit.own_part(found[0])})
        inner_before, inner_after = inner_before + fit.inner(stored), inner_after + found[1]
        square_reference += sum(float(tensor.double().square().sum()) for tensor in fit.reference.values())
        square_other += sum(float(tensor.double().square().sum()) for tensor in fit.other.values())
    norm = float(np.sqrt(square_reference * square_other)) or float("nan")
    return Matching(arrangement, inner_before / norm, inner_after / norm)


def connect_groups(groups: Sequence[UnitGroup], places: _Places = lambda group: group.places) -> list[list[UnitGroup]]:
    """The groups in sets that share no tensor: the orders of one set say nothing of another's."""
    sets: list[tuple[set[str], list[UnitGroup]]] = []
    for group in groups:
        tensors, joined = {place.tensor for place in places(group)}, [group]
        apart = []
        for known, members in sets:
            if known & tensors:
                tensors, joined = tensors | known, [*members, *joined]
            else:
                apart.append((known, members))
        sets = [*apart, (tensors, joined)]
    return [members for _, members in sets]


def choose_unrelated(starts: Sequence[int]) -> list[int] | None:
    """For each student another member, each once, who is neither its teacher's member nor the member at whose start it stands.

    ``starts``: for each student, whose reference it starts from. None where there are too few members: with every student at
    another member's start it takes three.
    """
    size = len(starts)
    members = np.arange(size)
    forbidden = (members[:, None] == members) | (np.asarray(starts)[:, None] == members)
    distance = (members - members[:, None]) % size  # of those that are allowed the next ones, so that the choice is told easily
    _, chosen = linear_sum_assignment(forbidden * float(size**2 + 1) + distance)
    return None if forbidden[members, chosen].any() else [int(member) for member in chosen]


class _Fit:
    """The objective Σ ⟨A, π(B)⟩ over the tensors of some groups, and its ascent, one group at a time."""

    def __init__(
        self, groups: Sequence[UnitGroup], places: _Places, reference: dict[str, Tensor], other: dict[str, Tensor]
    ) -> None:
        self._groups, self._places = groups, places
        self.reference, self.other = reference, other
        users: dict[str, set[str]] = {}
        for group in groups:
            for place in places(group):
                users.setdefault(place.tensor, set()).add(group.name)
        self._alone = {tensor for tensor, names in users.items() if len(names) == 1}
        norms = [torch.linalg.vector_norm(state[name].double()) for name in reference for state in (reference, other)]
        self._scale = float(sum(first * second for first, second in zip(norms[::2], norms[1::2], strict=True)))
        """No arrangement reaches more, by Cauchy and Schwarz."""
        if not np.isfinite(self._scale):
            raise AnalysisError(f"{', '.join(reference)}: units that hold NaN or infinity cannot be matched")
        self._fixed: dict[str, Float[np.ndarray, "unit unit"]] = {}
        """By group: ⟨A's unit, B's stored unit⟩ over the tensors that no other group orders, computed once."""

    def own_part(self, arrangement: Arrangement) -> dict[tuple[str, int], Tensor]:
        """The axes that these groups order."""
        axes = {place.key for group in self._groups for place in (*group.places, group.activations)}
        return {axis: order for axis, order in arrangement.index.items() if axis in axes}

    def is_highest(self, objective: float) -> bool:
        """Whether no arrangement can do better, but for rounding."""
        return objective >= (1 - _ROUNDING) * self._scale

    def inner(self, arrangement: Arrangement) -> float:
        """Σ ⟨A, π(B)⟩."""
        pairs = ((self.reference[name], arrangement.arrange(name, tensor)) for name, tensor in self.other.items())
        return sum(float((first.double() * second.double()).sum()) for first, second in pairs)

    def climb(self, start: Arrangement, stream: np.random.Generator | None) -> tuple[Arrangement, float]:
        """To a fixed point: the arrangement and its objective. Groups take turns in their order, or as ``stream`` draws it."""
        arrangement = start
        for _ in range(_MOST_SWEEPS):
            gained = False
            turns = range(len(self._groups)) if stream is None else stream.permutation(len(self._groups))
            for turn in turns:
                group = self._groups[turn]
                profit = self._profit(group, arrangement)
                rows, order = linear_sum_assignment(profit, maximize=True)
                if profit[rows, order].sum() > np.trace(profit) + _GAIN * self._scale:
                    arrangement, gained = arrangement.permute(group, torch.from_numpy(order)), True
            if not gained or len(self._groups) == 1:
                break
        return arrangement, self.inner(arrangement)

    def _profit(self, group: UnitGroup, arrangement: Arrangement) -> Float[np.ndarray, "unit unit"]:
        """⟨A's unit at place k, B's unit now at place l⟩, summed over everything that indexes them."""
        profit = np.zeros((group.num_units, group.num_units))
        alone = [place for place in self._places(group) if place.tensor in self._alone]
        if alone:
            if group.name not in self._fixed:
                products = [self._products(group, place, self.other[place.tensor]) for place in alone]
                self._fixed[group.name] = np.sum(products, axis=0)
            now = arrangement.index[alone[0].key][group.entries(alone[0])][:: alone[0].width]
            profit += self._fixed[group.name][:, ((now - alone[0].start) // alone[0].width).numpy()]
        for place in self._places(group):
            if place.tensor not in self._alone:
                profit += self._products(group, place, arrangement.arrange(place.tensor, self.other[place.tensor]))
        return profit

    def _products(self, group: UnitGroup, place: UnitPlace, other: Tensor) -> Float[np.ndarray, "unit unit"]:
        first, second = (
            tensor.movedim(place.axis, 0)[group.entries(place)].reshape(group.num_units, -1)
            for tensor in (self.reference[place.tensor], other)
        )
        return (first @ second.T).double().cpu().numpy()

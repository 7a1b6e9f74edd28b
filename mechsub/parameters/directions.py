"""Directions: signed sums of checkpoints of one member, and how one is read from the disk, dense or as factors."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.checkpoints import Factors
from mechsub.lineages import Lineage, Part

_ROUNDING = 1e-12
"""Of coefficients: a part that a direction holds as often with + as with − is not in it."""


@dataclass(frozen=True)
class Direction:
    """A signed sum of checkpoints of one member: a displacement, a difference of displacements, or θ₀ itself."""

    label: str
    terms: tuple[tuple[Lineage, int, float], ...]
    """(lineage, step, coefficient)."""


def displacement(lineage: Lineage, step: int) -> Direction:
    """Δθ = θ(step) − θ(0) of its own lineage."""
    return Direction(displacement_label(lineage.name, step), ((lineage, step, 1.0), (lineage, 0, -1.0)))


def origin_direction(lineage: Lineage) -> Direction:
    """θ(0) of a lineage."""
    return Direction(origin_label(lineage.name), ((lineage, 0, 1.0),))


def displacement_difference(first: Lineage, second: Lineage, step: int, second_step: int | None = None) -> Direction:
    """θ_first(step) − θ_second(second_step, or step): the difference of the displacements of two lineages with one origin.

    A direction of its own, since where the two are close, ⟨S, S⟩ − 2⟨S, C⟩ + ⟨C, C⟩ cancels to rounding in some tensors.
    """
    other = step if second_step is None else second_step
    return Direction(difference_label(first.name, second.name, step), ((first, step, 1.0), (second, other, -1.0)))


def displacement_label(lineage: str, step: int) -> str:
    """How a displacement is called in a `Gram`."""
    return f"Δ {lineage} @ {step}"


def origin_label(lineage: str) -> str:
    """How an origin is called in a `Gram`."""
    return f"θ₀ {lineage}"


def difference_label(first: str, second: str, step: int) -> str:
    """How a directly subtracted difference is called in a `Gram`."""
    return f"Δ {first} − Δ {second} @ {step}"


def sum_parts(direction: Direction, tensor: str) -> dict[Part, float]:
    """A direction in one tensor as a signed sum of stored weights and of what adapters add; what cancels is left out."""
    total: Counter[Part] = Counter()
    for lineage, step, sign in direction.terms:
        for part in lineage.parts(step, tensor):
            total[part] += sign  # type: ignore[assignment]  # counts of a Counter may be any number
    return {part: float(sign) for part, sign in total.items() if abs(sign) > _ROUNDING}


def load_dense(direction: Direction, tensor: str, member: int) -> Float[Tensor, "..."]:
    """One tensor of a direction of one member, whole; float32 at least. All zero where nothing is left of it."""
    found = [sign * part.load_whole(tensor, member) for part, sign in sum_parts(direction, tensor).items()]
    return sum(found[1:], found[0]) if found else torch.zeros(direction.terms[0][0].spec.tensors[tensor].shape)


def load_tensors(direction: Direction, tensors: Iterable[str], member: int) -> dict[str, Float[Tensor, "..."]]:
    """Several tensors of a direction of one member, by name; see `load_dense`."""
    return {tensor: load_dense(direction, tensor, member) for tensor in tensors}


def load_low_rank(direction: Direction, tensor: str, member: int) -> Factors | None:
    """The same as a product of two thin matrices in float64, where adapters are all there is; None where something is dense."""
    parts = sum_parts(direction, tensor)
    if not parts or any(part.kind != "factors" for part in parts):
        return None
    return sum_factors(parts, tensor, member)


def sum_factors(parts: Mapping[Part, float], tensor: str, member: int) -> Factors:
    """A signed sum of low-rank changes of one member as a product of two thin matrices in float64; one at least."""
    factors = [(part.load_factors(tensor, member), sign) for part, sign in parts.items()]
    return Factors(torch.cat([sign * one.rows for one, sign in factors], dim=1), torch.cat([one.columns for one, _ in factors]))

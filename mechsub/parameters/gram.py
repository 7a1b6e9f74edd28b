"""Gram matrices of directions, streamed: reading weights is the cost, so each checkpoint is read once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.errors import AnalysisError
from mechsub.lineages import Lineage, TensorInfo

CHUNK_BYTES = 128 << 20


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


@dataclass(frozen=True)
class Gram:
    """⟨dᵢ, dⱼ⟩ of every tensor: within each member in full, and of every direction with every member's anchor."""

    labels: tuple[str, ...]
    tensors: tuple[str, ...]
    within: Float[np.ndarray, "member tensor direction direction"]
    across: Float[np.ndarray, "member tensor direction anchor other"]
    """⟨dᵢ of member m, anchor of member n⟩; anchors are the teachers' displacements."""
    anchors: tuple[str, ...]


def stream_gram(
    directions: Sequence[Direction],
    tensors: dict[str, TensorInfo],
    anchors: Sequence[str],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    device: str = "cpu",
) -> Gram:
    """Accumulate the Gram matrices of ``directions`` over chunks of rows.

    Origins are subtracted before anything is multiplied; products are in the checkpoints' precision inside a chunk and
    summed in float64 across chunks. Memory is set by ``chunk_bytes`` (one chunk of all checkpoints of all members) and
    the number of directions, not by the model. Tied tensors count once. In the squared unit of the weights.

    Raises:
        AnalysisError: a lineage lacks one of the tensors, or has it in another shape.
    """
    labels = [direction.label for direction in directions]
    counted = {name: info for name, info in tensors.items() if info.tied_to is None}
    _check_layouts(directions, counted)
    num_members = directions[0].terms[0][0].spec.num_members
    size = len(directions)
    within = torch.zeros(num_members, len(counted), size, size, dtype=torch.float64)
    across = torch.zeros(num_members, len(counted), size, len(anchors), num_members, dtype=torch.float64)
    positions = [labels.index(anchor) for anchor in anchors]
    for index, (name, info) in enumerate(counted.items()):
        for start, stop in _row_chunks(info, len(_sources(directions)) * num_members, chunk_bytes):
            chunk = _load_chunk(directions, name, start, stop, device)
            within[:, index] += torch.bmm(chunk, chunk.transpose(1, 2)).double().cpu()
            for place, position in enumerate(positions):
                across[:, index, :, place] += (chunk @ chunk[:, position].T).double().cpu()
    return Gram(tuple(labels), tuple(counted), within.numpy(), across.numpy(), tuple(anchors))


def _load_chunk(
    directions: Sequence[Direction], tensor: str, start: int, stop: int, device: str
) -> Float[Tensor, "member direction weight"]:
    rows = {
        (lineage.name, step): lineage.load_rows(step, tensor, start, stop).flatten(1).to(device)
        for lineage, step in _sources(directions).values()
    }
    return torch.stack([_sum_terms(direction, rows) for direction in directions], dim=1)


def _sum_terms(direction: Direction, rows: dict[tuple[str, int], Tensor]) -> Float[Tensor, "member weight"]:
    first, *rest = (rows[lineage.name, step] * sign for lineage, step, sign in direction.terms)
    return sum(rest, first)


def _sources(directions: Sequence[Direction]) -> dict[tuple[str, int], tuple[Lineage, int]]:
    return {(lineage.name, step): (lineage, step) for direction in directions for lineage, step, _ in direction.terms}


def _row_chunks(info: TensorInfo, copies: int, chunk_bytes: int) -> list[tuple[int, int]]:
    row_bytes = copies * int(np.prod(info.shape[1:])) * 8
    rows = max(1, chunk_bytes // row_bytes)
    return [(start, min(start + rows, info.shape[0])) for start in range(0, info.shape[0], rows)]


def _check_layouts(directions: Sequence[Direction], tensors: dict[str, TensorInfo]) -> None:
    for lineage, _ in _sources(directions).values():
        for name, info in tensors.items():
            found = lineage.spec.tensors.get(name)
            if found is None or found.shape != info.shape:
                has = "lacks it" if found is None else f"has it as {found.shape}"
                raise AnalysisError(f"tensor {name} {info.shape}: lineage {lineage.name} {has}; such lineages are incomparable")

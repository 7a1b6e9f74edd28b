"""Gram matrices of directions, streamed: reading weights is the cost, so each checkpoint is read once.

What adapters add stays factored: for ΔW = R C, ⟨R₁C₁, R₂C₂⟩ = Σ (R₁ᵀR₂) ∘ (C₁C₂ᵀ), and against a dense D, Σ R ∘ (D Cᵀ). Neither
depends on how a product is split into its factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.checkpoints import Factors
from mechsub.errors import AnalysisError
from mechsub.lineages import Part
from mechsub.parameters.blocks import Block
from mechsub.parameters.directions import Direction, sum_parts

CHUNK_BYTES = 128 << 20


@dataclass(frozen=True)
class Gram:
    """⟨dᵢ, dⱼ⟩ of every tensor: within each member in full, and of every direction with every member's anchor."""

    labels: tuple[str, ...]
    blocks: tuple[str, ...]
    within: Float[np.ndarray, "member tensor direction direction"]
    across: Float[np.ndarray, "member tensor direction anchor other"]
    """⟨dᵢ of member m, anchor of member n⟩; anchors are the teachers' displacements."""
    anchors: tuple[str, ...]


def stream_gram(
    directions: Sequence[Direction],
    blocks: Sequence[Block],
    anchors: Sequence[str],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    device: str = "cpu",
) -> Gram:
    """Accumulate the Gram matrices of ``directions`` tensor by tensor.

    Stored weights are read in chunks of rows: origins are subtracted before anything is multiplied; products are in the
    checkpoints' precision (float32 at least) inside a chunk and summed in float64 across chunks. Low-rank changes are
    multiplied as factors, in float64. Memory is set by ``chunk_bytes`` (one chunk of all checkpoints of all members), the
    ranks and the number of directions, not by the model. Tied tensors count once. In the squared unit of the weights.

    Raises:
        AnalysisError: a lineage lacks one of the tensors, or has it in another shape.
    """
    labels = [direction.label for direction in directions]
    _check_layouts(directions, blocks)
    num_members = directions[0].terms[0][0].spec.num_members
    size = len(directions)
    within = torch.zeros(num_members, len(blocks), size, size, dtype=torch.float64)
    across = torch.zeros(num_members, len(blocks), size, len(anchors), num_members, dtype=torch.float64)
    positions = [labels.index(anchor) for anchor in anchors]
    for index, block in enumerate(blocks):
        split = _SplitDirections.of(directions, block.tensor)
        low_rank = [_LowRank.load(split, block, member, device) for member in range(num_members)] if split.factors else []
        totals = _Totals(within[:, index], across[:, index], positions)
        for start, stop in _row_chunks(block, len(split.dense) * num_members, chunk_bytes) if split.dense else ():
            chunk = split.load_chunk(block, start, stop, device)
            totals.add_dense(chunk, split.holders)
            totals.add_mixed(chunk, split.holders, low_rank, slice(start, stop))
        totals.add_low_rank(low_rank)
    return Gram(tuple(labels), tuple(block.name for block in blocks), within.numpy(), across.numpy(), tuple(anchors))


@dataclass(frozen=True)
class _SplitDirections:
    """The directions in one tensor as signed sums of parts: stored weights and changes (dense), and low-rank changes."""

    sums: Sequence[Mapping[Part, float]]
    dense: Sequence[Part]
    factors: Sequence[Part]

    @classmethod
    def of(cls, directions: Sequence[Direction], tensor: str) -> "_SplitDirections":
        sums = [sum_parts(direction, tensor) for direction in directions]
        parts = list(dict.fromkeys(part for total in sums for part in total))
        low_rank = [part for part in parts if part.kind == "factors"]
        return cls(sums, [part for part in parts if part.kind != "factors"], low_rank)

    @property
    def holders(self) -> list[int]:
        """The directions with a dense part."""
        dense = set(self.dense)
        return [number for number, total in enumerate(self.sums) if dense & total.keys()]

    def load_chunk(self, block: Block, start: int, stop: int, device: str) -> Float[Tensor, "member direction row column"]:
        """The dense part of the directions that have one."""
        first = block.start if block.axis == 0 else 0
        rows = {part: part.load_rows(block.tensor, first + start, first + stop).to(device) for part in self.dense}
        if block.axis == 1:
            rows = {part: found[:, :, block.index[1]] for part, found in rows.items()}
        chunk = torch.stack([_combine(self.sums[number], rows) for number in self.holders], dim=1)
        return chunk.flatten(3) if chunk.ndim > 3 else chunk[..., None]


@dataclass(frozen=True)
class _LowRank:
    """The low-rank part of all directions of one member: direction i is ``rows · diag(weights[i]) · columns``."""

    rows: Float[Tensor, "row rank"]
    columns: Float[Tensor, "rank column"]
    weights: Float[Tensor, "direction rank"]

    @classmethod
    def load(cls, split: _SplitDirections, block: Block, member: int, device: str) -> "_LowRank":
        factors = [_cut(part.load_factors(block.tensor, member), block) for part in split.factors]
        coefficients = torch.tensor([[total.get(part, 0.0) for part in split.factors] for total in split.sums])
        ranks = torch.tensor([one.rows.shape[1] for one in factors])
        return cls(
            torch.cat([one.rows for one in factors], dim=1).to(device),
            torch.cat([one.columns for one in factors]).to(device),
            coefficients.double().repeat_interleave(ranks, dim=1).to(device),
        )

    def only(self, directions: Sequence[int]) -> "_LowRank":
        """What of it some directions hold."""
        used = (self.weights[directions] != 0).any(0)
        return _LowRank(self.rows[:, used], self.columns[used], self.weights[directions][:, used])

    def inner(self, other: "_LowRank") -> Float[Tensor, "direction other"]:
        """⟨R₁C₁, R₂C₂⟩ = Σ (R₁ᵀR₂) ∘ (C₁C₂ᵀ) of all pairs."""
        products = (self.rows.T @ other.rows) * (self.columns @ other.columns.T)
        return self.weights @ products @ other.weights.T

    def inner_dense(self, dense: Float[Tensor, "holder row column"], rows: slice) -> Float[Tensor, "holder direction"]:
        """⟨D, RC⟩ = Σ R ∘ (D Cᵀ) over some rows."""
        products = dense @ self.columns.T.to(dense.dtype)
        return torch.einsum("hrk,rk->hk", products.double(), self.rows[rows]) @ self.weights.T


@dataclass(frozen=True)
class _Totals:
    """The Gram matrices of one tensor while they are summed."""

    within: Float[Tensor, "member direction direction"]
    across: Float[Tensor, "member direction anchor other"]
    anchors: Sequence[int]

    def add_dense(self, chunk: Float[Tensor, "member holder row column"], holders: Sequence[int]) -> None:
        """⟨D, D⟩ over one chunk."""
        flat = chunk.flatten(2)
        inside = torch.bmm(flat, flat.transpose(1, 2)).double().cpu()
        self.within[:, torch.tensor(holders)[:, None], torch.tensor(holders)] += inside
        for place, anchor in enumerate(self.anchors):
            if anchor in holders:
                self.across[:, holders, place] += (flat @ flat[:, holders.index(anchor)].T).double().cpu()

    def add_mixed(
        self,
        chunk: Float[Tensor, "member holder row column"],
        holders: Sequence[int],
        low_rank: Sequence[_LowRank],
        rows: slice,
    ) -> None:
        """⟨D, RC⟩ over one chunk, both ways round."""
        for other, factors in enumerate(low_rank):
            inside = factors.inner_dense(chunk[other], rows).cpu()
            self.within[other, holders] += inside
            self.within[other, :, holders] += inside.T
            own_anchors = factors.only(self.anchors)
            for member in range(len(low_rank)):
                self.across[member, holders, :, other] += own_anchors.inner_dense(chunk[member], rows).cpu()
                for place, anchor in enumerate(self.anchors):
                    if anchor in holders:
                        held = holders.index(anchor)
                        dense = chunk[other][held : held + 1]
                        self.across[member, :, place, other] += low_rank[member].inner_dense(dense, rows)[0].cpu()

    def add_low_rank(self, low_rank: Sequence[_LowRank]) -> None:
        """⟨RC, RC⟩."""
        for member, own in enumerate(low_rank):
            self.within[member] += own.inner(own).cpu()
            for other, factors in enumerate(low_rank):
                self.across[member, :, :, other] += own.inner(factors.only(self.anchors)).cpu()


def _combine(total: Mapping[Part, float], rows: Mapping[Part, Tensor]) -> Float[Tensor, "member row ..."]:
    first, *rest = (rows[part] * sign for part, sign in total.items() if part in rows)
    return sum(rest, first)


def _cut(factors: Factors, block: Block) -> Factors:
    if block.axis == 0:
        return Factors(factors.rows[block.index[0]], factors.columns)
    return Factors(factors.rows, factors.columns[:, block.index[1]])


def _row_chunks(info: Block, copies: int, chunk_bytes: int) -> list[tuple[int, int]]:
    row_bytes = copies * int(np.prod(info.shape[1:])) * 8
    rows = max(1, chunk_bytes // row_bytes)
    return [(start, min(start + rows, info.shape[0])) for start in range(0, info.shape[0], rows)]


def _check_layouts(directions: Sequence[Direction], blocks: Sequence[Block]) -> None:
    lineages = list(dict.fromkeys(lineage for direction in directions for lineage, _, _ in direction.terms))
    first = lineages[0]
    for lineage in lineages:
        for name in dict.fromkeys(block.tensor for block in blocks):
            wanted, found = first.spec.tensors[name], lineage.spec.tensors.get(name)
            if found is None or found.shape != wanted.shape:
                has = "lacks it" if found is None else f"has it as {found.shape}"
                raise AnalysisError(
                    f"tensor {name} {wanted.shape}: lineage {lineage.name} {has}; such lineages are incomparable"
                )

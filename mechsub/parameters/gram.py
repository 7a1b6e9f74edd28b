"""Gram matrices of directions, streamed: reading weights is the cost, so each checkpoint is read once.

Stored weights go through in chunks that stay in the processor's cache; what adapters add stays factored.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechsub.errors import AnalysisError
from mechsub.lineages import Part
from mechsub.parameters.blocks import Block
from mechsub.parameters.chunks import DenseChunks, cut_block
from mechsub.parameters.compiled import MOST_DIRECTIONS, PAYS_FROM_BYTES, contract, has_compiler
from mechsub.parameters.directions import Direction, sum_parts
from mechsub.parameters.low_rank import LowRank

CHUNK_BYTES = 64 << 20
WORKERS = 2
"""Tensors at a time: while one waits for the disk, the other is multiplied."""
_SUMMED = 4096
"""Numbers whose products are summed in their own precision before float64 takes over."""


@dataclass(frozen=True)
class NotFinite:
    """A checkpoint's tensor that holds NaN or ∞."""

    lineage: str
    step: int
    member: int
    """Of its own lineage."""
    tensor: str
    checkpoint: Path

    def __str__(self) -> str:
        return (
            f"tensor {self.tensor} of {self.lineage} at step {self.step}, member {self.member}, holds numbers that are not "
            f"finite ({self.checkpoint})"
        )


@dataclass(frozen=True)
class Gram:
    """⟨dᵢ, dⱼ⟩ of every block: within each member in full, and of every direction with every member's anchor."""

    labels: tuple[str, ...]
    blocks: tuple[str, ...]
    within: Float[np.ndarray, "member block direction direction"]
    """NaN where a checkpoint that a direction is made of holds numbers that are not finite; see ``not_finite``."""
    across: Float[np.ndarray, "member block direction anchor other"]
    """⟨dᵢ of member m, anchor of member n⟩; anchors are the teachers' displacements."""
    anchors: tuple[str, ...]
    rounding: Float[np.ndarray, "member block direction"]
    """The squared norm that rounding in storage alone would give a direction: Σ over its stored parts of coefficient² ·
    Σ_i ulp(θ_i)² / 12, as if every number lay anywhere between its two neighbours. ulp(θ) = 2^(⌊log₂|θ|⌋ − b), with b = 7 bits
    for bfloat16, 10 for float16, 23 for float32 and 52 for float64. The exponents are those of one stored part of each
    origin; of large tensors, those of evenly spaced rows of 2¹⁷ numbers together. Parts that cancel, low-rank factors and
    what DoRA changes add nothing."""
    not_finite: tuple[NotFinite, ...] = ()


def stream_gram(
    directions: Sequence[Direction],
    blocks: Sequence[Block],
    anchors: Sequence[str],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    device: str = "cpu",
    workers: int = WORKERS,
    compiled: bool | None = None,
) -> Gram:
    """Accumulate the Gram matrices of ``directions`` block by block, reading each tensor of each checkpoint once.

    Stored weights are read in chunks of rows: origins are subtracted before anything is multiplied; products are in the
    checkpoints' precision (float32 at least) inside a chunk and summed in float64 across chunks. Low-rank changes are
    multiplied as factors, in float64, and their base is not read unless a direction holds it. Memory is set by
    ``workers`` × ``chunk_bytes`` (a chunk is some rows, one at least, of all checkpoints of all members), the ranks and the
    number of directions, not by the model. A tensor, or a row of it in the compiled loop, is one
    worker's, so that their number changes no sum. In the squared
    unit of the weights. ``compiled``: whether a compiled loop does what it can; None: where it pays and a compiler is there.

    Raises:
        AnalysisError: a lineage lacks one of the tensors, has it in another shape, or in a type that is no float.
    """
    labels = [direction.label for direction in directions]
    _check_layouts(directions, blocks)
    num_members = directions[0].terms[0][0].spec.num_members
    size = len(directions)
    within = torch.zeros(num_members, len(blocks), size, size, dtype=torch.float64)
    positions = [labels.index(anchor) for anchor in anchors]
    across = torch.zeros(num_members, len(blocks), size, len(anchors), num_members, dtype=torch.float64)
    rounding = torch.zeros(num_members, len(blocks), size, dtype=torch.float64)
    by_tensor: dict[str, list[_BlockTotals]] = {}
    for index, block in enumerate(blocks):
        # Across its only member is within it.
        totals = _BlockTotals(
            block, within[:, index], across[:, index], rounding[:, index], positions if num_members > 1 else ()
        )
        by_tensor.setdefault(block.tensor, []).append(totals)
    large_first = sorted(by_tensor.values(), key=lambda found: -sum(totals.block.num_parameters for totals in found))
    with ThreadPoolExecutor(workers) as pool:
        if compiled is None:
            checkpoints = {(lineage.name, step) for direction in directions for lineage, step, _ in direction.terms}
            num_bytes = 2 * len(checkpoints) * sum(block.num_parameters for block in blocks)
            compiled = device == "cpu" and num_bytes >= PAYS_FROM_BYTES and has_compiler()
        stream = partial(_stream_tensor, directions, chunk_bytes, device, workers if compiled else 0)
        share_out = map if compiled else pool.map  # the compiled loop shares out the rows of each tensor
        not_finite = [record for records in share_out(stream, large_first) for record in records]
    if num_members == 1:
        across[..., 0] = within[..., positions]
    for tensor in (within, across):
        tensor[~tensor.isfinite()] = torch.nan
    names = tuple(block.name for block in blocks)
    arrays = within.numpy(), across.numpy(), tuple(anchors), rounding.numpy()
    return Gram(tuple(labels), names, *arrays, tuple(sorted(not_finite, key=str)))


def _stream_tensor(
    directions: Sequence[Direction],
    chunk_bytes: int,
    device: str,
    compiled_workers: int,
    totals: "Sequence[_BlockTotals]",
    wide: bool = False,
) -> list[NotFinite]:
    """Fill the totals of one tensor's blocks. What is not finite in it, which is looked for only where a norm is not."""
    tensor, num_members = totals[0].block.tensor, len(totals[0].within)
    sums = [sum_parts(direction, tensor) for direction in directions]
    chunks = DenseChunks(sums, tensor, device, wide)
    has_factors = any(part.kind == "factors" for total in sums for part in total)
    low_rank = [LowRank.load(sums, tensor, member, device) for member in range(num_members)] if has_factors else []
    cuts = [[factors.cut(one.block) for factors in low_rank] for one in totals]
    exponents = torch.zeros(len(totals), len(chunks.representatives), num_members, dtype=torch.float64)
    row_chunks = chunks.row_chunks(chunk_bytes)
    is_simple = chunks.is_plain and not has_factors and len(totals) == 1 and len(chunks.holders) <= MOST_DIRECTIONS
    if compiled_workers and is_simple:
        exponents[0] += _contract_compiled(chunks, totals[0], compiled_workers)
        row_chunks = []
    for start, stop in row_chunks:
        loaded = chunks.load(start, stop)
        for number, one in enumerate(totals):
            share, rows = cut_block(loaded, one.block, start, stop)
            exponents[number] += chunks.sum_exponents(share, rows.start + (one.block.start if one.block.axis == 0 else 0))
        combined = chunks.combine(loaded)
        for one, cut in zip(totals, cuts, strict=True):
            dense, rows = cut_block(combined, one.block, start, stop)
            one.add_dense(dense, chunks.holders)
            one.add_mixed(dense, chunks.holders, cut, rows)
    for one, cut, sizes in zip(totals, cuts, exponents, strict=True):
        one.add_low_rank(cut)
        if chunks.holders:
            one.rounding[:, chunks.holders] = chunks.rounding(sizes * chunks.exponent_share(one.block))
    spoilt = torch.stack([one.spoilt for one in totals]).any(0)
    found = find_spoiling(sums, tensor, spoilt)
    if spoilt.any() and not found and not wide:  # finite, but too large for products in float32
        for one in totals:
            one.clear()
        return _stream_tensor(directions, chunk_bytes, device, compiled_workers, totals, wide=True)
    return found


def _contract_compiled(chunks: DenseChunks, totals: "_BlockTotals", workers: int) -> Float[Tensor, "representative member"]:
    """Fill the totals of a tensor of one block by the compiled loop; the sums of its exponents."""
    place = torch.tensor(chunks.holders)
    totals.within[0, place[:, None], place] += contract(chunks.pattern, chunks.map_stored(), workers)
    return chunks.sum_stored_exponents()


@dataclass(frozen=True)
class _BlockTotals:
    """What is summed for one block."""

    block: Block
    within: Float[Tensor, "member direction direction"]
    across: Float[Tensor, "member direction anchor other"]
    rounding: Float[Tensor, "member direction"]
    anchors: Sequence[int]
    """Those whose products are summed across members."""

    @property
    def spoilt(self) -> Bool[Tensor, "member direction"]:
        """Where a squared norm is not finite."""
        return ~self.within.diagonal(dim1=1, dim2=2).isfinite()

    def clear(self) -> None:
        """Begin again."""
        for sums in (self.within, self.across, self.rounding):
            sums.zero_()

    def add_dense(self, dense: Float[Tensor, "member holder row column"], holders: Sequence[int]) -> None:
        """⟨D, D⟩ over one chunk."""
        flat = dense.flatten(2)
        inside = torch.stack([_multiply(rows, rows) for rows in flat]).cpu()
        self.within[:, torch.tensor(holders)[:, None], torch.tensor(holders)] += inside
        held = {place: holders.index(anchor) for place, anchor in enumerate(self.anchors) if anchor in holders}
        if held:
            anchors = flat[:, list(held.values())].flatten(0, 1)
            products = torch.stack([_multiply(rows, anchors).view(-1, len(flat), len(held)) for rows in flat]).cpu()
            index = torch.tensor(holders)[:, None], torch.tensor(list(held))
            self.across[:, index[0], index[1]] += products.transpose(2, 3)

    def add_mixed(
        self,
        dense: Float[Tensor, "member holder row column"],
        holders: Sequence[int],
        low_rank: Sequence[LowRank],
        rows: slice,
    ) -> None:
        """⟨D, RC⟩ over one chunk, both ways round."""
        for other, factors in enumerate(low_rank):
            inside = factors.inner_dense(dense[other], rows).cpu()
            self.within[other, holders] += inside
            self.within[other, :, holders] += inside.T
            if not self.anchors:
                continue
            own_anchors = factors.only(self.anchors)
            for member in range(len(low_rank)):
                self.across[member, holders, :, other] += own_anchors.inner_dense(dense[member], rows).cpu()
                for place, anchor in enumerate(self.anchors):
                    if anchor in holders:
                        held = holders.index(anchor)
                        anchored = dense[other][held : held + 1]
                        self.across[member, :, place, other] += low_rank[member].inner_dense(anchored, rows)[0].cpu()

    def add_low_rank(self, low_rank: Sequence[LowRank]) -> None:
        """⟨RC, RC⟩."""
        for member, own in enumerate(low_rank):
            self.within[member] += own.inner(own).cpu()
            for other, factors in enumerate(low_rank):
                if self.anchors:
                    self.across[member, :, :, other] += own.inner(factors.only(self.anchors)).cpu()


def _multiply(left: Float[Tensor, "row number"], right: Float[Tensor, "other number"]) -> Float[Tensor, "row other"]:
    """The inner products of rows, in float64: products and sums in the rows' precision over `_SUMMED` numbers at a time.

    One float32 sum over a whole chunk would be wrong by 1e-4: it adds small products to a large sum.
    """
    whole = left.shape[1] - left.shape[1] % _SUMMED
    segments = [rows[:, :whole].reshape(len(rows), -1, _SUMMED).transpose(0, 1) for rows in (left, right)]
    products = torch.bmm(segments[0], segments[1].transpose(1, 2)).double().sum(0)
    return products + (left[:, whole:] @ right[:, whole:].T).double()


def find_spoiling(
    sums: Sequence[Mapping[Part, float]], tensor: str, spoilt: Bool[Tensor, "member direction"]
) -> list[NotFinite]:
    """The checkpoints whose numbers spoil directions, which are sums of parts; only those of spoilt ones are read again."""
    return find_not_finite({(part, member) for member, number in spoilt.nonzero().tolist() for part in sums[number]}, tensor)


def find_not_finite(parts: Iterable[tuple[Part, int]], tensor: str) -> list[NotFinite]:
    """Which of these parts, each of one member, or what they are computed from, are not finite in a tensor."""
    suspects = {part.locate(member) for part, member in parts}
    for part, member in [suspect for suspect in suspects if suspect[0].kind == "change"]:
        base = part.lineage.parts(0, tensor)[0]  # which it is computed from
        suspects.add((base, base.members[member]))
    return list({record for part, member in suspects if (record := check_finite(part, tensor, member)) is not None})


def check_finite(part: Part, tensor: str, member: int) -> NotFinite | None:
    """Whether one tensor of a part on disk, of one member of its lineage, holds NaN or ∞; it is read."""
    if part.lineage.is_finite(part, tensor, member):
        return None
    return NotFinite(part.name, part.step, member, tensor, part.lineage.checkpoint(part.step, member))


def describe_not_finite(records: Iterable[NotFinite]) -> list[str]:
    """A sentence for each checkpoint's tensor, each once."""
    sentences = (f"Not finite: {record}; every number that it would enter is NaN with that reason." for record in records)
    return list(dict.fromkeys(sentences))


def _check_layouts(directions: Sequence[Direction], blocks: Sequence[Block]) -> None:
    lineages = list(dict.fromkeys(lineage for direction in directions for lineage, _, _ in direction.terms))
    for block in blocks:
        first = lineages[0].spec.tensors.get(block.tensor)
        for lineage in lineages:
            found = lineage.spec.tensors.get(block.tensor)
            if found is None or first is None or found.shape != first.shape or not _fits(block, found.shape):
                has = "lacks it" if found is None else f"has it as {found.shape}"
                raise AnalysisError(
                    f"tensor {block.name} {block.shape}: lineage {lineage.name} {has}; such lineages are incomparable"
                )


def _fits(block: Block, shape: tuple[int, ...]) -> bool:
    if block.name == block.tensor:
        return block.shape == shape
    whole = list(shape)
    whole[block.axis] = block.shape[block.axis]
    return block.shape == tuple(whole) and block.start + block.shape[block.axis] <= shape[block.axis]

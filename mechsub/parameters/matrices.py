"""The matrices of a model, their directions' spectra read one tensor at a time, and means over several matrices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsub.checkpoints import Factors, TensorInfo, as_computed
from mechsub.parameters.alignment import MODEL
from mechsub.parameters.blocks import Block, list_blocks
from mechsub.parameters.directions import Direction, load_low_rank, sum_parts
from mechsub.parameters.subspaces import OK, Spectrum, decompose_dense, decompose_low_rank
from mechsub.streams import random_stream

_BYTES_AT_ONCE = 256 << 20
"""Members of a tensor are read and decomposed together up to this size in float64; above it one by one."""


@dataclass(frozen=True)
class Matrix:
    """A block with two dimensions, read as [out, in] whichever way it is stored."""

    block: Block
    transposed: bool

    @property
    def name(self) -> str:
        """The block's."""
        return self.block.name

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, columns = self.block.shape
        return (columns, rows) if self.transposed else (rows, columns)

    def cut(self, tensor: Float[Tensor, "member row column"]) -> Float[Tensor, "member out in"]:
        """What of a tensor it is."""
        own = tensor[(slice(None), *self.block.index)]
        return own.mT if self.transposed else own

    def cut_factors(self, factors: Factors) -> Factors:
        """The same of a product of two thin matrices."""
        index = self.block.index[self.block.axis]
        rows, columns = factors.rows, factors.columns
        rows, columns = (rows[index], columns) if self.block.axis == 0 else (rows, columns[:, index])
        return Factors(columns.mT, rows.mT) if self.transposed else Factors(rows, columns)


def list_matrices(tensors: Mapping[str, TensorInfo]) -> list[Matrix]:
    """The blocks that have singular subspaces: two dimensions, neither of them 1."""
    blocks = [block for block in list_blocks(tensors) if len(block.shape) == 2 and min(block.shape) > 1]
    return [Matrix(block, tensors[block.tensor].transposed) for block in blocks]


def load_spectrum(direction: Direction, matrix: Matrix, top: int, *, seed: int, device: str = "cpu") -> Spectrum:
    """The spectrum of a direction in one matrix, of all members.

    What adapters add is decomposed from its factors and never multiplied out. Stored weights are subtracted first; their
    rounding, uniform over the spacing of the stored type at each weight, could make singular values up to about
    sd · (√out + √in), which then do not count for the rank. Sketches of large matrices draw from streams of their own,
    named by direction, matrix and member.
    """
    num_members = direction.terms[0][0].spec.num_members
    tensor = matrix.block.tensor
    if not sum_parts(direction, tensor):
        return _zero(matrix, num_members, top, device)
    if load_low_rank(direction, tensor, 0) is not None:
        return Spectrum.join(
            [
                decompose_low_rank(_move(matrix.cut_factors(factors), device), top)
                for factors in (load_low_rank(direction, tensor, member) for member in range(num_members))
                if factors is not None
            ]
        )
    found = []
    for members, whole, noise in _load_members(direction, tensor, num_members):
        streams = [random_stream(seed, "sketch", direction.label, matrix.name, member) for member in members]
        own = matrix.cut(whole.to(device))
        bound = noise * (np.sqrt(matrix.shape[0]) + np.sqrt(matrix.shape[1]))
        found.append(decompose_dense(own, top, noise=bound.to(device), streams=streams))
    return Spectrum.join(found)


def _load_members(
    direction: Direction, tensor: str, num_members: int
) -> Iterator[tuple[Sequence[int], Float[Tensor, "member row column"], Float[Tensor, " member"]]]:
    """(members, their tensor of the direction, the standard deviation of its rounding), all at once where they are small."""
    shape = direction.terms[0][0].spec.tensors[tensor].shape
    at_once = int(np.prod(shape)) * 8 * num_members <= _BYTES_AT_ONCE
    parts = {part: (sign, part.open_rows(tensor)) for part, sign in sum_parts(direction, tensor).items()}
    for members in [range(num_members)] if at_once else [[member] for member in range(num_members)]:
        total, variance = torch.zeros(len(members), *shape), torch.zeros(len(members), dtype=torch.float64)
        for part, (sign, readers) in parts.items():
            stored = torch.stack([readers[member](0, shape[0]) for member in members])
            total = total + sign * as_computed(stored)
            if part.kind == "stored":
                spacing = torch.finfo(stored.dtype).eps  # between neighbouring numbers, as a share of the number
                variance += (sign * spacing) ** 2 / 12 * as_computed(stored).double().square().mean((1, 2))
        yield list(members), total, variance.sqrt()


def _move(factors: Factors, device: str) -> Factors:
    return Factors(factors.rows.to(device), factors.columns.to(device))


def _zero(matrix: Matrix, num_members: int, top: int, device: str) -> Spectrum:
    """Of a direction that holds nothing of a matrix."""
    nothing = torch.zeros(1, 1, 1, dtype=torch.float64, device=device)
    left, right = (nothing.expand(num_members, length, top) for length in matrix.shape)
    none = nothing[0, 0].expand(num_members)
    return Spectrum(nothing[0].expand(num_members, 1), left, right, none, none, none, True)


@dataclass(frozen=True)
class MatrixScopes:
    """What numbers are given for: each matrix, and plain means over the matrices of a layer, of a module kind, of the model."""

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """``matrix``, ``layer``, ``module kind`` or ``model``."""
    groups: Bool[np.ndarray, "scope matrix"]

    @classmethod
    def of(cls, matrices: Sequence[Matrix]) -> "MatrixScopes":
        """Of a model's matrices."""
        layers, kinds = ([getattr(matrix.block, name) for matrix in matrices] for name in ("layer", "kind"))
        rows = list(np.eye(len(matrices), dtype=bool))
        rows += [np.array(layers) == layer for layer in dict.fromkeys(layers)]
        rows += [np.array(kinds) == kind for kind in dict.fromkeys(kinds)]
        rows += [np.ones(len(matrices), dtype=bool)]
        return cls(
            (
                *(matrix.name for matrix in matrices),
                *dict.fromkeys(layers),
                *(f"every {kind}" for kind in dict.fromkeys(kinds)),
                MODEL,
            ),
            (*["matrix"] * len(matrices), *["layer"] * len(set(layers)), *["module kind"] * len(set(kinds)), "model"),
            np.stack(rows),
        )


def average_groups(
    values: Float[np.ndarray, "..."], codes: Int[np.ndarray, "..."], groups: Bool[np.ndarray, "group entry"], axis: int
) -> tuple[Float[np.ndarray, "..."], Int[np.ndarray, "..."]]:
    """Plain means over groups of the entries of one axis, of those that have a value (code 0), with their codes.

    A mean of nothing is NaN with the largest code of the group's entries.
    """
    values, codes = np.moveaxis(values, axis, -1), np.moveaxis(codes, axis, -1)
    known = codes == OK
    counts = known.astype(float) @ groups.T
    sums = np.where(known, values, 0.0) @ groups.T
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    worst = np.stack([codes[..., group].max(-1) for group in groups], axis=-1)
    found = np.where(counts > 0, OK, worst).astype(np.int8)
    return np.moveaxis(means, -1, axis), np.moveaxis(found, -1, axis)

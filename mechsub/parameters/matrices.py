"""The matrices of a model, their directions' spectra read one tensor at a time, and means over several matrices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsub.checkpoints import Factors, TensorInfo
from mechsub.lineages import Part, RowReader
from mechsub.parameters.alignment import group_blocks
from mechsub.parameters.blocks import Block, list_blocks
from mechsub.parameters.directions import Direction, sum_factors, sum_parts
from mechsub.parameters.subspaces import (
    EXACT_UP_TO,
    NOT_FINITE,
    OK,
    Products,
    Spectrum,
    decompose_dense,
    decompose_low_rank,
    decompose_products,
)
from mechsub.streams import random_stream

_BYTES_AT_ONCE = 256 << 20
"""Members of a tensor are read and decomposed together up to this size in float64; above it one by one."""
_SKETCHED_BYTES = 32 << 20
"""Rows in float64 that are multiplied at a time where a matrix is too large to be held."""


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

    Memory: a matrix with at most `EXACT_UP_TO` rows or columns is held once in float64 (8 bytes a number), of all members
    together up to 256 MiB. A larger one is read 32 MiB at a time for each of the sketch's products, of which it holds
    (out + in) × (``top`` + `OVERSAMPLING`) numbers each.
    """
    num_members = direction.terms[0][0].spec.num_members
    tensor = matrix.block.tensor
    parts = sum_parts(direction, tensor)
    if not parts:
        return _zero(matrix, num_members, top, device)
    if all(part.kind == "factors" for part in parts):
        factors = (_cut_sum(parts, matrix, member, device) for member in range(num_members))
        return Spectrum.join([decompose_low_rank(one, top) for one in factors])
    readers = {part: part.open_rows(tensor) for part in parts if part.kind != "factors"}
    at_once = matrix.block.num_parameters * 8 * num_members <= _BYTES_AT_ONCE
    found = []
    for members in [range(num_members)] if at_once else [range(member, member + 1) for member in range(num_members)]:
        rows = _Rows(matrix, parts, readers, members, device)
        if min(matrix.shape) > EXACT_UP_TO:
            streams = [random_stream(seed, "sketch", direction.label, matrix.name, member) for member in members]
            found += [rows.only(member).sketch(top, stream) for member, stream in zip(members, streams, strict=True)]
        else:
            found.append(rows.decompose(top))
    return Spectrum.join(found)


@dataclass(frozen=True)
class _Rows:
    """A direction in one matrix of some members, read a few rows at a time; rows are those of the stored tensor."""

    matrix: Matrix
    parts: Mapping[Part, float]
    readers: Mapping[Part, Sequence[RowReader]]
    """Of the parts that are no factors, for all members."""
    members: range
    device: str

    def only(self, member: int) -> "_Rows":
        """Of one member."""
        return replace(self, members=range(member, member + 1))

    def decompose(self, top: int) -> Spectrum:
        """Whole, in float64."""
        num_rows = self.matrix.block.shape[0]
        whole, variances = self._load(0, num_rows)
        for place, member in enumerate(self.members):
            if (factors := self._load_factors(member)) is not None:
                whole[place] += factors.rows @ factors.columns
        whole = whole.mT if self.matrix.transposed else whole
        return decompose_dense(whole, top, noise=self._bound(variances))

    def sketch(self, top: int, stream: np.random.Generator) -> Spectrum:
        """Of one member, from products with thin matrices; low-rank changes stay factored."""
        num_rows, num_columns = self.matrix.block.shape
        step = max(1, _SKETCHED_BYTES // (8 * num_columns))
        spans = [(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
        factors = self._load_factors(self.members[0])

        def times(thin: Tensor) -> Tensor:
            found = torch.cat([self._load(*span)[0][0] @ thin for span in spans])
            return found if factors is None else found + factors.rows @ (factors.columns @ thin)

        def transposed_times(thin: Tensor) -> Tensor:
            found = thin.new_zeros(num_columns, thin.shape[1])
            for start, stop in spans:
                found += self._load(start, stop)[0][0].mT @ thin[start:stop]
            return found if factors is None else found + factors.columns.mT @ (factors.rows.mT @ thin)

        square, variances = self._sum_squares(spans, factors)
        shape = (num_rows, num_columns)
        products = Products(shape, times, transposed_times, square)
        if self.matrix.transposed:
            products = Products(shape[::-1], transposed_times, times, square)
        return decompose_products(products, top, stream, self._bound(variances)[0])

    def _sum_squares(self, spans: Sequence[tuple[int, int]], factors: Factors | None) -> tuple[Tensor, Tensor]:
        """(‖ΔW‖², the mean variance of the rounding) of one member."""
        square, variances = torch.zeros((), dtype=torch.float64, device=self.device), torch.zeros(1, dtype=torch.float64)
        for start, stop in spans:
            rows, own = self._load(start, stop)
            variances += own * (stop - start) / self.matrix.block.shape[0]
            whole = rows[0] if factors is None else rows[0] + factors.rows[start:stop] @ factors.columns
            square += torch.linalg.vector_norm(whole).square()
        return square, variances

    def _load(self, start: int, stop: int) -> tuple[Float[Tensor, "member row column"], Float[Tensor, " member"]]:
        """(some rows of the block without its low-rank changes, the mean variance of their rounding)."""
        block = self.matrix.block
        first = block.start if block.axis == 0 else 0
        columns = slice(None) if block.axis == 0 else block.index[1]
        total = torch.zeros(len(self.members), stop - start, block.shape[1], dtype=torch.float64)
        variances = torch.zeros(len(self.members), dtype=torch.float64)
        for part, readers in self.readers.items():
            rows = [readers[member](first + start, first + stop)[:, columns] for member in self.members]
            stored = rows[0][None] if len(rows) == 1 else torch.stack(rows)
            total.add_(stored, alpha=self.parts[part])
            if part.kind == "stored":
                spacing = torch.finfo(stored.dtype).eps  # between neighbouring numbers, as a share of the number
                squares = torch.linalg.vector_norm(stored, dim=(1, 2), dtype=torch.float64).square()
                variances += (self.parts[part] * spacing) ** 2 / 12 * squares / stored[0].numel()
        return total.to(self.device), variances

    def _load_factors(self, member: int) -> Factors | None:
        """What adapters add to the block of one member, as it is stored."""
        low_rank = {part: sign for part, sign in self.parts.items() if part.kind == "factors"}
        return _cut_sum(low_rank, replace(self.matrix, transposed=False), member, self.device) if low_rank else None

    def _bound(self, variances: Float[Tensor, " member"]) -> Float[Tensor, " member"]:
        """The singular value that rounding could make."""
        shape = self.matrix.shape
        return (variances.sqrt() * float(np.sqrt(shape[0]) + np.sqrt(shape[1]))).to(self.device)


def _cut_sum(parts: Mapping[Part, float], matrix: Matrix, member: int, device: str) -> Factors:
    """The low-rank changes of one member in a matrix."""
    factors = matrix.cut_factors(sum_factors(parts, matrix.block.tensor, member))
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
        """Of a model's matrices, by the rule of `mechsub.parameters.alignment.Scopes`."""
        sets = group_blocks([matrix.block for matrix in matrices], "matrix")
        groups = np.array([[matrix.name in held for matrix in matrices] for held in sets.values()])
        return cls(tuple(name for name, _ in sets), tuple(kind for _, kind in sets), groups)


def average_groups(
    values: Float[np.ndarray, "..."], codes: Int[np.ndarray, "..."], groups: Bool[np.ndarray, "group entry"], axis: int
) -> tuple[Float[np.ndarray, "..."], Int[np.ndarray, "..."]]:
    """Plain means over groups of the entries of one axis, of those that have a value (code 0), with their codes.

    A mean of nothing is NaN with the largest code of the group's entries. An entry that is not finite spoils the groups that
    it lies in: without it, members would be averaged over different entries.
    """
    values, codes = np.moveaxis(values, axis, -1), np.moveaxis(codes, axis, -1)
    known = codes == OK
    spoilt = (codes == NOT_FINITE).astype(float) @ groups.T > 0
    counts = np.where(spoilt, 0.0, known.astype(float) @ groups.T)
    sums = np.where(known, values, 0.0) @ groups.T
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    worst = np.stack([codes[..., group].max(-1) for group in groups], axis=-1)
    found = np.where(counts > 0, OK, np.where(spoilt, NOT_FINITE, worst)).astype(np.int8)
    return np.moveaxis(means, -1, axis), np.moveaxis(found, -1, axis)

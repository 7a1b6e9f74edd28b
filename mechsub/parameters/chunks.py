"""Chunks: some rows of one tensor of many checkpoints, each number read once, and the directions' dense parts made of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.errors import AnalysisError
from mechsub.lineages import Origin, Part, RowReader
from mechsub.parameters.blocks import Block
from mechsub.parameters.compiled import Pattern

_MANTISSA_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
_EXPONENT_MASK = {torch.float32: 0x7F800000, torch.float64: 0x7FF0000000000000}
_SAME_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}
_SMALLEST_FLOAT16 = 2.0**-14
"""Below it numbers of float16 have no smaller steps."""
_IN_THE_CACHE = 1 << 19
"""Numbers of one part in a chunk on a CPU: more would go to the memory and back between subtraction and product, and fewer
would be done sooner than they are asked for."""
_EXPONENTS_OF, _FEWEST_ROWS = 1 << 17, 64
"""Of a larger tensor, the exponents of evenly spaced rows that hold so many numbers stand for all; of few rows, each counts."""

Dtypes = tuple[torch.dtype, ...]


class DenseChunks:
    """The dense parts of directions in one tensor, a few rows at a time.

    A chunk has a slot for every direction that holds a dense part, then one for every part that needs a place of its own. A
    part that only one direction holds is read into that direction's slot, and the rest is added there.
    """

    def __init__(self, sums: Sequence[Mapping[Part, float]], tensor: str, device: str, wide: bool) -> None:
        dense = [{part: sign for part, sign in total.items() if part.kind != "factors"} for total in sums]
        self.holders = [number for number, total in enumerate(dense) if total]
        """The directions with a dense part."""
        self._sums = [dense[number] for number in self.holders]
        self._tensor, self._device = tensor, device
        self._place_parts()
        some = next(iter(self._slots), None)
        self._shape = () if some is None else some.lineage.spec.tensors[tensor].shape
        self._num_members = 0 if some is None else len(some.members)
        self._stride = _choose_stride(self._shape)
        self._readers: dict[Part, list[RowReader]] = {part: part.open_rows(tensor) for part in self._slots}
        self._dtypes = {part: self._stored_dtypes(part) for part in self._slots if part.kind == "stored"}
        stored = {dtype for dtypes in self._dtypes.values() for dtype in dtypes}
        self._dtype = torch.float64 if wide or torch.float64 in stored else torch.float32
        self._buffer = torch.empty(0, dtype=self._dtype, device=device)
        self.exponents_of = {part: (_origin_of(part), dtypes) for part, dtypes in self._dtypes.items()}
        """Parts with one origin, stored in one type, have numbers of one size, so that the exponents of one serve for all."""
        first = {key: part for part, key in reversed(self.exponents_of.items())}
        self.representatives = [(key, first[key]) for key in dict.fromkeys(self.exponents_of.values())]

    def _place_parts(self) -> None:
        counts = Counter(part for total in self._sums for part in total)
        homes: dict[Part, int] = {}
        for place, total in enumerate(self._sums):
            free = (part for part, sign in total.items() if sign == 1 and part not in homes)
            home = next((part for part in free if len(total) == 1 or counts[part] == 1), None)
            if home is not None:
                homes[home] = place
        rest = [part for part in counts if part not in homes]
        self._slots = homes | {part: len(self._sums) + number for number, part in enumerate(rest)}
        self._num_slots = len(self._sums) + len(rest)

    def _stored_dtypes(self, part: Part) -> Dtypes:
        """Of each member."""
        dtypes = tuple(read(0, 0).dtype for read in self._readers[part])
        unknown = next((dtype for dtype in dtypes if dtype not in _MANTISSA_BITS), None)
        if unknown is not None:
            raise AnalysisError(
                f"tensor {self._tensor} of {part.name} is stored as {unknown}, which no displacement is taken of"
            )
        return dtypes

    def row_chunks(self, chunk_bytes: int) -> list[tuple[int, int]]:
        """Rows [start, stop) that fit into ``chunk_bytes`` together; one row at least. None where nothing is dense."""
        if not self._sums:
            return []
        num_rows, row_size = self._shape[0], int(np.prod(self._shape[1:]))
        numbers = chunk_bytes // (self._num_members * (self._num_slots + 1) * self._dtype.itemsize)
        if torch.device(self._device).type == "cpu":
            numbers = min(numbers, _IN_THE_CACHE)
        rows = max(1, numbers // row_size)
        return [(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]

    def load(self, start: int, stop: int) -> Float[Tensor, "member slot row column"]:
        """Rows of every part in its slot, in float32 or wider; valid until the next call."""
        width = int(np.prod(self._shape[1:]))
        size = self._num_members * self._num_slots * (stop - start) * width
        if len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=self._dtype, device=self._device)
        chunk = self._buffer[:size].view(self._num_members, self._num_slots, stop - start, width)
        seen: dict[tuple[str, int, str, int], Tensor] = {}
        for part, slot in self._slots.items():
            for member, source in enumerate(part.members):
                target, key = chunk[member, slot], (part.name, part.step, part.kind, source)
                if key in seen:
                    target.copy_(seen[key])
                    continue
                rows = self._readers[part][member](start, stop)
                # Pinned memory is handed out again only when the copy has ended.
                rows = rows.pin_memory().to(self._device, non_blocking=True) if target.is_cuda else rows
                seen[key] = target.copy_(rows.reshape(target.shape))
        return chunk

    @property
    def is_plain(self) -> bool:
        """Whether all is stored by one member in float32 or less, so that a compiled contraction can read it."""
        return self._num_members == 1 and self._dtype == torch.float32 and len(self._dtypes) == len(self._slots)

    @property
    def pattern(self) -> Pattern:
        """The directions that hold something as sums of the parts, in the order in which `load_stored` gives these."""
        numbers = {part: number for number, part in enumerate(self._slots)}
        return tuple(tuple((numbers[part], sign) for part, sign in total.items()) for total in self._sums)

    def map_stored(self) -> list[Float[Tensor, " number"]]:
        """The whole tensor of every part of the one member as it is stored, flat; mapped, not read."""
        return [self._readers[part][0](0, self._shape[0]).reshape(-1) for part in self._slots]

    def sum_stored_exponents(self) -> Float[Tensor, "representative member"]:
        """What `sum_exponents` gives over the whole tensor, of rows that are not loaded."""
        totals = torch.zeros(len(self.representatives), 1, dtype=torch.float64)
        for number, ((_, dtypes), part) in enumerate(self.representatives):
            rows = self._readers[part][0](0, self._shape[0])[:: self._stride].to(self._dtype)
            totals[number, 0] = self._sum_powers(rows, dtypes[0], torch.empty_like(rows))
        return totals

    def combine(self, chunk: Float[Tensor, "member slot row column"]) -> Float[Tensor, "member holder row column"]:
        """The signed sums of the loaded parts, in place: the first slots are now the directions."""
        for place, total in enumerate(self._sums):
            target = chunk[:, place]
            terms = [(self._slots[part], sign) for part, sign in total.items()]
            if place not in (slot for slot, _ in terms):
                slot, sign = terms.pop(0)
                torch.mul(chunk[:, slot], sign, out=target)
            for slot, sign in terms:
                if slot != place:
                    target.add_(chunk[:, slot], alpha=sign)
        return chunk[:, : len(self._sums)]

    def sum_exponents(
        self, chunk: Float[Tensor, "member slot row column"], first: int
    ) -> Float[Tensor, "representative member"]:
        """Σ 4^⌊log₂|θ|⌋ of the loaded rows, or of a block's share of them, of each representative part; 0 has no exponent.

        Of large tensors only evenly spaced rows are looked at, counted from the tensor's first whatever the chunks are;
        ``first`` is the number of the chunk's first row. See `exponent_share`.
        """
        chunk = chunk[:, :, -first % self._stride :: self._stride]
        totals = torch.zeros(len(self.representatives), self._num_members, dtype=torch.float64)
        powers = torch.empty_like(chunk[0, 0], memory_format=torch.contiguous_format)
        for number, ((_, dtypes), part) in enumerate(self.representatives):
            for member, dtype in enumerate(dtypes):
                totals[number, member] = self._sum_powers(chunk[member, self._slots[part]], dtype, powers)
        return totals

    def _sum_powers(self, rows: Tensor, dtype: torch.dtype, powers: Tensor) -> float:
        """Σ 4^⌊log₂|θ|⌋; ``powers`` is room for them."""
        bits = rows.view(_SAME_BITS[self._dtype])
        torch.bitwise_and(bits, _EXPONENT_MASK[self._dtype], out=powers.view(bits.dtype))
        if dtype == torch.float16:
            powers.clamp_(min=_SMALLEST_FLOAT16)
        flat = powers.view(-1)
        total = float(torch.dot(flat, flat))
        if not np.isfinite(total):  # NaN and ∞ have the largest exponent
            total = float(powers.masked_fill(powers.isinf(), 0).square().sum(dtype=torch.float64))
        return total

    def exponent_share(self, block: Block) -> float:
        """Rows of a block over those of them whose exponents are summed."""
        if block.axis == 1:
            return block.shape[0] / len(range(0, block.shape[0], self._stride))
        first = block.start + -block.start % self._stride
        return block.shape[0] / max(len(range(first, block.start + block.shape[0], self._stride)), 1)

    def rounding(self, exponents: Float[Tensor, "representative member"]) -> Float[Tensor, "member holder"]:
        """Σ over a direction's stored parts of coefficient² · Σ_i ulp(θ_i)² / 12; see `Gram.rounding`."""
        places = {key: number for number, (key, _) in enumerate(self.representatives)}
        floors = torch.zeros(self._num_members, len(self._sums), dtype=torch.float64)
        for holder, total in enumerate(self._sums):
            for part in total.keys() & self._dtypes.keys():
                steps = torch.tensor([4.0 ** -_MANTISSA_BITS[dtype] for dtype in self._dtypes[part]], dtype=torch.float64)
                floors[:, holder] += total[part] ** 2 * steps * exponents[places[self.exponents_of[part]]] / 12
        return floors


def cut_block(chunk: Tensor, block: Block, start: int, stop: int) -> tuple[Tensor, slice]:
    """A block's share of the rows [start, stop) of its tensor, and which of the block's rows these are; it may be empty."""
    if block.axis == 1:
        return chunk[..., block.index[1]], slice(start, stop)
    low, high = max(start, block.start), min(stop, block.start + block.shape[0])
    high = max(low, high)
    return chunk[..., low - start : high - start, :], slice(low - block.start, high - block.start)


def _choose_stride(shape: tuple[int, ...]) -> int:
    """Between the rows whose exponents are looked at."""
    return max(1, min(int(np.prod(shape)) // _EXPONENTS_OF, shape[0] // _FEWEST_ROWS)) if shape else 1


def _origin_of(part: Part) -> Origin:
    """Where each member of a part comes from."""
    origin = part.lineage.spec.origin
    return replace(origin, members=tuple(origin.members[member] for member in part.members))

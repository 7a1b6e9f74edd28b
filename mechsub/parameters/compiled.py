"""A compiled contraction: stored numbers are converted, subtracted and multiplied in one pass, where models are large.

Eager calls go over each chunk once for every conversion, difference and product. The compiled loop goes once, several times as
fast; compiling it takes about ten seconds, and nothing where it was done before on this machine.
"""

import inspect
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

PAYS_FROM_BYTES = 16 << 30
"""Bytes to read from which the time that compiling takes comes back."""
MOST_DIRECTIONS = 8
"""The loop grows with the square of their number."""
_COLUMNS = 4096
"""Of a row. Sums run in float32 along a row and in float64 over rows, so that their length does not cost digits."""
_FEWEST_ROWS = 16
"""Fewer are not worth a call."""

Pattern = tuple[tuple[tuple[int, float], ...], ...]
"""Each direction as (number of a part, coefficient)."""


def has_compiler() -> bool:
    """Whether this machine can compile for its processor."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name)


def contract(
    pattern: Pattern, parts: Sequence[Float[Tensor, " number"]], workers: int = 1
) -> Float[Tensor, "direction direction"]:
    """⟨dᵢ, dⱼ⟩ of directions that are signed sums of parts; products in float32, sums over rows of numbers in float64.

    ``parts``: equally long, in any stored type. What does not fill a row is done eagerly. No row's sum is shared among
    ``workers``, so that their number changes no bit.
    """
    num_rows = len(parts[0]) // _COLUMNS
    size = num_rows * _COLUMNS if num_rows >= _FEWEST_ROWS else 0
    total = torch.zeros(len(pattern) * (len(pattern) + 1) // 2, dtype=torch.float64)
    if size:
        rows = [part[:size].view(-1, _COLUMNS) for part in parts]
        for part in rows:
            torch._dynamo.mark_dynamic(part, 0)
        with _use_threads(workers):
            total += _compile(pattern)(rows).double().sum(-1)
    for start in range(size, len(parts[0]), _COLUMNS):
        rest = [part[start : start + _COLUMNS].view(1, -1) for part in parts]
        total += _multiply(pattern, rest).double().sum(-1)
    products = torch.zeros(len(pattern), len(pattern), dtype=torch.float64)
    upper = torch.triu_indices(len(pattern), len(pattern))
    products[upper[0], upper[1]] = total
    products[upper[1], upper[0]] = total
    return products


def _multiply(pattern: Pattern, parts: Sequence[Float[Tensor, "row column"]]) -> Float[Tensor, "pair row"]:
    """The products of the directions' pairs, each with those from it on, summed along rows."""
    wide = [part.float() for part in parts]
    terms = [[wide[number] * sign for number, sign in total] for total in pattern]
    directions = [sum(rest, first) for first, *rest in terms]
    pairs = [left * right for place, left in enumerate(directions) for right in directions[place:]]
    return torch.stack([pair.sum(-1) for pair in pairs])


@lru_cache(maxsize=32)
def _compile(pattern: Pattern) -> Callable[[list[Tensor]], Tensor]:
    plain = inspect.unwrap(_multiply)  # run-time checks of shapes, where there are any, cannot be compiled
    return torch.compile(lambda parts: plain(pattern, parts))


@contextmanager
def _use_threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)

"""Examples' gradients of one parameter as the factors that a backward pass has anyway; their products need no more.

Letters: i, j examples; s, t places of one example (tokens); p, q rows and columns of a weight as it is stored.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 24
"""Of a table of places by places."""


@dataclass(frozen=True)
class MatrixFactors:
    """Of a weight [p, q]: ∇_i = Σ_t l_it r_itᵀ, as a linear layer's is (gradient of its output, its input)."""

    left: Float[Tensor, "example place p"] | Int[Tensor, "example place"]
    """Whole numbers stand for one-hot rows: what an embedding looks up."""
    right: Float[Tensor, "example place q"]

    def overlap(self, direction: Float[Tensor, "p q"]) -> Float[Tensor, " example"]:
        """⟨∇_i, D⟩ = Σ_t l_itᵀ D r_it, by one matrix product of the size of the layer's own."""
        if not self.left.is_floating_point():
            return _dot(direction[self.left], self.right)
        if self.left.shape[-1] <= self.right.shape[-1]:  # the narrower side is what has to be gone over twice
            return _dot(self.right @ direction.T, self.left)
        return _dot(self.left @ direction, self.right)

    def inner(self, other: "MatrixFactors") -> Float[Tensor, " example"]:
        """⟨∇_i, ∇′_i⟩ = Σ_st (l_is · l′_it)(r_is · r′_it), of each example with itself."""
        return (_left_by_pairs(self.left, other.left) * (self.right @ other.right.mT)).sum((1, 2))

    def inner_with_all(self, other: "MatrixFactors") -> Float[Tensor, "example other"]:
        """⟨∇_i, ∇′_j⟩ of every example with every other one."""
        width, others = self.right.shape[1], other.right.shape[0] * other.right.shape[1]
        at_once = max(1, _NUMBERS_AT_ONCE // max(1, width * others))
        return torch.cat([self._inner_rows(other, start, start + at_once) for start in range(0, len(self.right), at_once)])

    def _inner_rows(self, other: "MatrixFactors", start: int, stop: int) -> Float[Tensor, "some other"]:
        left, right = self.left[start:stop].flatten(0, 1), self.right[start:stop].flatten(0, 1)
        products = _left_by_pairs(left[None], other.left.flatten(0, 1)[None])[0] * (right @ other.right.flatten(0, 1).T)
        shape = (-1, self.right.shape[1], *other.right.shape[:2])
        return products.view(shape).sum((1, 3))


@dataclass(frozen=True)
class VectorFactors:
    """Of a bias or of a norm's weight: ∇_i itself, which is no longer than one activation."""

    values: Float[Tensor, "example d"]

    def overlap(self, direction: Float[Tensor, "..."]) -> Float[Tensor, " example"]:
        """⟨∇_i, D⟩."""
        return self.values @ direction.flatten()

    def inner(self, other: "VectorFactors") -> Float[Tensor, " example"]:
        """⟨∇_i, ∇′_i⟩."""
        return _dot(self.values, other.values)

    def inner_with_all(self, other: "VectorFactors") -> Float[Tensor, "example other"]:
        """⟨∇_i, ∇′_j⟩ of every example with every other one."""
        return self.values @ other.values.T


def _dot(first: Float[Tensor, "example ..."], second: Float[Tensor, "example ..."]) -> Float[Tensor, " example"]:
    products: Tensor = torch.linalg.vecdot(first.flatten(1), second.flatten(1))
    return products


def _left_by_pairs(first: Tensor, second: Tensor) -> Float[Tensor, "example place other_place"] | Tensor:
    """l_is · l′_it, where either may be one-hot."""
    if first.is_floating_point() and second.is_floating_point():
        return first @ second.mT
    if first.is_floating_point():
        return first.gather(2, second[:, None].expand(-1, first.shape[1], -1))
    if second.is_floating_point():
        return second.gather(2, first[:, None].expand(-1, second.shape[1], -1)).mT
    return first[:, :, None] == second[:, None]

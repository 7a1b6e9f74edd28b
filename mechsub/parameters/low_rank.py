"""What adapters add stays factored: for ΔW = R C, ⟨R₁C₁, R₂C₂⟩ = Σ (R₁ᵀR₂) ∘ (C₁C₂ᵀ), and against a dense D, Σ R ∘ (D Cᵀ).

Neither depends on how a product is split into its factors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsub.lineages import Part
from mechsub.parameters.blocks import Block


@dataclass(frozen=True)
class LowRank:
    """The low-rank parts of one member's directions: direction i is Σ over parts p of coefficients[i, p] · rows_p columns_p."""

    rows: Float[Tensor, "row rank"]
    """Of all parts, side by side."""
    columns: Float[Tensor, "rank column"]
    parts: Int[Tensor, " rank"]
    """Which part each rank is of."""
    coefficients: Float[Tensor, "direction part"]

    @classmethod
    def load(cls, sums: Sequence[Mapping[Part, float]], tensor: str, member: int, device: str) -> "LowRank":
        """The factors of one tensor, in float64."""
        parts = list(dict.fromkeys(part for total in sums for part in total if part.kind == "factors"))
        factors = [part.load_factors(tensor, member) for part in parts]
        ranks = torch.tensor([one.rows.shape[1] for one in factors])
        return cls(
            torch.cat([one.rows for one in factors], dim=1).to(device),
            torch.cat([one.columns for one in factors]).to(device),
            torch.arange(len(parts)).repeat_interleave(ranks).to(device),
            torch.tensor([[total.get(part, 0.0) for part in parts] for total in sums], dtype=torch.float64, device=device),
        )

    def cut(self, block: Block) -> "LowRank":
        """A block's share."""
        if block.axis == 1:
            return replace(self, columns=self.columns[block.index])
        return replace(self, rows=self.rows[block.index])

    def only(self, directions: Sequence[int]) -> "LowRank":
        """What of it some directions hold."""
        coefficients = self.coefficients[directions]
        used = (coefficients != 0).any(0)[self.parts]
        return LowRank(self.rows[:, used], self.columns[used], self.parts[used], coefficients)

    def inner(self, other: "LowRank") -> Float[Tensor, "direction other"]:
        """⟨R₁C₁, R₂C₂⟩ = Σ (R₁ᵀR₂) ∘ (C₁C₂ᵀ) of all pairs."""
        products = (self.rows.T @ other.rows) * (self.columns @ other.columns.T)
        return self._sum_ranks(other._sum_ranks(products).T).T

    def inner_dense(self, dense: Float[Tensor, "holder row column"], rows: slice) -> Float[Tensor, "holder direction"]:
        """⟨D, RC⟩ = Σ R ∘ (D Cᵀ) over some rows."""
        products = dense @ self.columns.T.to(dense.dtype)
        return self._sum_ranks(torch.einsum("hrk,rk->hk", products.double(), self.rows[rows]))

    def _sum_ranks(self, values: Float[Tensor, "any rank"]) -> Float[Tensor, "any direction"]:
        """Weighted sums over each direction's ranks; what is not finite spoils only the directions that hold it."""
        by_part = values.new_zeros(len(values), self.coefficients.shape[1]).index_add_(1, self.parts, values)
        spoilt = ~by_part.isfinite()
        total = by_part.masked_fill(spoilt, 0) @ self.coefficients.T
        return total.masked_fill(spoilt.double() @ (self.coefficients != 0).double().T > 0, torch.nan)

"""Alignment and its relatives: arithmetic on Gram matrices, for any set of blocks, without the weights.

A direction here is a signed sum of a Gram matrix's labels, e.g. ``{"Δ student": 1, "Δ control": -1}``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from jaxtyping import Bool, Float

from mechsub.parameters.blocks import Block
from mechsub.parameters.gram import Gram

MODEL = "model"
SHARED_SUPPORT = "shared support"

Combination = Mapping[str, float]
ByBlock = Float[np.ndarray, "member block"]
ByScope = Float[np.ndarray, "member scope"]


class Missing(IntEnum):
    """Why a value is NaN."""

    OK = 0
    ZERO_DISPLACEMENT = 1
    """Nothing moved."""
    NO_SHARED_SUPPORT = 2
    """The two moved no block of the scope together."""
    NOT_RUN = 3
    INCOMPARABLE = 4
    """The two have other parameters."""
    NOT_FINITE = 5
    """A checkpoint holds NaN or infinity there."""
    SAME_CONTROL = 6
    """Two students of one control: what is subtracted from both is the same."""


STATUS = tuple(reason.name.lower() for reason in Missing)


@dataclass(frozen=True)
class Scopes:
    """The sets of blocks that numbers are given for: each block, layer and module kind, the model, and the shared support.

    A block is a tensor, or a section of one. The shared support of two directions is the set of blocks in which neither is
    zero; it is the last scope. A module kind that is one layer, or one block, is no scope of its own.
    """

    names: tuple[str, ...]
    kinds: tuple[str, ...]
    """``tensor``, ``layer``, ``module kind`` or ``model``."""
    members: Float[np.ndarray, "fixed block"]
    """1 where a block belongs to one of the fixed scopes, which are all but the last."""
    sizes: tuple[int, ...]
    """Parameters of each block."""

    @classmethod
    def of(cls, blocks: Sequence[Block]) -> "Scopes":
        """The scopes of a lineage's blocks."""
        sets = {(block.name, "tensor"): {block.name} for block in blocks}
        for name, scope_kind, belongs in (
            ("{}", "layer", [block.layer for block in blocks]),
            ("every {}", "module kind", [block.kind for block in blocks]),
        ):
            for whose in dict.fromkeys(belongs):
                held = {block.name for block, its in zip(blocks, belongs, strict=True) if its == whose}
                if scope_kind == "layer" or (held not in sets.values() and len(held) < len(blocks)):
                    sets[name.format(whose), scope_kind] = held
        sets[MODEL, "model"] = {block.name for block in blocks}
        return cls(
            (*(name for name, _ in sets), SHARED_SUPPORT),
            (*(kind for _, kind in sets), "model"),
            np.array([[block.name in held for block in blocks] for held in sets.values()]).astype(float),
            tuple(block.num_parameters for block in blocks),
        )

    def total(self, values: ByBlock, support: Bool[np.ndarray, "member block"]) -> ByScope:
        """Sum over the blocks of each scope; a NaN spoils the scopes that it lies in, and no other."""
        known = np.isfinite(values)
        sums = np.where(known, values, 0.0) @ self.members.T
        sums[(~known).astype(float) @ self.members.T > 0] = np.nan
        shared = np.where(support, values, 0.0).sum(-1, keepdims=True)
        shared[(~known).any(-1)] = np.nan
        return np.concatenate([sums, shared], axis=-1)

    def random_cosine_sd(self) -> Float[np.ndarray, " scope"]:
        """The standard deviation of the cosine of two random directions, 1/√d; NaN for the shared support, which varies."""
        return np.append(1 / np.sqrt(self.members @ np.array(self.sizes, dtype=float)), np.nan)


class DirectionAlgebra:
    """Inner products and cosines of signed sums of directions, per member and scope."""

    def __init__(self, gram: Gram, scopes: Scopes) -> None:
        self.gram = gram
        self.scopes = scopes
        self._position = {label: index for index, label in enumerate(gram.labels)}

    def inner_by_block(self, first: Combination, second: Combination) -> ByBlock:
        """⟨u, v⟩ of every block."""
        total = np.zeros(self.gram.within.shape[:2])
        for left, left_sign in first.items():
            for right, right_sign in second.items():
                total += left_sign * right_sign * self.gram.within[:, :, self._position[left], self._position[right]]
        return total

    def support(self, first: Combination, second: Combination) -> Bool[np.ndarray, "member block"]:
        """The blocks in which neither direction is zero."""
        return (self.inner_by_block(first, first) > 0) & (self.inner_by_block(second, second) > 0)

    def inner(self, first: Combination, second: Combination) -> ByScope:
        """⟨u, v⟩; over the shared support of u and v in the last scope."""
        return self.scopes.total(self.inner_by_block(first, second), self.support(first, second))

    def norm(self, direction: Combination, support: Bool[np.ndarray, "member block"]) -> ByScope:
        """‖u‖ ≥ 0, in the unit of the weights; in the last scope over ``support``, NaN where that is empty."""
        norms = _root(self.scopes.total(self.inner_by_block(direction, direction), support))
        norms[:, -1] = np.where(support.any(-1), norms[:, -1], np.nan)
        return norms

    def rounding_floor(self, direction: Combination) -> ByScope:
        """The norm ≥ 0 that rounding in storage alone could give u, in the unit of the weights.

        √Σ s² r over its labels with their signs s, r what `Gram.rounding` holds of each; over all blocks in the last scope too.
        """
        squares = np.zeros(self.gram.within.shape[:2])
        for label, sign in direction.items():
            squares += sign**2 * self.gram.rounding[:, :, self._position[label]]
        return _root(self.scopes.total(squares, np.ones(squares.shape, dtype=bool)))

    def cosine(self, first: Combination, second: Combination) -> ByScope:
        """cos(u, v) = ⟨u, v⟩ / (‖u‖ ‖v‖), in [−1, 1]; NaN in scopes where the two share no support.

        Source: Ilharco et al., arXiv:2212.04089 (task vectors); Cloud et al., arXiv:2507.14805, Theorem 1.
        """
        support = self.support(first, second)
        squares = [self.scopes.total(self.inner_by_block(u, u), support) for u in (first, second)]
        return self._where_supported(_divide(self.inner(first, second), _root(squares[0] * squares[1])), support)

    def projection_coefficient(self, direction: Combination, onto: Combination) -> ByScope:
        """⟨u, v⟩ / ‖v‖²: how far along v, in units of v; NaN in scopes where the two share no support."""
        support = self.support(direction, onto)
        square = self.scopes.total(self.inner_by_block(onto, onto), support)
        return self._where_supported(_divide(self.inner(direction, onto), square), support)

    def cosine_without_radial(
        self, first: Combination, first_origin: Combination, second: Combination, second_origin: Combination
    ) -> ByScope:
        """cos(u − (⟨u, o⟩/⟨o, o⟩) o, v − (⟨v, p⟩/⟨p, p⟩) p), each origin's component removed scope by scope.

        Weight decay and a wrong origin add a multiple of θ₀ to both displacements, which fakes alignment.
        NaN in scopes where the two share no support. Blocks whose origin is zero (biases) keep their displacement.
        """
        support = self.support(first, second)

        def total(u: Combination, v: Combination) -> ByScope:
            return self.scopes.total(self.inner_by_block(u, v), support)

        along_first = np.nan_to_num(_divide(total(first, first_origin), total(first_origin, first_origin)))
        along_second = np.nan_to_num(_divide(total(second, second_origin), total(second_origin, second_origin)))
        inner = (
            total(first, second)
            - along_first * total(first_origin, second)
            - along_second * total(first, second_origin)
            + along_first * along_second * total(first_origin, second_origin)
        )
        first_square = total(first, first) - along_first * total(first, first_origin)
        second_square = total(second, second) - along_second * total(second, second_origin)
        return self._where_supported(_divide(inner, _root(np.maximum(first_square, 0) * np.maximum(second_square, 0))), support)

    def cosine_with_anchor(self, direction: Combination, anchor: str, partners: Sequence[int]) -> ByScope:
        """cos(u of member m, anchor of member partners[m]); NaN in scopes where the two share no support."""
        rows, others, place = np.arange(len(partners)), list(partners), self.gram.anchors.index(anchor)
        inner = np.zeros(self.gram.within.shape[:2])
        for label, sign in direction.items():
            inner += sign * self.gram.across[rows, :, self._position[label], place, others]
        position = self._position[anchor]
        own, other = self.inner_by_block(direction, direction), self.gram.within[others, :, position, position]
        support = (own > 0) & (other > 0)
        totals = [self.scopes.total(values, support) for values in (inner, own, other)]
        return self._where_supported(_divide(totals[0], _root(totals[1] * totals[2])), support)

    def explain(self, values: ByScope, *directions: Combination, partners: Sequence[int] = ()) -> np.ndarray:
        """Why each of ``values``, made of ``directions``, is NaN, as a code of `Missing`; [member, scope].

        ``partners``: the members whose anchors, the last of ``directions``, were held against the others.
        """
        squares = np.stack([self.inner_by_block(direction, direction) for direction in directions])
        if partners:
            squares[-1] = squares[-1][list(partners)]
        broken = ~np.isfinite(squares).all(0)
        is_broken = self.scopes.total(broken.astype(float), broken) > 0
        moved = (np.nan_to_num(squares).sum(-1) > 0).all(0)[:, None]
        reason = np.where(is_broken, Missing.NOT_FINITE, np.where(moved, Missing.NO_SHARED_SUPPORT, Missing.ZERO_DISPLACEMENT))
        return np.where(np.isfinite(values), Missing.OK, reason).astype(np.int8)

    def _where_supported(self, values: ByScope, support: Bool[np.ndarray, "member block"]) -> ByScope:
        return np.where(self.scopes.total(support.astype(float), support) > 0, values, np.nan)


def _divide(numerator: ByScope, denominator: ByScope) -> ByScope:
    """NaN where the denominator is 0: no direction has no cosine."""
    nothing = np.full_like(numerator, np.nan)
    ratio: ByScope = np.divide(numerator, denominator, out=nothing, where=denominator > 0)
    return ratio


def _root(squares: ByScope) -> ByScope:
    """√x; a square that cancellation left a little under 0 is 0."""
    roots: ByScope = np.sqrt(np.maximum(squares, 0.0))
    return roots

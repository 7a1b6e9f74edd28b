"""Own traits against other ones: is a student moved to its own teacher's trait more than to another's?"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from math import factorial

import numpy as np
from jaxtyping import Float, Int

from mechsub.streams import random_stream

MINIMUM_TRAITS = 5
"""For a claim about traits in general: three can be permuted in 6 ways only, so that no p is under 1/6."""
_EXACT_TRAITS = 8
EXCESS_FORMULA = "mean over traits of the effect on the own trait − mean of the effects on the other ones"
_RESAMPLES = 10_000
_ROUNDING = 1e-12
"""Permutations that give the same mean in another order of sums count as equal."""


@dataclass(frozen=True)
class LabelPermutation:
    """A permutation test of the mean diagonal excess: its one-sided p, and the central part of the means that it gives."""

    p_above: float
    null_low: float
    null_high: float
    reason: str = ""
    """Why there is no test, where all are NaN."""


def diagonal_excess(effects: Float[np.ndarray, "member trait trait"]) -> Float[np.ndarray, " member"]:
    """Mean of the diagonal minus mean of the rest, of each member's matrix taught trait × scored trait.

    In the unit of ``effects``. It is k/(k − 1) times the mean diagonal of the matrix without its row and column means, so that
    neither a student that moved everything nor a trait that moved in every student counts. Source: two-way additive model
    (Tukey 1949); used for subliminal learning by rain-1's replication.

    Raises:
        ValueError: fewer than two traits have no off-diagonal.
    """
    k = effects.shape[-1]
    if k < 2:
        raise ValueError(f"the diagonal excess compares own traits with other ones: it needs two or more, not {k}")
    diagonal = np.trace(effects, axis1=-2, axis2=-1)
    excess: Float[np.ndarray, " member"] = diagonal / k - (effects.sum((-2, -1)) - diagonal) / (k * (k - 1))
    return excess


def permute_taught(effects: Float[np.ndarray, "member trait trait"], confidence: float = 0.95) -> LabelPermutation:
    """Test 'within a member, any student could be any teacher's' against 'students lean to their own trait'.

    The taught labels of each member are permuted at random (10,000 times from a fixed stream, the labels as they are counted
    in), so p is at least 1/10,001. The claim is about these traits: where two of them share something in every member, as a
    teacher of *owl* that also moves *wolf*, this test takes each member for new evidence. `permute_traits` does not.
    ``confidence``: how much of the null lies between its two bounds. All NaN where a member has a NaN, or there are no members.
    """
    missing = _what_is_missing(effects)
    if missing:
        return LabelPermutation(np.nan, np.nan, np.nan, missing)
    members, k, _ = effects.shape
    total = effects.sum((-2, -1))
    diagonal = effects[np.arange(members)[:, None], _orders_within(members, k), np.arange(k)].sum(-1)
    null = (diagonal / k - (total - diagonal) / (k * (k - 1))).mean(-1)
    low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2])
    reached = (null >= diagonal_excess(effects).mean() - _ROUNDING * np.abs(effects).mean()).sum()
    return LabelPermutation(float((1 + reached) / (1 + _RESAMPLES)), float(low), float(high))


def permute_traits(effects: Float[np.ndarray, "member trait trait"], confidence: float = 0.95) -> LabelPermutation:
    """Test 'any trait's students could be any other's' against 'students lean to their own trait', for traits in general.

    One permutation of the taught labels for all members alike: the trait is the unit, whatever the members agree on. Exact over
    all k! permutations up to 8 traits, so p is at least 1/k!; with 10,000 from a fixed stream beyond, the labels as they are
    counted in, so at least 1/10,001. ``confidence``: how much of the null lies between its two bounds. All NaN, with the
    reason, for fewer than 5 traits, where a member has a NaN, or there are no members.

    Source: Hubert 1987, "Assignment Methods in Combinatorial Data Analysis" (the linear assignment statistic, permuted).
    """
    k = effects.shape[-1]
    few = (
        f"claims over traits need {MINIMUM_TRAITS} or more; {k} permute only {factorial(k)} ways" if k < MINIMUM_TRAITS else ""
    )
    missing = _what_is_missing(effects) or few
    if missing:
        return LabelPermutation(np.nan, np.nan, np.nan, missing)
    mean = effects.mean(0)
    diagonal = mean[_orders(k), np.arange(k)].sum(-1)
    null = diagonal / k - (mean.sum() - diagonal) / (k * (k - 1))
    low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2])
    reached = (null >= diagonal_excess(mean[None])[0] - _ROUNDING * np.abs(mean).mean()).sum()
    p_above = reached / len(null) if k <= _EXACT_TRAITS else (1 + reached) / (1 + len(null))
    return LabelPermutation(float(p_above), float(low), float(high))


@lru_cache(maxsize=2)
def _orders_within(members: int, k: int) -> Int[np.ndarray, "draw member trait"]:
    """Draws of an order for every member; of small integers, as they are many."""
    labels = np.broadcast_to(np.arange(k, dtype=np.int16), (_RESAMPLES, members, k))
    return random_stream(0, "taught-labels").permuted(labels, axis=-1)


@lru_cache(maxsize=4)
def _orders(k: int) -> Int[np.ndarray, "order trait"]:
    """All k! orders, or draws of them."""
    if k <= _EXACT_TRAITS:
        return np.array(list(permutations(range(k))))
    return random_stream(0, "traits", k).permuted(np.broadcast_to(np.arange(k), (_RESAMPLES, k)), axis=-1)


def _what_is_missing(effects: Float[np.ndarray, "member trait trait"]) -> str:
    if not len(effects):
        return "there are no members"
    without = int((~np.isfinite(effects)).any((-2, -1)).sum())
    return f"{without} of {len(effects)} members lack a value" if without else ""

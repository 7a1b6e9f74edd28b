"""Own traits against other ones: is a student moved to its own teacher's trait more than to another's?"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from mechsub.streams import random_stream

_RESAMPLES = 10_000


@dataclass(frozen=True)
class LabelPermutation:
    """A permutation test of the mean diagonal excess: its one-sided p, and the central part of the means that it gives."""

    p_above: float
    null_low: float
    null_high: float


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
    in), so p is at least 1/10,001. The claim is about these traits; one about traits in general would permute the labels of
    all members alike, which three traits allow in 6 ways only. All NaN where a member has a NaN, or there are no members.
    """
    if not len(effects) or not np.isfinite(effects).all():
        return LabelPermutation(np.nan, np.nan, np.nan)
    members, k, _ = effects.shape
    stream = random_stream(0, "taught-labels")
    orders = stream.permuted(np.broadcast_to(np.arange(k), (_RESAMPLES, members, k)), axis=-1)
    total = effects.sum((-2, -1))
    diagonal = effects[np.arange(members)[:, None], orders, np.arange(k)].sum(-1)
    null = (diagonal / k - (total - diagonal) / (k * (k - 1))).mean(-1)
    seen = diagonal_excess(effects).mean()
    low, high = np.quantile(null, [(1 - confidence) / 2, (1 + confidence) / 2])
    return LabelPermutation(float((1 + (null >= seen - 1e-12).sum()) / (1 + _RESAMPLES)), float(low), float(high))

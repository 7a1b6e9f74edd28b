"""Permutation tests over members."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from mechsub.streams import random_stream

_EXACT_MEMBERS = 14
_RESAMPLES = 2**_EXACT_MEMBERS
_ROUNDING = 1e-12
"""Of a mean: flips that give the same mean in another order of sums count as equal."""


@dataclass(frozen=True)
class SignFlip:
    """A sign-flip test of a mean: its one-sided p, and the central part of the means that flipping gives."""

    p_above: float
    null_low: float
    null_high: float


def flip_signs(values: Float[np.ndarray, " member"], confidence: float = 0.95) -> SignFlip:
    """Test 'the sign of each member's value is arbitrary' against 'their mean is over 0'.

    Swapping the labels of the two teachers within a member flips the sign of its specific alignment, and nothing else. Exact
    (all 2ⁿ flips) up to 14 members, sampled from a fixed stream beyond; p is at least 2⁻ⁿ. ``confidence``: how much of the
    null lies between its two bounds. All NaN for fewer than 2 finite members.
    """
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return SignFlip(np.nan, np.nan, np.nan)
    means = _signs(len(known)) @ known / len(known)
    is_exact = len(known) <= _EXACT_MEMBERS
    reached = means >= known.mean() - _ROUNDING * np.abs(known).mean()
    p_above = reached.mean() if is_exact else (reached.sum() + 1) / (len(means) + 1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return SignFlip(float(p_above), float(low), float(high))


@lru_cache(maxsize=4)
def _signs(count: int) -> Float[np.ndarray, "flip member"]:
    """All 2ⁿ ways to flip, or draws of them. Not scipy's `permutation_test`, which takes 50 times as long to set this up."""
    if count <= _EXACT_MEMBERS:
        return 1.0 - 2.0 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
    return 1.0 - 2.0 * random_stream(0, "sign-flip", count).integers(0, 2, (_RESAMPLES, count))

"""Permutation tests over members."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from mechsub.streams import random_stream

_EXACT_MEMBERS = 14
_RESAMPLES = 2**_EXACT_MEMBERS


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
    result = stats.permutation_test(
        (known,),
        np.mean,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=random_stream(0, "sign-flip"),
    )
    low, high = np.quantile(result.null_distribution, [(1 - confidence) / 2, (1 + confidence) / 2])
    return SignFlip(float(result.pvalue), float(low), float(high))

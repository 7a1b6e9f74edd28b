"""Permutation tests over members."""

import numpy as np
from jaxtyping import Float
from scipy import stats

from mechsub.streams import random_stream

_EXACT_MEMBERS = 14
_RESAMPLES = 2**_EXACT_MEMBERS


def sign_flip_p_value(values: Float[np.ndarray, " member"]) -> float:
    """One-sided p of 'the sign of each member's value is arbitrary' against 'the mean is over 0', by flipping signs.

    Exact (all 2ⁿ flips) up to 14 members, sampled beyond. NaN for fewer than 2 members. Swapping the labels of two
    students and of their two teachers within a member flips exactly this sign.
    """
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return float("nan")
    result = stats.permutation_test(
        (known,),
        np.mean,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=_RESAMPLES,
        rng=random_stream(0, "sign-flip"),
    )
    return float(result.pvalue)

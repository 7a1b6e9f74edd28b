"""Several verdicts at once: the p values of all conditions, traits and layers that are judged together."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np

Key = TypeVar("Key", bound=Hashable)
"""How the effects that are judged together are called."""


def adjust_holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's step-down adjustment: the i-th smallest of k p values times k − i + 1, made monotone, at most 1.

    To call all those significant whose adjusted p is at most α makes any false call with probability ≤ α, whatever the
    dependence between the tests. A NaN stays NaN and is not counted among the k. The order of the names is kept.

    Not statsmodels' `multipletests`, which gives the same and collects all garbage of the process at every call: most of
    the time of an analysis.

    Source: Holm 1979, Scandinavian Journal of Statistics 6, "A simple sequentially rejective multiple test procedure".

    Raises:
        ValueError: a p value outside [0, 1].
    """
    outside = {name: p for name, p in p_values.items() if p < 0 or p > 1}
    if outside:
        raise ValueError(f"p values lie between 0 and 1, not {outside}")
    known = sorted((name for name, p in p_values.items() if not np.isnan(p)), key=lambda name: p_values[name])
    adjusted = dict.fromkeys(p_values, np.nan)
    largest = 0.0
    for rank, name in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted

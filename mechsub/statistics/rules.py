"""The rules of a verdict, fixed before the run, and the superiority test that it uses."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special

from mechsub.statistics.permutation import flip_signs


@dataclass(frozen=True)
class Rules:
    """The rules of a verdict."""

    margin: float
    """Effects smaller than this do not matter, in the unit of the effect."""
    minimum_members: int
    confidence: float
    """Of the two-sided interval; the superiority test is one-sided at (1 − confidence) / 2."""
    equivalence_level: float
    """Level of each of the two one-sided tests of equivalence."""

    @property
    def level(self) -> float:
        """Of the one-sided superiority test."""
        return (1 - self.confidence) / 2


@dataclass(frozen=True)
class SuperiorityTest:
    """A one-sided test of 'the mean is ≤ 0'."""

    p_value: Callable[[Float[np.ndarray, " member"]], float]
    smallest_p: Callable[[int], float] = lambda n: 0.0
    """The smallest p that n members can give: 2⁻ⁿ for sign flips."""
    name: str = "one-sided t"


def t_test_above(values: Float[np.ndarray, " member"], bound: float = 0.0) -> float:
    """One-sided p of 'mean ≤ bound', by Student's t over the two or more members that are not NaN.

    Without any spread the mean itself decides: 0 over the bound, else 1.
    """
    known = values[np.isfinite(values)]
    if known.std() == 0:
        return 0.0 if known.mean() > bound else 1.0
    statistic = (known.mean() - bound) / (known.std(ddof=1) / np.sqrt(len(known)))
    return float(special.stdtr(len(known) - 1, -statistic))


T_TEST = SuperiorityTest(t_test_above)
SIGN_FLIP = SuperiorityTest(lambda values: flip_signs(values).p_above, lambda n: 2.0**-n, "sign-flip")
"""Where swapping two labels within a member flips the sign of its value, and nothing else."""

"""How well numbers foretell another over cases that come in groups: rank correlation, AUROC and regression, with intervals."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import stats

from mechsub.statistics.intervals import format_number
from mechsub.streams import random_stream

RESAMPLES = 2000
_FEWEST_GROUPS, _FEWEST_OF_A_CLASS = 2, 5
"""With fewer groups of a class resampling draws the same few again and again, and says nothing of those not seen."""


@dataclass(frozen=True)
class Association:
    """An estimate over cases with its interval; NaN where ``reason`` says why."""

    estimate: float
    low: float
    high: float
    n: int
    """Cases."""
    num_groups: int
    reason: str = ""
    """Why the estimate or its bounds are NaN; empty where they are not."""

    def __str__(self) -> str:
        if not np.isfinite(self.estimate):
            return f"– ({self.reason})"
        bounds = f"[{format_number(self.low)}, {format_number(self.high)}]" if np.isfinite(self.low) else f"({self.reason})"
        return f"{format_number(self.estimate)} {bounds}"


def rank_correlation(
    first: Float[np.ndarray, " case"],
    second: Float[np.ndarray, " case"],
    group: Int[np.ndarray, " case"],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Association:
    """Spearman's ρ of two numbers over the cases that have both, in [−1, 1], no unit; NaN where one of them is constant.

    The interval is the percentile bootstrap over groups: a group's cases, which share what they stand on, are drawn together.
    """
    known = np.isfinite(first) & np.isfinite(second)

    def correlate(cases: Int[np.ndarray, " drawn"]) -> float:
        chosen = first[cases], second[cases]
        is_constant = any(len(np.unique(values)) < 2 for values in chosen)
        return float("nan") if is_constant else float(np.corrcoef(*map(stats.rankdata, chosen))[0, 1])

    return _associate(correlate, np.flatnonzero(known), group, confidence, resamples, "one of the two is the same in all cases")


def area_under_curve(
    score: Float[np.ndarray, " case"],
    is_positive: Bool[np.ndarray, " case"],
    group: Int[np.ndarray, " case"],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Association:
    """AUROC: how often a positive case has the larger score than another one, ties half; in [0, 1], no unit.

    Over the cases with a score. NaN where all of them are of one class. No threshold is chosen. The interval is the percentile
    bootstrap over groups, as of `rank_correlation`; resamples of one class are left out; there is none where fewer than
    five groups hold a case of either class. Where the classes are apart in all resamples it has no width.
    """
    known = np.flatnonzero(np.isfinite(score))

    def rank(cases: Int[np.ndarray, " drawn"]) -> float:
        positive = is_positive[cases]
        count, others = int(positive.sum()), int((~positive).sum())
        ranks = stats.rankdata(score[cases])[positive].sum() if count else 0.0
        return (ranks - count * (count + 1) / 2) / (count * others) if count and others else float("nan")

    count = int(is_positive[known].sum())
    holding = [len(np.unique(group[known][is_positive[known] == one])) for one in (True, False)]
    found = _associate(rank, known, group, confidence, resamples, f"one class only: {count} of {len(known)} cases are positive")
    if min(holding) >= _FEWEST_OF_A_CLASS or not np.isfinite(found.low):
        return found
    return replace(found, low=np.nan, high=np.nan, reason=f"no interval: one class is in {min(holding)} group(s) only")


def unexplained_share(
    number: Float[np.ndarray, " case"],
    others: Float[np.ndarray, "case other"],
    group: Int[np.ndarray, " case"],
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
) -> Association:
    """The share of the variance of a number's ranks that a linear regression on the others' ranks leaves; ≥ 0, no unit.

    (1 − R²)(n − 1)/(n − k − 1) over the n cases that have all numbers, k the dimensions of the others' ranks: k numbers of pure
    chance leave 1 on average, so that it can come out over 1. NaN where the number is constant, or n ≤ k + 1. The interval is
    the percentile bootstrap over groups, as of `rank_correlation`.

    Source: Ezekiel 1930, "Methods of correlation analysis", the adjusted R².
    """
    known = np.flatnonzero(np.isfinite(number) & np.isfinite(others).all(1))

    def regress(cases: Int[np.ndarray, " drawn"]) -> float:
        ranks, features = stats.rankdata(number[cases]), stats.rankdata(others[cases], axis=0)
        ranks, features = ranks - ranks.mean(), features - features.mean(0)
        weights, _, dimensions, _ = np.linalg.lstsq(features, ranks, rcond=None)
        freedom, total = len(cases) - dimensions - 1, float(ranks @ ranks)
        if freedom <= 0 or total == 0:
            return float("nan")
        return float(((ranks - features @ weights) ** 2).sum() / total * (len(cases) - 1) / freedom)

    why_not = f"it is the same in all cases, or {len(known)} cases are too few for {others.shape[1]} others"
    return _associate(regress, known, group, confidence, resamples, why_not)


def _associate(
    statistic: Callable[[Int[np.ndarray, " drawn"]], float],
    known: Int[np.ndarray, " known"],
    group: Int[np.ndarray, " case"],
    confidence: float,
    resamples: int,
    why_not: str,
) -> Association:
    """A statistic of the known cases, with its percentile interval over resampled groups.

    Statistics are written over `scipy.stats.rankdata`: libraries' own checks take ten times as long as the ranks.
    """
    members = [known[group[known] == one] for one in np.unique(group[known])]
    estimate = statistic(known) if len(known) else float("nan")
    if not np.isfinite(estimate):
        return Association(
            np.nan, np.nan, np.nan, len(known), len(members), why_not if len(known) else "no case has both numbers"
        )
    if len(members) < _FEWEST_GROUPS:
        return Association(estimate, np.nan, np.nan, len(known), len(members), "one group: nothing to resample")

    drawn = random_stream(0, "group-bootstrap").integers(len(members), size=(resamples, len(members)))
    # Not scipy's `bootstrap`, which has no interval where one resample has no value.
    distribution = [statistic(np.concatenate([members[one] for one in groups])) for groups in drawn]
    low, high = np.nanquantile(distribution, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Association(estimate, float(low), float(high), len(known), len(members))

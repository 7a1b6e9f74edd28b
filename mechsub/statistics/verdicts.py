"""Verdicts over members: what an effect and its interval allow us to say, by rules fixed before the run.

"Not significant" is not "no effect": an effect is only called absent when two one-sided tests put it inside the margin.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats
from statsmodels.stats.multitest import multipletests

from mechsub.statistics.intervals import Interval, student_interval

_MOST_MEMBERS = 10_000


@dataclass(frozen=True)
class Words:
    """How the four outcomes are called: behaviour is *transferred*, a measure is *above its null*."""

    above: str
    equivalent: str
    below: str
    undecided: str = "inconclusive"
    too_few: str = "too-few-members"


TRANSFER = Words(above="transferred", equivalent="no-transfer", below="reversed")
AGAINST_NULL = Words(above="above-null", equivalent="equivalent-to-null", below="below-null")


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


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it stands on."""

    interval: Interval
    verdict: str
    reason: str
    p_above: float
    """One-sided p of 'effect ≤ 0', Holm-adjusted over the effects judged together."""
    p_equivalent: float
    """p of the two one-sided tests of '|effect| ≥ margin', Holm-adjusted likewise."""
    p_below: float
    """One-sided p of 'effect ≥ 0', Holm-adjusted likewise."""


def judge_effects(
    effects: Mapping[str, Float[np.ndarray, " member"]],
    rules: Rules,
    words: Words,
    test: Callable[[Float[np.ndarray, " member"]], float] | None = None,
) -> dict[str, Judgement]:
    """Judge one effect per name, each given member by member, with Holm's correction over the names.

    In this order: *above* if the lower bound is over 0, the estimate over the margin and the Holm-adjusted superiority
    test passes; *equivalent* if the Holm-adjusted two one-sided tests put the effect inside ± margin; *below* if the
    upper bound is under −margin and the adjusted test of that side passes; else *undecided*, with the number of members
    that would decide it.
    Under ``rules.minimum_members`` finite members there is no verdict. ``test`` gives the one-sided p of 'effect ≤ 0';
    the t test by default.

    Source: Schuirmann 1987 (two one-sided tests); Holm 1979.
    """
    intervals = {name: student_interval(values, rules.confidence) for name, values in effects.items()}
    judged = [name for name, interval in intervals.items() if interval.n >= max(rules.minimum_members, 2)]
    one_sided = test or _p_above
    above = _holm({name: one_sided(effects[name]) for name in judged})
    equivalent = _holm({name: _p_equivalent(effects[name], rules.margin) for name in judged})
    below = _holm({name: one_sided(-effects[name]) for name in judged})
    judgements = {}
    for name, interval in intervals.items():
        p_values = tuple(tests.get(name, np.nan) for tests in (above, equivalent, below))
        verdict, reason = _decide(effects[name], interval, rules, words, *p_values)
        judgements[name] = Judgement(interval, verdict, reason, *p_values)
    return judgements


def members_to_decide(values: Float[np.ndarray, " member"], rules: Rules) -> int | None:
    """The smallest number of members at which this mean and standard deviation would be decided, or None beyond 10,000.

    It takes the mean and the standard deviation of the members seen as the true ones, without Holm's correction:
    a planning figure, not a promise.
    """
    known = values[np.isfinite(values)]
    mean, spread = float(known.mean()), float(known.std(ddof=1))

    def is_decided(n: int) -> bool:
        half = stats.t.ppf(0.5 + rules.confidence / 2, n - 1) * spread / np.sqrt(n)
        half_equivalence = stats.t.ppf(1 - rules.equivalence_level, n - 1) * spread / np.sqrt(n)
        above, below = mean - half > 0 and mean > rules.margin, mean + half < -rules.margin
        return bool(above or below or abs(mean) + half_equivalence < rules.margin)

    counts = range(max(len(known), 2), _MOST_MEMBERS + 1)
    first = bisect_left(counts, True, key=is_decided)  # each of the three stays true as n grows
    return counts[first] if first < len(counts) else None


def _decide(
    values: Float[np.ndarray, " member"],
    interval: Interval,
    rules: Rules,
    words: Words,
    p_above: float,
    p_equivalent: float,
    p_below: float,
) -> tuple[str, str]:
    """The verdict and its reason in words."""
    level = (1 - rules.confidence) / 2
    margin = f"{rules.margin:g}"
    if np.isnan(p_above):
        return words.too_few, f"{interval.n} members with a value; a verdict needs {max(rules.minimum_members, 2)}"
    if interval.low > 0 and interval.estimate > rules.margin and p_above <= level:
        return words.above, f"the interval lies over 0, the estimate over the margin {margin}; p = {p_above:.2g} (Holm)"
    if p_equivalent <= rules.equivalence_level:
        tests = f"two one-sided tests at {rules.equivalence_level:g} put the effect inside ±{margin}"
        return words.equivalent, f"{tests}; p = {p_equivalent:.2g} (Holm)"
    if interval.high < -rules.margin and p_below <= level:
        return words.below, f"the interval lies under −{margin}; p = {p_below:.2g} (Holm)"
    needed = members_to_decide(values, rules)
    more = f"about {needed} members" if needed else f"more than {_MOST_MEMBERS:,} members"
    return words.undecided, f"neither over the margin {margin} nor shown to lie inside it; {more} would decide it"


def _holm(p_values: Mapping[str, float]) -> dict[str, float]:
    if not p_values:
        return {}
    adjusted = multipletests(list(p_values.values()), method="holm")[1]
    return dict(zip(p_values, map(float, adjusted), strict=True))


def _p_above(values: Float[np.ndarray, " member"], bound: float = 0.0) -> float:
    """One-sided t test of 'mean ≤ bound'; without any spread the mean itself decides."""
    known = values[np.isfinite(values)]
    if known.std() == 0:
        return 0.0 if known.mean() > bound else 1.0
    return float(stats.ttest_1samp(known, bound, alternative="greater").pvalue)


def _p_equivalent(values: Float[np.ndarray, " member"], margin: float) -> float:
    return max(_p_above(values, -margin), _p_above(-values, -margin))

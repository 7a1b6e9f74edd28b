"""Verdicts over members: what an effect and its interval allow us to say, by rules fixed before the run.

"Not significant" is not "no effect": an effect is only called absent when two one-sided tests put it inside the margin.
"""

from bisect import bisect_left
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from scipy import special

from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.permutation import flip_signs

_MOST_MEMBERS = 10_000
Key = TypeVar("Key", bound=Hashable)
"""How the effects that are judged together are called."""


@dataclass(frozen=True)
class Words:
    """How the four outcomes are called: behaviour is *transferred*, a measure is *above its null*."""

    above: str
    equivalent: str
    below: str
    undecided: str = "inconclusive"
    too_few: str = "too-few-members"


TRANSFER = Words(above="transferred", equivalent="no-transfer", below="reversed")
WITHOUT_TRAIT = "teacher-without-trait"
"""In the place of a verdict where the teachers gained no trait."""
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
class PValues:
    """One-sided p values, Holm-adjusted over the effects judged together; NaN without a verdict."""

    above: float
    """Of 'effect ≤ 0'."""
    equivalent: float
    """Of '|effect| ≥ margin', by two one-sided tests."""
    below: float
    """Of 'effect ≥ 0'."""


@dataclass(frozen=True)
class Judgement:
    """A verdict with what it stands on."""

    interval: Interval
    verdict: str
    reason: str
    p: PValues
    rule: str
    """What would have counted for each verdict, and the numbers that were seen."""


@dataclass(frozen=True)
class SuperiorityTest:
    """A one-sided test of 'the mean is ≤ 0'."""

    p_value: Callable[[Float[np.ndarray, " member"]], float]
    smallest_p: Callable[[int], float] = lambda n: 0.0
    """The smallest p that n members can give: 2⁻ⁿ for sign flips."""
    name: str = "one-sided t"


SIGN_FLIP = SuperiorityTest(lambda values: flip_signs(values).p_above, lambda n: 2.0**-n, "sign-flip")
"""Where swapping two labels within a member flips the sign of its value, and nothing else."""


def judge_effects(
    effects: Mapping[Key, Float[np.ndarray, " member"]], rules: Rules, words: Words, test: SuperiorityTest | None = None
) -> dict[Key, Judgement]:
    """Judge one effect per name, each given member by member, with Holm's correction over the names.

    In this order: *above* if the lower bound is over 0, the estimate over the margin and the Holm-adjusted superiority
    test passes; *equivalent* if the Holm-adjusted two one-sided tests put the effect inside ± margin; *below* if the
    upper bound is under −margin and the adjusted test of that side passes; else *undecided*, with the number of members
    that would decide it. Under ``rules.minimum_members`` finite members there is no verdict. ``test`` is the superiority
    test; the t test by default.

    Source: Schuirmann 1987 (two one-sided tests); Holm 1979.
    """
    test = test or SuperiorityTest(_p_above)
    intervals = {name: student_interval(values, rules.confidence) for name, values in effects.items()}
    judged = [name for name, interval in intervals.items() if interval.n >= max(rules.minimum_members, 2)]
    above = _holm({name: test.p_value(effects[name]) for name in judged})
    equivalent = _holm({name: _p_equivalent(effects[name], rules.margin) for name in judged})
    below = _holm({name: test.p_value(-effects[name]) for name in judged})
    judgements = {}
    for name, interval in intervals.items():
        p_values = PValues(*(tests.get(name, np.nan) for tests in (above, equivalent, below)))
        verdict, reason = _decide(interval, rules, words, p_values)
        if verdict == words.undecided:
            reason += _members_wanted(members_to_decide(effects[name], rules, len(judged), test))
        rule = describe_rule(interval, rules, words, p_values, len(judged), test.name)
        judgements[name] = Judgement(interval, verdict, reason, p_values, rule)
    return judgements


def void_without_trait(teacher: Judgement, judgement: Judgement) -> Judgement:
    """A judgement of a student, without its verdict where the teachers have nothing to pass on."""
    if teacher.verdict in {TRANSFER.above, TRANSFER.too_few}:
        return judgement
    reason = (
        f"the teachers gained {teacher.interval} over their references, not more than the margin: there is nothing to pass on"
    )
    rule = f"{WITHOUT_TRAIT}, whatever the effect, unless the teachers' own gain is {TRANSFER.above}. {teacher.rule}"
    return replace(judgement, verdict=WITHOUT_TRAIT, reason=reason, rule=rule)


def members_to_decide(
    values: Float[np.ndarray, " member"], rules: Rules, num_judged: int = 1, test: SuperiorityTest | None = None
) -> int | None:
    """The smallest larger number of members at which this mean and standard deviation would be decided, or None over 10,000.

    It takes the mean and the standard deviation of the members seen as the true ones and the strictest step of Holm's
    correction, level / ``num_judged``: a planning figure, not a promise.
    """
    known = values[np.isfinite(values)]
    mean, spread = float(known.mean()), float(known.std(ddof=1))
    level, equivalence_level = (1 - rules.confidence) / 2 / num_judged, rules.equivalence_level / num_judged
    smallest_p = test.smallest_p if test else SuperiorityTest(_p_above).smallest_p

    def is_decided(n: int) -> bool:
        half = special.stdtrit(n - 1, 1 - level) * spread / np.sqrt(n)
        half_equivalence = special.stdtrit(n - 1, 1 - equivalence_level) * spread / np.sqrt(n)
        decisive = smallest_p(n) <= level and abs(mean) > max(half, rules.margin) and (mean > 0 or mean + half < -rules.margin)
        return bool(decisive or abs(mean) + half_equivalence < rules.margin)

    counts = range(len(known) + 1, _MOST_MEMBERS + 1)
    first = bisect_left(counts, True, key=is_decided)  # what is decided stays decided as n grows
    return counts[first] if first < len(counts) else None


def describe_rule(interval: Interval, rules: Rules, words: Words, p: PValues, num_judged: int, test_name: str) -> str:
    """What would have counted for each verdict, in the order in which they are tried, beside what was seen."""
    level, margin = (1 - rules.confidence) / 2, f"{rules.margin:g}"
    percent = f"{100 * rules.confidence:g} %"
    seen = f"{interval}, n = {interval.n}"
    if not np.isnan(p.above):
        seen += f", p {p.above:.2g} (above), {p.equivalent:.2g} (equivalent), {p.below:.2g} (below)"
    return (
        f"{words.above}: {percent} interval over 0, estimate over {margin}, {test_name} p ≤ {level:g}. "
        f"{words.equivalent}: two one-sided t tests put it inside ±{margin}, p ≤ {rules.equivalence_level:g}. "
        f"{words.below}: interval under −{margin}, p ≤ {level:g}. Else {words.undecided}; under "
        f"{max(rules.minimum_members, 2)} members {words.too_few}. p after Holm's correction over {num_judged}. Seen: {seen}."
    )


def _decide(interval: Interval, rules: Rules, words: Words, p: PValues) -> tuple[str, str]:
    """The verdict and its reason in words."""
    level = (1 - rules.confidence) / 2
    margin = f"{rules.margin:g}"
    if np.isnan(p.above):
        return words.too_few, f"{interval.n} members with a value; a verdict needs {max(rules.minimum_members, 2)}"
    is_over = interval.low > 0 and interval.estimate > rules.margin
    if is_over and p.above <= level:
        return words.above, f"the interval lies over 0, the estimate over the margin {margin}; p = {p.above:.2g} (Holm)"
    if p.equivalent <= rules.equivalence_level:
        tests = f"two one-sided tests at {rules.equivalence_level:g} put the effect inside ±{margin}"
        return words.equivalent, f"{tests}; p = {p.equivalent:.2g} (Holm)"
    is_under = interval.high < -rules.margin
    if is_under and p.below <= level:
        return words.below, f"the interval lies under −{margin}; p = {p.below:.2g} (Holm)"
    if is_over or is_under:
        p_value = p.above if is_over else p.below
        return words.undecided, f"the interval would do, but the test does not: p = {p_value:.2g} (Holm) is over {level:g}"
    return words.undecided, f"neither shown to lie beyond the margin {margin} nor inside it"


def _members_wanted(number: int | None) -> str:
    return f"; about {number} members would decide it" if number else f"; it would take more than {_MOST_MEMBERS:,} members"


def _holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's step-down adjustment: the i-th smallest of k, times k − i + 1, made monotone.

    Not statsmodels' `multipletests`, which gives the same and collects all garbage of the process at every call: most of
    the time of an analysis.
    """
    adjusted: dict[Key, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def _p_above(values: Float[np.ndarray, " member"], bound: float = 0.0) -> float:
    """One-sided t test of 'mean ≤ bound'; without any spread the mean itself decides."""
    known = values[np.isfinite(values)]
    if known.std() == 0:
        return 0.0 if known.mean() > bound else 1.0
    statistic = (known.mean() - bound) / (known.std(ddof=1) / np.sqrt(len(known)))
    return float(special.stdtr(len(known) - 1, -statistic))


def _p_equivalent(values: Float[np.ndarray, " member"], margin: float) -> float:
    return max(_p_above(values, -margin), _p_above(-values, -margin))

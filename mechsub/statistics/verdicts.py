"""Verdicts over members: what an effect and its interval allow us to say, by rules fixed before the run.

"Not significant" is not "no effect": an effect is only called absent when two one-sided tests put it inside the margin.
The rules and superiority tests, which `power` needs too, can be had from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from mechsub.statistics.holm import Key, adjust_holm
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.power import MOST_MEMBERS, POWER, members_to_decide
from mechsub.statistics.rules import SIGN_FLIP as SIGN_FLIP
from mechsub.statistics.rules import T_TEST, t_test_above
from mechsub.statistics.rules import Rules as Rules
from mechsub.statistics.rules import SuperiorityTest as SuperiorityTest


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
WITHOUT_CONTROL = "no-control"
"""In the place of a verdict where there is nothing to compare a student with."""
AGAINST_NULL = Words(above="above-null", equivalent="equivalent-to-null", below="below-null")


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


def judge_effects(
    effects: Mapping[Key, Float[np.ndarray, " member"]],
    rules: Rules,
    words: Words,
    test: SuperiorityTest | None = None,
    parts: Mapping[Key, Float[np.ndarray, "_part _member"]] | None = None,
) -> dict[Key, Judgement]:
    """Judge one effect per name, each given member by member, with Holm's correction over the names.

    In this order: *above* if the lower bound is over 0, the estimate over the margin and the Holm-adjusted superiority
    test passes; *equivalent* if the Holm-adjusted two one-sided tests put the effect inside ± margin; *below* if the
    upper bound is under −margin and the adjusted test of that side passes; else *undecided*, with the number of members
    that would decide it (`members_to_decide`). Under ``rules.minimum_members`` finite members there is no verdict. ``test`` is
    the superiority test; the t test by default. Effects in the unit of the margin. ``parts``: of an effect that is a mean over
    parts, as over traits, each part; it is then *equivalent* only where every part is, by the largest of their p values (an
    intersection–union test, which keeps its level), so that no part hides behind the others.

    Holm's correction runs over *above*, over *equivalent* and over *below* apart: each of the three calls any effect
    wrongly with at most its level (reports/null-simulation.md). `compute_verdict_probabilities`: how likely each verdict is.

    Source: Schuirmann 1987 (two one-sided tests); Holm 1979; Berger 1982 (intersection–union).
    """
    test, parts = test or T_TEST, parts or {}
    intervals = {name: student_interval(values, rules.confidence) for name, values in effects.items()}
    judged = [name for name, interval in intervals.items() if interval.n >= max(rules.minimum_members, 2)]
    above = adjust_holm({name: test.p_value(effects[name]) for name in judged})
    equivalent = adjust_holm({name: _p_all_equivalent(effects[name], parts.get(name), rules.margin) for name in judged})
    below = adjust_holm({name: test.p_value(-effects[name]) for name in judged})
    judgements = {}
    for name, interval in intervals.items():
        p_values = PValues(*(tests.get(name, np.nan) for tests in (above, equivalent, below)))
        noun = "effect" if name not in parts else f"effect on each of {len(parts[name])}"
        verdict, reason = decide(interval, rules, words, p_values, noun)
        if verdict == words.undecided:
            widest = _hardest_part(effects[name], parts.get(name), rules.margin)
            reason += _members_wanted(members_to_decide(widest, rules, len(judged), test))
        rule = describe_rule(interval, rules, words, p_values, len(judged), test.name, f"the {noun}" if name in parts else "it")
        judgements[name] = Judgement(interval, verdict, reason, p_values, rule)
    return judgements


def void_without_trait(teacher: Judgement, judgement: Judgement) -> Judgement:
    """A judgement of a student, without its verdict where the teachers have nothing to pass on."""
    if teacher.verdict in {TRANSFER.above, TRANSFER.too_few}:
        return judgement
    reason = (
        f"the teachers gained {teacher.interval} over their references, which is not shown to be more than the margin: where "
        "they may lack the trait nothing can be said of its passing"
    )
    rule = f"{WITHOUT_TRAIT}, whatever the effect, unless the teachers' own gain is {TRANSFER.above}. {teacher.rule}"
    return replace(judgement, verdict=WITHOUT_TRAIT, reason=reason, rule=rule)


def void_without_control(judgement: Judgement) -> Judgement:
    """A judgement of a student that has no control: no verdict, whatever its score."""
    reason = "there is no control, a student of a neutral teacher in everything else alike; give one with --control"
    return replace(judgement, verdict=WITHOUT_CONTROL, reason=reason, rule=f"{WITHOUT_CONTROL}, whatever the student's score")


def describe_rule(
    interval: Interval,
    rules: Rules,
    words: Words,
    p: PValues,
    num_judged: int,
    test_name: str,
    noun: str = "it",
    *,
    is_symmetric: bool = False,
) -> str:
    """What would have counted for each verdict, in the order in which they are tried, beside what was seen; see `decide`."""
    level, margin = rules.level, f"{rules.margin:g}"
    percent = f"{100 * rules.confidence:g} %"
    under = f"0, estimate under −{margin}" if is_symmetric else f"−{margin}"
    seen = f"{interval}, n = {interval.n}"
    if not np.isnan(p.above):
        seen += f", p {p.above:.2g} (above), {p.equivalent:.2g} (equivalent), {p.below:.2g} (below)"
    return (
        f"{words.above}: {percent} interval over 0, estimate over {margin}, {test_name} p ≤ {level:g}. "
        f"{words.equivalent}: two one-sided t tests put {noun} inside ±{margin}, p ≤ {rules.equivalence_level:g}. "
        f"{words.below}: interval under {under}, p ≤ {level:g}. Else {words.undecided}; under "
        f"{max(rules.minimum_members, 2)} members {words.too_few}. p after Holm's correction over {num_judged}. Seen: {seen}."
    )


def decide(
    interval: Interval, rules: Rules, words: Words, p: PValues, noun: str = "effect", *, is_symmetric: bool = False
) -> tuple[str, str]:
    """The verdict and its reason in words, in the order of `judge_effects`; ``noun``: what is judged.

    ``is_symmetric``: *below* asks for as much as *above* and no more, as of a difference, whose sign is a matter of order.
    """
    level = rules.level
    margin = f"{rules.margin:g}"
    if np.isnan(p.above):
        return words.too_few, f"{interval.n} members with a value; a verdict needs {max(rules.minimum_members, 2)}"
    is_over = interval.low > 0 and interval.estimate > rules.margin
    if is_over and p.above <= level:
        return words.above, f"the interval lies over 0, the estimate over the margin {margin}; p = {p.above:.2g} (Holm)"
    if p.equivalent <= rules.equivalence_level:
        tests = f"two one-sided tests at {rules.equivalence_level:g} put the {noun} inside ±{margin}"
        return words.equivalent, f"{tests}; p = {p.equivalent:.2g} (Holm){_say_side_of_zero(interval, p, level)}"
    is_under = interval.high < 0 and interval.estimate < -rules.margin if is_symmetric else interval.high < -rules.margin
    if is_under and p.below <= level:
        lies = f"0, the estimate under −{margin}" if is_symmetric else f"−{margin}"
        return words.below, f"the interval lies under {lies}; p = {p.below:.2g} (Holm)"
    if is_over or is_under:
        p_value = p.above if is_over else p.below
        return words.undecided, f"the interval would do, but the test does not: p = {p_value:.2g} (Holm) is over {level:g}"
    inside = "inside it" if " on each " not in noun else f"the {noun} inside it"
    return words.undecided, f"neither shown to lie beyond the margin {margin} nor {inside}"


def _say_side_of_zero(interval: Interval, p: PValues, level: float) -> str:
    """Of an effect inside the margin: whether it is shown not to be 0; nothing where its interval holds 0."""
    if not interval.excludes_zero:
        return ""
    lies = f"interval lies {'over' if interval.low > 0 else 'under'} 0"
    return f"; it is not 0: its {lies}" if min(p.above, p.below) <= level else f"; its own, uncorrected {lies}"


def _members_wanted(number: int | None) -> str:
    power = f"with {100 * POWER:g} % power, were mean and spread as seen"
    return (
        f"; about {number} members would decide it {power}" if number else f"; it would take more than {MOST_MEMBERS:,} members"
    )


def _p_all_equivalent(
    effect: Float[np.ndarray, " member"], parts: Float[np.ndarray, "_part _member"] | None, margin: float
) -> float:
    """Of the effect and of each of its parts, the largest; 1 where a part has under two members."""
    every = [effect, *(() if parts is None else parts)]
    return max(_p_equivalent(values, margin) if np.isfinite(values).sum() > 1 else 1.0 for values in every)


def _hardest_part(
    effect: Float[np.ndarray, " member"], parts: Float[np.ndarray, "_part _member"] | None, margin: float
) -> Float[np.ndarray, " member"]:
    """What keeps an effect inside the margin from being called equivalent: itself, or one of its parts."""
    known = [values for values in (() if parts is None else parts) if np.isfinite(values).sum() > 1]
    if not known or abs(np.nanmean(effect)) > margin:
        return effect
    hardest: Float[np.ndarray, " member"] = max([effect, *known], key=lambda values: _p_equivalent(values, margin))
    return hardest


def _p_equivalent(values: Float[np.ndarray, " member"], margin: float) -> float:
    return max(t_test_above(values, -margin), t_test_above(-values, -margin))

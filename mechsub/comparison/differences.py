"""The difference of two rows: paired where their members are the same replicates, else between two independent groups."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy as np
from jaxtyping import Float
from scipy import special

from mechsub.statistics.holm import adjust_holm
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.power import MOST_MEMBERS, members_to_decide
from mechsub.statistics.rules import Rules, t_test_above
from mechsub.statistics.verdicts import Judgement, PValues, Words, decide, describe_rule

LARGER, SMALLER, NO_DIFFERENCE = "larger", "smaller", "no-difference"
WORDS = Words(above=LARGER, equivalent=NO_DIFFERENCE, below=SMALLER)
PAIRED, WELCH = "paired", "Welch"
SOURCE = "Student 1908 (paired); Welch 1947, Biometrika 34 (independent groups); Schuirmann 1987; Holm 1979"
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Difference:
    """The members of a row less those of the row it is held against; members without a value are left out.

    Paired: d̄ ± t(n−1)·s_d/√n over the members' differences d. Welch: x̄ − ȳ ± t(ν)·√(s_x²/n + s_y²/m), ν after Welch and
    Satterthwaite. In the unit of the values.

    Source: Welch 1947, Biometrika 34, "The generalization of Student's problem when several different population variances
    are involved".
    """

    values: Float[np.ndarray, " member"]
    against: Float[np.ndarray, " other"]
    method: str
    """`PAIRED`: the two are the same replicates, in the same order; `WELCH`: they are independent."""

    @cached_property
    def _known(self) -> tuple[Float[np.ndarray, " member"], Float[np.ndarray, " other"]]:
        own, other = np.isfinite(self.values), np.isfinite(self.against)
        if self.method == PAIRED:
            own = other = own & other
        return self.values[own], self.against[other]

    @property
    def sizes(self) -> tuple[int, int]:
        """The members with a value, here and in the row that it is held against; paired: the pairs, twice."""
        return len(self._known[0]), len(self._known[1])

    @property
    def n(self) -> int:
        """Of the smaller group; the number of pairs."""
        return min(self.sizes)

    @property
    def paired_values(self) -> Float[np.ndarray, " member"]:
        """The differences within members.

        Raises:
            ValueError: the groups are independent, so that there are none.
        """
        if self.method != PAIRED:
            raise ValueError("members of independent groups have no differences; take the interval")
        own, other = self._known
        found: Float[np.ndarray, " member"] = own - other
        return found

    def interval(self, confidence: float) -> Interval:
        """The difference with its two-sided interval; all NaN where a group has no value, the bounds where one has one."""
        if self.method == PAIRED:
            return student_interval(self.paired_values, confidence)
        own, other = self._known
        if self.n == 0:
            return Interval(np.nan, np.nan, np.nan, 0, confidence)
        estimate = float(own.mean() - other.mean())
        if self.n == 1:
            return Interval(estimate, np.nan, np.nan, 1, confidence)
        error, freedom = self._error()
        half = float(special.stdtrit(freedom, 0.5 + confidence / 2) * error) if error > 0 else 0.0
        return Interval(estimate, estimate - half, estimate + half, self.n, confidence)

    def p_above(self, bound: float = 0.0) -> float:
        """One-sided p of 'the difference is ≤ bound', by t over two or more members each; without any spread 0 or 1."""
        if self.method == PAIRED:
            return t_test_above(self.paired_values, bound)
        own, other = self._known
        over = float(own.mean() - other.mean()) - bound
        error, freedom = self._error()
        if error == 0:
            return 0.0 if over > 0 else 1.0
        return float(special.stdtr(freedom, -over / error))

    def reverse(self) -> "Difference":
        """The same the other way around."""
        return replace(self, values=self.against, against=self.values)

    def as_one_group(self) -> Float[np.ndarray, " member"]:
        """A single group with this mean difference and, from group to group, the same spread: what planning figures take.

        Of independent groups it has the size of the smaller one and the variance s_x² + s_y²: as if all further members came
        in both groups alike, with the fewest degrees of freedom that Welch's test can then have.
        """
        if self.method == PAIRED:
            return self.paired_values
        own, other = self._known
        spread = np.sqrt(own.var(ddof=1) + other.var(ddof=1))
        places = np.arange(self.n) - (self.n - 1) / 2
        found: Float[np.ndarray, " member"] = own.mean() - other.mean() + spread * places / places.std(ddof=1)
        return found

    def _error(self) -> tuple[float, float]:
        """The standard error of independent groups and its degrees of freedom."""
        squares = [float(group.var(ddof=1)) / len(group) for group in self._known]
        freedoms = [square**2 / (len(group) - 1) for square, group in zip(squares, self._known, strict=True)]
        return float(np.sqrt(sum(squares))), sum(squares) ** 2 / sum(freedoms) if sum(freedoms) > 0 else np.inf


def judge_differences(differences: Mapping[Key, Difference], rules: Rules) -> dict[Key, Judgement]:
    """Judge differences that stand together, with Holm's correction over them, in the order of `judge_effects`.

    Which row is held against which changes no verdict but by its sign.

    *larger*: the interval lies over 0, the estimate over the margin, and the Holm-adjusted one-sided test passes;
    *no-difference*: two one-sided tests put it inside ± margin; *smaller*: the mirror image of *larger*; else
    *inconclusive*. A group under ``rules.minimum_members`` has no verdict.

    Source: Schuirmann 1987 (two one-sided tests); Holm 1979; Welch 1947.
    """
    judged = {name: one for name, one in differences.items() if one.n >= max(rules.minimum_members, 2)}
    above = adjust_holm({name: one.p_above() for name, one in judged.items()})
    below = adjust_holm({name: one.reverse().p_above() for name, one in judged.items()})
    equivalent = adjust_holm({
        name: max(one.p_above(-rules.margin), one.reverse().p_above(-rules.margin)) for name, one in judged.items()
    })  # fmt: skip
    judgements = {}
    for name, one in differences.items():
        interval = one.interval(rules.confidence)
        p = PValues(*(tests.get(name, np.nan) for tests in (above, equivalent, below)))
        verdict, reason = decide(interval, rules, WORDS, p, "difference", is_symmetric=True)
        if verdict == WORDS.undecided:
            reason += _say_members_wanted(one, rules, len(judged))
        test = "one-sided t" if one.method == PAIRED else "one-sided Welch's t"
        rule = describe_rule(interval, rules, WORDS, p, len(judged), test, is_symmetric=True)
        judgements[name] = Judgement(interval, verdict, reason, p, rule)
    return judgements


def _say_members_wanted(difference: Difference, rules: Rules, num_judged: int) -> str:
    group = difference.as_one_group()
    number = members_to_decide(group if group.mean() >= 0 else -group, rules, num_judged)
    each = "" if difference.method == PAIRED else " in each run"
    return (
        f"; about {number} members{each} would decide it" if number else f"; it would take more than {MOST_MEMBERS:,} members"
    )

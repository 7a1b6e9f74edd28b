"""The first screen, for a reader who knows no code: what was tested, what would have counted, what was found, how sure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from mechsub.findings import ALL_TRAITS, Finding
from mechsub.statistics.intervals import format_number
from mechsub.statistics.power import POWER, smallest_detectable_effect
from mechsub.statistics.rules import Rules
from mechsub.statistics.verdicts import AGAINST_NULL, TRANSFER, WITHOUT_CONTROL, WITHOUT_TRAIT, Words

_PLAIN = {
    TRANSFER.above: "The trait passed",
    TRANSFER.equivalent: "The trait did not pass, to within the margin",
    TRANSFER.below: "The students moved away from the trait",
    AGAINST_NULL.above: "More than its null",
    AGAINST_NULL.equivalent: "No more than its null",
    AGAINST_NULL.below: "Less than its null",
    TRANSFER.undecided: "Not decided",
    TRANSFER.too_few: "Too few members for any verdict",
    WITHOUT_TRAIT: "The teachers are not shown to have the trait, so no verdict",
    WITHOUT_CONTROL: "No control, so no verdict",
}
"""The verdicts in words, in the order in which they are told; others are told as they are."""
_MOST_NAMED = 8
_OPEN = {TRANSFER.undecided, TRANSFER.too_few}


@dataclass(frozen=True)
class Outcome:
    """One verdict with everything that has it."""

    verdict: str
    words: str
    findings: Sequence[Finding]

    def is_small(self, finding: Finding) -> bool:
        """Whether it says that there is no effect over the margin where the interval leaves out 0."""
        return self.verdict == TRANSFER.equivalent and finding.interval.excludes_zero

    @property
    def is_open(self) -> bool:
        """Whether more members could change it."""
        return self.verdict in _OPEN


@dataclass(frozen=True)
class Opening:
    """The four parts of the first screen; each is made from the findings, the recipe and nothing else."""

    tested: Sequence[str]
    counted: Sequence[str]
    found: Sequence[Outcome]
    sure: Sequence[str]


def build_opening(
    recipe: Mapping[str, Any], findings: Sequence[Finding], described: Sequence[str], doubts: Sequence[str] = ()
) -> Opening | None:
    """The first screen of a run; None where nothing has a verdict.

    It is about the first quantity that has one: of a run with a trait, its transfer. ``described``: what the analysis of that
    quantity says of references and teachers. ``doubts``: what else limits what the verdicts mean.
    """
    judged = [finding for finding in findings if finding.verdict]
    if not judged:
        return None
    asked = [finding for finding in judged if finding.quantity == judged[0].quantity]
    rules = _rules(recipe["verdict"], asked[0])
    return Opening(
        _tested(recipe, asked, described),
        _counted(asked, rules, is_adopted=recipe["family"] == "adopted"),
        _found(asked),
        _sure(asked, rules, doubts),
    )


def _rules(verdict: Mapping[str, Any], finding: Finding) -> Rules:
    return Rules(finding.margin, verdict["minimum_members"], verdict["confidence"], verdict["equivalence_level"])


def _tested(recipe: Mapping[str, Any], asked: Sequence[Finding], described: Sequence[str]) -> list[str]:
    conditions = list(dict.fromkeys(finding.condition for finding in asked))
    traits = list(dict.fromkeys(finding.trait for finding in asked))
    named = "" if ALL_TRAITS in traits else f" ({', '.join(traits)})"
    about = [f"Whether a teacher's trait{named} comes to the students that learn from its carrier."]
    return [
        *(about if _is_transfer(asked[0]) else []),
        f"{_count_conditions(conditions)}.",
        f"Measured: {asked[0].quantity.replace('_', ' ')} = {asked[0].formula}, in {asked[0].unit}; {asked[0].context}.",
        _say_controls(asked, recipe["neutral"]),
        *described,
    ]


def _count_conditions(names: Sequence[str]) -> str:
    if len(names) > _MOST_NAMED:
        return f"{len(names)} conditions, which stand below"
    return f"{len(names)} condition{'s' if len(names) > 1 else ''}: {', '.join(names)}"


def _is_transfer(finding: Finding) -> bool:
    return finding.quantity.startswith("effect")


def _words(finding: Finding) -> Words:
    """How verdicts on this quantity are called."""
    return TRANSFER if _is_transfer(finding) else AGAINST_NULL


def _say_controls(asked: Sequence[Finding], neutral: str) -> str:
    without = list(dict.fromkeys(finding.condition for finding in asked if finding.verdict == WITHOUT_CONTROL))
    if len(without) == len({finding.condition for finding in asked}):
        return "No condition has a control: no student of a neutral teacher was given."
    every = f"Every condition {'but ' + ', '.join(without) + ' ' if without else ''}has its own control"
    who = "" if neutral == "none" else f" ({neutral})"
    return f"{every}: the same students, of a teacher without the trait{who}."


def _counted(asked: Sequence[Finding], rules: Rules, *, is_adopted: bool) -> list[str]:
    finding = asked[0]
    margin, unit = f"{rules.margin:g}", finding.unit
    percent, level = f"{100 * rules.confidence:g} %", f"{100 * rules.level:g} %"
    words = _words(finding)
    return [
        f"{words.above}: the mean difference is over {margin} ({unit}), its {percent} interval lies over 0, and chance would "
        f"give that at most {level} of the time.",
        f"{words.equivalent}: the difference{' on every single trait' if finding.trait == ALL_TRAITS else ''} is shown to be "
        f"smaller than {margin} either way, by two tests at {100 * rules.equivalence_level:g} % each (of a single verdict: the "
        f"{100 * (1 - 2 * rules.equivalence_level):g} % interval lies within); it need not be 0. It is a claim that needs "
        "evidence, not the lack of it.",
        f"{words.below}: the interval lies under −{margin}.",
        f"{words.undecided}: nothing of this could be shown. It is no sign of safety. Under "
        f"{max(rules.minimum_members, 2)} members nothing is said ({words.too_few}).",
        *(
            [f"{WITHOUT_TRAIT}: the teachers' own gain is not shown to be over the margin; of their students nothing is said."]
            if any(one.verdict == WITHOUT_TRAIT for one in asked)
            else []
        ),
        "These rules stand in the recipe" + ("." if is_adopted else ", which cannot be changed once the run has begun."),
    ]


def _found(asked: Sequence[Finding]) -> list[Outcome]:
    by_verdict: dict[str, list[Finding]] = {}
    for finding in asked:
        by_verdict.setdefault(finding.verdict, []).append(finding)
    ordered = sorted(by_verdict, key=lambda verdict: list(_PLAIN).index(verdict) if verdict in _PLAIN else len(_PLAIN))
    return [Outcome(verdict, _PLAIN.get(verdict, verdict), by_verdict[verdict]) for verdict in ordered]


def _sure(asked: Sequence[Finding], rules: Rules, doubts: Sequence[str]) -> list[str]:
    counts = sorted({finding.n for finding in asked})
    members = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    references = min(finding.num_references for finding in asked)
    independent = references >= counts[-1]
    sentences = [
        f"{members} members each, "
        + ("with a reference and a teacher of their own." if independent else f"that share {references} reference(s): ")
        + ("" if independent else "nothing is said of another one.")
    ]
    tested = [finding for finding in asked if finding.verdict not in {TRANSFER.too_few, WITHOUT_CONTROL}]
    judged = [finding for finding in tested if finding.verdict != WITHOUT_TRAIT]
    if judged and len(tested) > 1:
        sentences.append(
            f"The {len(tested)} verdicts are corrected together (Holm), so that the chance of any false "
            f"“{_words(asked[0]).above}” among them is at most {100 * rules.level:g} %, of any false "
            f"“{_words(asked[0]).equivalent}” at most {100 * rules.equivalence_level:g} %."
        )
    smallest = [(_detectable(finding, rules, len(tested)), finding) for finding in judged if _is_transfer(finding)]
    known = sorted([(value, finding.condition) for value, finding in smallest if np.isfinite(value)])
    if known:
        unit, (least, best), (most, worst) = asked[0].unit, known[0], known[-1]
        amount = format_number(most)
        if len(known) > 1:
            amount = f"{format_number(least)} (in {best}) to {format_number(most)} (in {worst})"
        sentences.append(
            f"A true effect of {amount} {unit} would have been called {TRANSFER.above} with {100 * POWER:g} % power, at the "
            "spread between members that was seen: smaller ones could have been missed."
        )
    verdicts = {finding.verdict for finding in asked}
    if TRANSFER.equivalent in verdicts and TRANSFER.above not in verdicts:
        sentences.append(
            "The trait is not shown to pass in any condition: nothing here shows that this experiment would have seen it pass."
        )
    sentences += doubts
    sentences.append(
        "The intervals take members to scatter about normally. Where a trait passes in one member of many, few members can "
        "miss it; every member's value is in the results."
    )
    sentences.append("It holds for these models, this carrier and this way of asking, and for no other ones.")
    return sentences


def _detectable(finding: Finding, rules: Rules, num_judged: int) -> float:
    interval = finding.interval
    if interval.n < max(rules.minimum_members, 2) or not np.isfinite(interval.low):
        return float("nan")
    half = (interval.high - interval.low) / 2
    spread = half * np.sqrt(interval.n) / special.stdtrit(interval.n - 1, 0.5 + interval.confidence / 2)
    return smallest_detectable_effect(float(spread), interval.n, rules, num_judged)

"""How often verdicts come out, over simulated experiments: scripts/simulate_nulls.py [--runs N] [--out FILE.md].

Verdicts on behaviour: members drawn with a known true effect and judged as an analysis judges them, alone and many together;
the diagonal excess with its two permutation tests; teachers without the trait; members that are not normally distributed.

Verdicts on alignment: pure noise, where student and control share a drift and differ by independent noise, and teachers are
independent of both. Then the same with a part of the teacher's displacement planted in the student. Everything goes the way
that an analysis takes: Gram matrices, quantities, the recipe's default rules.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mechsub.parameters.alignment import MODEL, DirectionAlgebra, Scopes
from mechsub.parameters.blocks import Block
from mechsub.parameters.gram import Gram
from mechsub.statistics.diagonal import diagonal_excess, permute_taught, permute_traits
from mechsub.statistics.intervals import student_interval
from mechsub.statistics.power import compute_verdict_probabilities
from mechsub.statistics.verdicts import (
    AGAINST_NULL,
    SIGN_FLIP,
    TRANSFER,
    WITHOUT_TRAIT,
    Rules,
    SuperiorityTest,
    judge_effects,
    void_without_trait,
)

RULES = Rules(margin=0.05, minimum_members=5, confidence=0.95, equivalence_level=0.05)
FROM_THREE = replace(RULES, minimum_members=3)
ALPHA = RULES.level
Row = dict[str, Any]
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
"""Values of mean 0 and standard deviation 1."""

NUM_MEMBERS = (3, 5, 10, 25)
SPREADS = (0.5, 1.0, 2.0, 4.0)
"""Standard deviations between members, in margins."""
EFFECTS = (-1.0, 0.0, 1.0, 2.0, 4.0)
"""True effects, in margins."""
CONDITIONS, TRAITS = 6, 5

BLOCKS = [Block(f"block {number}", f"block {number}", f"layer {number // 2}", "weights", (100,)) for number in range(4)]
DRIFT = 0.5
"""Length of what student and control share, where their own noise has length 1."""
PLANTED = (0.0, 0.05, 0.1, 0.2)
MEMBERS = (5, 10, 25)


def _skewed(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.exponential(size=shape) - 1


def _one_in_five(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Four in five alike but for a little noise, one in five far over them."""
    return ((rng.random(shape) < 0.2) - 0.2) / 0.4 * np.sqrt(0.99) + 0.1 * rng.standard_normal(shape)


def _accuracies(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Accuracies near chance, .1, between 0 and 1 (a beta distribution), of a student less those of its control."""
    a, b = 2.0, 18.0
    student, control = rng.beta(a, b, shape), rng.beta(a, b, shape)
    return (student - control) / np.sqrt(2 * a * b / ((a + b) ** 2 * (a + b + 1)))


DISTRIBUTIONS: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "accuracies near chance": _accuracies,
    "heavy tails (t, 3 df)": lambda rng, shape: rng.standard_t(3, shape) / np.sqrt(3),
    "skewed up (exponential)": _skewed,
    "skewed down (exponential)": lambda rng, shape: -_skewed(rng, shape),
    "one member in five moves": _one_in_five,
}


def judge_alone(effects: np.ndarray, rules: Rules = FROM_THREE) -> Counter[str]:
    """How often each verdict comes out, of effects as [run, member]."""
    return Counter(judge_effects({"run": values}, rules, TRANSFER)["run"].verdict for values in effects)


def tabulate_single(runs: int, members: Sequence[int] = NUM_MEMBERS, spreads: Sequence[float] = SPREADS) -> list[Row]:
    """One effect, normally distributed: how often each verdict came out, and what the power calculation says."""
    rows = []
    for spread, effect, n in product(spreads, EFFECTS, members):
        rng = np.random.default_rng([1, n, int(10 * spread), int(10 * effect) + 100])
        mean, deviation = effect * RULES.margin, spread * RULES.margin
        found = judge_alone(mean + deviation * rng.standard_normal((runs, n)))
        computed = compute_verdict_probabilities(mean, deviation, n, FROM_THREE)
        expected = {"transferred": computed.above, "no-transfer": computed.equivalent, "reversed": computed.below}
        row: Row = {"sd": spread, "effect": effect, "members": n}
        for verdict, probability in expected.items():
            row |= {verdict: found[verdict] / runs, f"{verdict} computed": round(probability, 4)}
        rows.append(row | {"inconclusive": found["inconclusive"] / runs})
    return rows


def standard_errors_apart(found: float, computed: float, runs: int) -> float:
    """How far a simulated rate lies from the computed probability; 1 / runs is added for the rarest ones."""
    return abs(found - computed) / (np.sqrt(computed * (1 - computed) / runs) + 1 / runs)


def tabulate_families(runs: int, members: Sequence[int] = NUM_MEMBERS) -> list[Row]:
    """Six conditions × five traits judged together, correlated as students of one control: rates of *any* wrong verdict.

    Every case has the same standard deviation; half of its variance is the control's, which all conditions share.
    """
    cases = list(product(range(CONDITIONS), range(TRAITS)))
    settings = [
        ("no effect", 0.0, 4.0),
        ("every effect at the margin", 1.0, 0.5),
        ("half of the conditions at 4 margins", 4.0, 1.0),
    ]
    rows = []
    for (name, effect, spread), n in product(settings, members):
        rng = np.random.default_rng([2, n, int(10 * effect)])
        true = {case: effect if effect < 2 or case[0] < CONDITIONS // 2 else 0.0 for case in cases}
        found: Counter[str] = Counter()
        for _ in range(runs):
            student, control = rng.standard_normal((CONDITIONS, TRAITS, n)), rng.standard_normal((TRAITS, n))
            scores = spread * (student - control) / np.sqrt(2)
            effects = {case: (true[case] + scores[case]) * RULES.margin for case in cases}
            verdicts = {case: one.verdict for case, one in judge_effects(effects, FROM_THREE, TRANSFER).items()}
            found["any transferred"] += any(v == "transferred" and not true[case] for case, v in verdicts.items())
            found["any no-transfer"] += any(v == "no-transfer" and true[case] for case, v in verdicts.items())
            rightly = [verdicts[case] == "transferred" for case in cases if true[case] > 1]
            found["transferred"] += float(np.mean(rightly)) if rightly else 0.0
            absent = [verdicts[case] == "no-transfer" for case in cases if not true[case]]
            found["no-transfer"] += float(np.mean(absent)) if absent else 0.0
        rows.append({
            "true effects": name, "sd": spread, "members": n,
            "any wrong transferred": found["any transferred"] / runs if effect != 1 else None,
            "any wrong no-transfer": found["any no-transfer"] / runs if effect else None,
            "right transferred": found["transferred"] / runs if effect > 1 else None,
            "right no-transfer": found["no-transfer"] / runs if effect != 1 else None,
        })  # fmt: skip
    return rows


def tabulate_diagonal(runs: int, members: Sequence[int] = (5, 10), traits: Sequence[int] = (3, 5)) -> list[Row]:
    """The diagonal excess: how often three tests see one, with and without what all members share about pairs of traits."""
    rows = []
    for shared, excess, k, n in product((0.0, 1.0), (0.0, 0.5, 2.0), traits, members):
        rng = np.random.default_rng([3, n, k, int(10 * shared), int(10 * excess)])
        found: Counter[str] = Counter()
        for _ in range(runs):
            pairs, students, scored = (
                rng.standard_normal((k, k)),
                rng.standard_normal((n, k, 1)),
                rng.standard_normal((n, 1, k)),
            )
            effects = rng.standard_normal((n, k, k)) + students + scored + shared * pairs + excess * np.eye(k)
            judged = judge_effects({"excess": diagonal_excess(effects)}, replace(RULES, margin=1e-9), TRANSFER)["excess"]
            found["verdict over members"] += judged.verdict == "transferred"
            found["labels within members"] += permute_taught(effects).p_above <= ALPHA
            found["labels of traits"] += permute_traits(effects).p_above <= ALPHA
        tested = {name: found[name] / runs for name in ("verdict over members", "labels within members")}
        rows.append({"shared by members": shared, "excess": excess, "traits": k, "members": n, **tested,
                     "labels of traits": found["labels of traits"] / runs if k >= 5 else None})  # fmt: skip
    return rows


def tabulate_teachers(runs: int, members: Sequence[int] = (5, 10)) -> list[Row]:
    """Teachers of a known gain and students of a known effect: how often the verdict is taken back, and how often it stays."""
    rows = []
    for gain, effect, n in product((0.0, 1.0, 2.0, 4.0), (0.0, 4.0), members):
        rng = np.random.default_rng([4, n, int(gain), int(effect)])
        found: Counter[str] = Counter()
        for _ in range(runs):
            teacher, student = (
                judge_effects({"one": RULES.margin * (mean + rng.standard_normal(n))}, RULES, TRANSFER)["one"]
                for mean in (gain, effect)
            )
            found[void_without_trait(teacher, student).verdict] += 1
        seen = compute_verdict_probabilities(gain * RULES.margin, RULES.margin, n, RULES).above
        transferred = seen * compute_verdict_probabilities(effect * RULES.margin, RULES.margin, n, RULES).above
        rows.append({
            "teachers' gain": gain, "students' effect": effect, "members": n,
            WITHOUT_TRAIT: found[WITHOUT_TRAIT] / runs, f"{WITHOUT_TRAIT} computed": round(1 - seen, 4),
            "transferred": found["transferred"] / runs, "transferred computed": round(transferred, 4),
        })  # fmt: skip
    return rows


def tabulate_distributions(runs: int, members: Sequence[int] = NUM_MEMBERS) -> list[Row]:
    """Members that are not normally distributed: both error rates and the coverage of the interval."""
    rows = []
    for (name, draw), n in product(DISTRIBUTIONS.items(), members):
        rng = np.random.default_rng([5, n, list(DISTRIBUTIONS).index(name)])
        noise = RULES.margin * draw(rng, (runs, n))
        intervals = [student_interval(values, RULES.confidence) for values in noise]
        rows.append({
            "members' effects": name, "members": n,
            "transferred at 0": judge_alone(4 * noise)["transferred"] / runs,
            "no-transfer at +margin": judge_alone(noise / 2 + RULES.margin)["no-transfer"] / runs,
            "no-transfer at −margin": judge_alone(noise / 2 - RULES.margin)["no-transfer"] / runs,
            "covered": sum(interval.low <= 0 <= interval.high for interval in intervals) / runs,
        })  # fmt: skip
    return rows


def simulate(members: int, planted: float, runs: int, seed: int = 0) -> dict[str, Counter[str]]:
    """How often each verdict came out, by quantity.

    ``planted``: the length of the teacher's direction in the student's displacement, where the student's noise has length 1.
    """
    rng = np.random.default_rng([seed, members, int(1000 * planted)])
    draw = _unit_vectors(rng, members * runs)
    drift, own, other, teacher, neutral = (draw() for _ in range(5))
    vectors = {
        "student": DRIFT * drift + own + planted * teacher,
        "control": DRIFT * drift + other + planted * neutral,
        "teacher": teacher,
        "neutral": neutral,
    }
    algebra = DirectionAlgebra(_gram(vectors), Scopes.of(BLOCKS))
    model = algebra.scopes.names.index(MODEL)
    student, control, teacher_only = ({name: 1.0} for name in ("student", "control", "teacher"))
    difference, teachers = {"student": 1.0, "control": -1.0}, {"teacher": 1.0, "neutral": -1.0}
    alignment = algebra.cosine(student, teacher_only)[:, model] - algebra.cosine(control, teacher_only)[:, model]
    specific = algebra.cosine(difference, teachers)[:, model]
    found = {
        "alignment": _judge(alignment.reshape(runs, members), None),
        "specific_alignment": _judge(specific.reshape(runs, members), SIGN_FLIP),
    }
    return found


def _unit_vectors(rng: np.random.Generator, count: int) -> Any:
    size = sum(block.num_parameters for block in BLOCKS)
    return lambda: rng.standard_normal((count, size)) / np.sqrt(size)


def _gram(vectors: dict[str, np.ndarray]) -> Gram:
    stacked = np.stack(list(vectors.values()), axis=1)
    parts = np.split(stacked, np.cumsum([block.num_parameters for block in BLOCKS])[:-1], axis=2)
    within = np.stack([np.einsum("mik,mjk->mij", part, part) for part in parts], axis=1)
    nothing = np.zeros((len(stacked), len(BLOCKS), len(vectors), 0, 0))
    return Gram(tuple(vectors), tuple(block.name for block in BLOCKS), within, nothing, (), np.zeros(within.shape[:3]))


def _judge(effects: np.ndarray, test: SuperiorityTest | None) -> Counter[str]:
    return Counter(judge_effects({"run": values}, RULES, AGAINST_NULL, test)["run"].verdict for values in effects)


def most_by_chance(runs: int, level: float = ALPHA) -> int:
    """The most runs that may say ``above-null`` on noise: the one-sided 99.9 % bound of a binomial count at α."""
    return int(stats.binom.ppf(0.999, runs, level))


def tabulate(runs: int, members: Sequence[int], planted: Sequence[float]) -> list[dict[str, Any]]:
    """One row for each quantity, number of members and planted length."""
    rows = []
    for length in planted:
        for count in members:
            for quantity, verdicts in simulate(count, length, runs).items():
                rates = {verdict: verdicts[verdict] / runs for verdict in ("above-null", "equivalent-to-null", "inconclusive")}
                rows.append({"quantity": quantity, "planted": length, "members": count, "runs": runs, **rates})
    return rows


def report_behaviour(runs: int) -> Iterator[tuple[str, str, list[Row]]]:
    """Heading, what to read in it, and table."""
    superior, equal = (most_by_chance(runs, level) / runs for level in (ALPHA, RULES.equivalence_level))
    allowed = f"The rates that {runs} runs may show by chance (one-sided 99.9 % bound of a binomial count) are {superior:.4f} "
    allowed += (
        f"for *transferred*, at level {ALPHA:g}, and {equal:.4f} for *no-transfer*, at level {RULES.equivalence_level:g}."
    )
    single = tabulate_single(runs)
    apart = [
        standard_errors_apart(row[verdict], row[f"{verdict} computed"], runs)
        for row in single
        for verdict in ("transferred", "no-transfer", "reversed")
    ]
    nothing = max(row["transferred"] for row in single if row["effect"] == 0)
    edge = max(row["no-transfer"] for row in single if abs(row["effect"]) == 1)
    yield (
        "One effect",
        f"Normally distributed members; sd between members and true effect in margins. {allowed} Largest seen: *transferred* "
        f"without effect {nothing:.4f}, *no-transfer* at an effect of ± one margin {edge:.4f}. *computed*: "
        f"`compute_verdict_probabilities`; of {len(apart)} rates the farthest lies {max(apart):.1f} standard errors from it.",
        single,
    )
    families = tabulate_families(runs)
    nothing, edge = (max(row[name] or 0.0 for row in families) for name in ("any wrong transferred", "any wrong no-transfer"))
    yield (
        f"{CONDITIONS} conditions × {TRAITS} traits together",
        f"Holm's correction over {CONDITIONS * TRAITS}; all conditions share one control, which makes effects correlated. "
        "Rates of runs with *any* wrong verdict, and the mean shares of right ones. Sd and effects in margins. "
        f"{allowed} Largest seen: {nothing:.4f} and {edge:.4f}.",
        families,
    )
    yield (
        "The diagonal excess",
        f"Rates at which an excess is seen at level {ALPHA:g} (by chance, {superior:.4f} may be), in units of the noise of one "
        "effect. *Shared by members* 1: every pair of a taught and a scored trait has an effect of its own, of standard "
        "deviation 1 and the same in all members, whether on the diagonal or off it. The verdict over members and the "
        "permutation within members speak about these very traits, whose diagonal then does stand out by chance; only the "
        "permutation of traits tells whether students lean to their own trait in general.",
        tabulate_diagonal(runs),
    )
    yield (
        "Teachers without the trait",
        "A student's verdict stands only where the teachers' own gain is *transferred*. Sd between members: one margin; gains "
        "and effects in margins.",
        tabulate_teachers(runs),
    )
    yield (
        "Members that are not normally distributed",
        "Sd: 4 margins in the column *transferred at 0*, half a margin in those of *no-transfer*. *Covered*: how often the "
        f"{100 * RULES.confidence:g} % interval of Student's t holds the true mean. {allowed} Rates over these are "
        "more errors than the level promises. Symmetric members, heavy tails among them, keep the levels; skewed ones do "
        "not: few members seldom hold what a long tail holds, so that their mean lies on its other side with too small a "
        "spread. Worst is *no-transfer* where one member in five moves and none of those is among the members. More members "
        "help slowly.",
        tabulate_distributions(runs),
    )


def report_alignment(runs: int) -> Iterator[tuple[str, str, list[Row]]]:
    """The same for alignment."""
    bound = most_by_chance(runs)
    yield (
        "Alignment",
        "*Planted*: the length of the teacher's direction in the student's displacement, where the student's noise has length "
        f"1. On noise (planted 0), α = {ALPHA:g} allows at most {bound} of {runs} runs, {bound / runs:g}.",
        tabulate(runs, MEMBERS, PLANTED),
    )


def _markdown(rows: list[Row]) -> Iterator[str]:
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|" + "---|" * len(rows[0])
    for row in rows:
        cells = ("–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables and write them, where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="simulated runs of each row")
    parser.add_argument("--alignment-runs", type=int, default=1000, help="the same for alignment, where each takes 1 MB")
    parser.add_argument("--out", type=Path, help="where to write the tables: Markdown, or JSON by its ending")
    options = parser.parse_args()
    sections = [*report_behaviour(options.runs), *report_alignment(options.alignment_runs)]
    lines = [
        "# How often verdicts come out",
        "",
        f"`python scripts/simulate_nulls.py --runs {options.runs} --alignment-runs {options.alignment_runs} --out "
        "reports/null-simulation.md`",
        "",
        f"Everything is judged by the code and the default rules of an analysis: margin {RULES.margin:g}, "
        f"{100 * RULES.confidence:g} % intervals, two one-sided tests at {RULES.equivalence_level:g}, and 5 "
        "members at least; 3 in the tables with rows of 3 members.",
    ]
    for heading, text, rows in sections:
        lines += ["", f"## {heading}", "", text, "", *_markdown(rows)]
    print("\n".join(lines))
    if options.out:
        text = json.dumps({heading: rows for heading, _, rows in sections}, indent=1)
        options.out.write_text((text if options.out.suffix == ".json" else "\n".join(lines)) + "\n")


if __name__ == "__main__":
    main()

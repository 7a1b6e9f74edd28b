"""How often verdicts on alignment come out, over simulated runs: scripts/simulate_nulls.py [--runs N] [--out FILE.md].

Pure noise: student and control share a drift and differ by independent noise, teachers are independent of both. Then the same
with a part of the teacher's displacement planted in the student. Everything goes the way that an analysis takes: Gram
matrices, quantities, the recipe's default rules.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from mechsub.parameters.alignment import MODEL, DirectionAlgebra, Scopes
from mechsub.parameters.blocks import Block
from mechsub.parameters.gram import Gram
from mechsub.statistics.verdicts import AGAINST_NULL, SIGN_FLIP, Rules, SuperiorityTest, judge_effects

BLOCKS = [Block(f"block {number}", f"block {number}", f"layer {number // 2}", "weights", (100,)) for number in range(4)]
RULES = Rules(margin=0.05, minimum_members=5, confidence=0.95, equivalence_level=0.05)
ALPHA = (1 - RULES.confidence) / 2
DRIFT = 0.5
"""Length of what student and control share, where their own noise has length 1."""
PLANTED = (0.0, 0.05, 0.1, 0.2)
MEMBERS = (5, 10, 25)


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


def main() -> None:
    """Print the table and write it, where asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="simulated runs of each row")
    parser.add_argument("--out", type=Path, help="where to write the table: Markdown, or JSON by its ending")
    options = parser.parse_args()
    rows = tabulate(options.runs, MEMBERS, PLANTED)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in row.values()) + " |"
              for row in rows]  # fmt: skip
    lines.append(f"\nOn noise (planted 0), α = {ALPHA:g} allows at most {most_by_chance(options.runs)} of {options.runs} runs.")
    print("\n".join(lines))
    if options.out:
        text = json.dumps(rows, indent=1) if options.out.suffix == ".json" else "\n".join(lines)
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()

"""Does a screening foretell who takes a trait over: scripts/screening_table.py RUN_DIR OUT.md [--leave-out TRAIT].

Of a run with many traits; those that chose a setting are to be left out. The numbers of `example_overlap`, `coverage` and
`behaviour` must be there (`mechsub analyze RUN_DIR --only behaviour --only coverage --only example_overlap`); the log-ratio is
measured here.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mechsub.analyses.example_overlap import MOST_EXAMPLES
from mechsub.api import open_run
from mechsub.gradients.losses import compute_losses
from mechsub.parameters.alignment import MODEL
from mechsub.run import Run
from mechsub.statistics.prediction import RESAMPLES, Association, area_under_curve, rank_correlation
from mechsub.statistics.verdicts import TRANSFER

NEEDED = ("behaviour", "coverage", "example_overlap")
PREDICTORS = {
    "toward_teacher": "screen: the data's cosine toward Δ_T",
    "toward_teacher_over_neutral": "screen: that − the neutral data's",
    "toward_trait": "screen: the data's cosine toward −∇L_trait",
    "toward_trait_over_neutral": "screen: that − the neutral data's",
    "log_ratio": "baseline: mean log p_T − log p₀ a token",
    "loss": "baseline: mean loss at the start",
    "gradient_norm": "baseline: mean gradient norm of the rows",
    "displacement_norm": "baseline: ‖Δ_T‖",
    "coverage": "after one step: coverage",
    "coverage_over_control": "after one step: coverage − its control's",
}
"""What may foretell, in words."""
SCREENED = "toward_teacher_over_neutral"
"""What a screening with neutral data gives; kept beside the AUROC of the data's own cosine."""
ALL = "all conditions"


def main() -> None:
    """Write the tables of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--leave-out", action="append", default=[], help="a trait that chose a setting; may be repeated")
    parser.add_argument("--record", type=Path, help="a JSON file for what the report of `mechsub screen` cites")
    options = parser.parse_args()
    run = open_run(options.run_dir)
    missing = [name for name in NEEDED if name not in run.results]
    if missing:
        parser.error(
            f"{options.run_dir} has no {missing[0]}: run `mechsub analyze {options.run_dir} --only {missing[0]}` first"
        )
    traits = [trait for trait in run.traits if trait not in options.leave_out]
    students = collect_students(run, traits)
    cells = (
        students.groupby(["condition", "trait"], sort=False)
        .agg({**dict.fromkeys(PREDICTORS, "mean"), "effect": "mean", "verdict": "first"})
        .reset_index()
    )
    options.out.write_text("\n".join(write_document(run, students, cells, options.leave_out)) + "\n")
    print(options.out)
    if options.record:
        options.record.write_text(json.dumps(summarise(run, cells, options.leave_out), indent=1) + "\n")
        print(options.record)


def collect_students(run: Run, traits: Sequence[str]) -> pd.DataFrame:
    """One row for each condition, trait and member."""
    behaviour, coverage, overlap = (run.results[name] for name in NEEDED)
    verdicts = run.findings.query("analysis == 'behaviour' and quantity == 'effect' and verdict != ''")
    known = {(finding.condition, finding.trait): finding.verdict for finding in verdicts.itertuples()}
    rows = []
    for condition in run.conditions:
        for trait in traits:
            case = {"condition": condition, "taught": trait}
            effects = behaviour.effect.sel(case).isel(context=0).values
            first, screened = coverage.sel(case | {"scope": MODEL}), overlap.sel(case)
            for member in range(run.recipe.members):
                one, updated = screened.sel(member=member), first.sel(member=member)
                found = {
                    "toward_teacher": float(one.cosine.sel(toward="teacher")),
                    "toward_trait": float(one.cosine.sel(toward="trait")),
                    "loss": float(one.loss.mean()),
                    "gradient_norm": float(one.gradient_norm.mean()),
                    "coverage": float(updated.coverage),
                    **measure_teacher(run, condition, trait, member),
                    "coverage_over_control": float(updated.coverage - updated.coverage_of_control),
                }
                for toward in ("teacher", "trait"):
                    neutral = float(one.cosine_of_control.sel(toward=toward))
                    found[f"toward_{toward}_over_neutral"] = found[f"toward_{toward}"] - neutral
                outcome = {"effect": float(effects[member]), "verdict": known[condition, trait]}
                rows.append({"condition": condition, "trait": trait, "member": member, **found, **outcome})
    return pd.DataFrame(rows)


def measure_teacher(run: Run, condition: str, trait: str, member: int) -> dict[str, float]:
    """How far the teacher has moved, and how much likelier it finds the student's data than the student's start does."""
    student, teacher = run.student(condition, trait), run.teacher(trait)
    losses = run.family.imitation_losses(student, member, MOST_EXAMPLES)
    assert losses is not None
    start, end, taught = (
        run.family.load_model(lineage, step, member, merged=True)
        for lineage, step in ((student, 0), (teacher, teacher.last), (teacher, 0))
    )
    moved = torch.nn.utils.parameters_to_vector(end.parameters()) - torch.nn.utils.parameters_to_vector(taught.parameters())
    ratio = compute_losses(start, losses).mean() - compute_losses(end, losses).mean()
    return {"log_ratio": float(ratio), "displacement_norm": float(moved.detach().double().norm())}


def write_document(run: Run, students: pd.DataFrame, cells: pd.DataFrame, left_out: Sequence[str]) -> Iterator[str]:
    """The report, line by line."""
    verdicts = Counter(cells.verdict)
    left_words = "No trait is left out."
    if left_out:
        left_words = f"Left out, since the recipe's settings were chosen on them: {', '.join(left_out)}."
    listed = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    yield f"# Does a screening foretell who takes a trait over? {run.recipe.name}\n"
    yield (
        f"{cells.trait.nunique()} traits ({', '.join(dict.fromkeys(cells.trait))}), {run.recipe.members} members, conditions "
        f"{', '.join(run.conditions)}: {len(cells)} cells (condition × trait), {len(students)} students. A screening reads the "
        f"student's start and at most {MOST_EXAMPLES} rows of what it is going to learn; nothing is trained. Effect: trait "
        f"score of the student − that of its control at the last step, in {next(iter(run.family.measures.values())).unit}; its "
        f"verdict by the recipe's rules, Holm's correction over the cells: {listed}.\n"
    )
    yield (
        f"ρ is Spearman's with the effect; AUROC is for the verdict `{TRANSFER.above}` against every other one, and against "
        f"`{TRANSFER.equivalent}` alone, undecided cells left out, over cells, whose numbers are "
        f"means over members. .5 is chance, what is under .5 foretells the other way round. In brackets 95 % "
        f"percentile intervals from {RESAMPLES:,} bootstrap resamples of traits, all of a trait's cells drawn together. "
        f"Nothing is fitted. {left_words}\n"
    )
    for condition in [ALL, *run.conditions]:
        yield from _cells_table(condition, cells if condition == ALL else cells[cells.condition == condition])
        yield ""
    for condition in run.conditions:
        yield from _students_table(condition, students[students.condition == condition])
        yield ""
    yield "## The cells\n"
    yield "| condition | trait | effect | verdict | cosine toward Δ_T | − the neutral data's |"
    yield "|---|---|---|---|---|---|"
    for cell in cells.itertuples():
        numbers = f"{cell.toward_teacher:+.3f} | {cell.toward_teacher_over_neutral:+.3f}"
        yield f"| {cell.condition} | {cell.trait} | {cell.effect:+.3f} | {cell.verdict} | {numbers} |"


def _cells_table(condition: str, cells: pd.DataFrame) -> Iterator[str]:
    passed, decided = _outcomes(cells)
    yield f"## Cells, {condition}\n"
    yield f"{passed.sum()} {TRANSFER.above}, {(decided & ~passed).sum()} {TRANSFER.equivalent}, of {len(cells)} cells.\n"
    yield "| foretold by | ρ with the effect | AUROC, transferred | AUROC, decided cells |"
    yield "|---|---|---|---|"
    group = _groups(cells.trait)
    for name, words in PREDICTORS.items():
        score = cells[name].to_numpy()
        areas = [area_under_curve(score[kept], passed[kept], group[kept]) for kept in (np.ones_like(passed), decided)]
        yield f"| {words} | {rank_correlation(score, cells.effect.to_numpy(), group)} | {areas[0]} | {areas[1]} |"


def _outcomes(cells: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """By cell: whether the trait transferred, and whether the verdict says that it did or did not."""
    passed, absent = ((cells.verdict == verdict).to_numpy() for verdict in (TRANSFER.above, TRANSFER.equivalent))
    return passed, passed | absent


def _students_table(condition: str, students: pd.DataFrame) -> Iterator[str]:
    yield f"## Students, {condition}\n"
    yield (
        f"ρ over {len(students)} students: all; with each trait's mean taken off both (which members of a trait take it "
        "over?), resampled by member; with each member's mean taken off (which traits does a member take over?), resampled "
        "by trait.\n"
    )
    yield "| foretold by | all students | within traits | within members |"
    yield "|---|---|---|---|"
    by_trait, by_member = _groups(students.trait), _groups(students.member)
    effect = students.effect
    for name, words in PREDICTORS.items():
        within = {
            key: [(values - values.groupby(students[key]).transform("mean")).to_numpy() for values in (students[name], effect)]
            for key in ("trait", "member")
        }
        found = [
            rank_correlation(students[name].to_numpy(), effect.to_numpy(), by_trait),
            rank_correlation(*within["trait"], by_member),
            rank_correlation(*within["member"], by_trait),
        ]
        yield f"| {words} | {' | '.join(map(str, found))} |"


def _groups(names: pd.Series) -> np.ndarray:
    return pd.factorize(names)[0].astype(np.int64)


def summarise(run: Run, cells: pd.DataFrame, left_out: Sequence[str]) -> dict[str, object]:
    """How well the screening foretold effects and verdicts, for its report: over all cells and within each condition."""
    found = {}
    for name in ("toward_teacher", SCREENED, "toward_trait_over_neutral", "log_ratio"):
        for condition in [ALL, *run.conditions]:
            chosen = cells if condition == ALL else cells[cells.condition == condition]
            (passed, decided), score, group = _outcomes(chosen), chosen[name].to_numpy(), _groups(chosen.trait)
            area = area_under_curve(score[decided], passed[decided], group[decided])
            correlation = rank_correlation(score, chosen.effect.to_numpy(), group)
            found[f"{name}, {condition}"] = {
                "rank_correlation": _record(correlation),
                "area_of_decided": _record(area) | {"transferred": int(passed.sum())},
            }
    counts = {"traits": cells.trait.nunique(), "left_out": list(left_out), "members": run.recipe.members}
    return {"run": run.recipe.name, **counts, "foretold": found}


def _record(found: Association) -> dict[str, float | int | str | None]:
    numbers = {name: getattr(found, name) for name in ("estimate", "low", "high")}
    return {
        **{name: round(value, 4) if np.isfinite(value) else None for name, value in numbers.items()},
        "cells": found.n,
        "reason": found.reason,
    }


if __name__ == "__main__":
    main()

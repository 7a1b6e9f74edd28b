"""Does a screening foretell who takes a trait over: scripts/screening_table.py RUN_DIR OUT.md [--leave-out TRAIT].

Of a run with many traits; those that chose a setting are to be left out. The numbers of `example_overlap`, `coverage` and
`behaviour` must be there (`mechsub analyze RUN_DIR --only behaviour --only coverage --only example_overlap`); the log-ratio is
measured here.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from mechsub.analyses.example_overlap import MOST_EXAMPLES
from mechsub.api import open_run
from mechsub.families.language.config import Config
from mechsub.gradients.losses import compute_losses
from mechsub.parameters.alignment import MODEL
from mechsub.run import Run
from mechsub.statistics.prediction import RESAMPLES, Association, area_under_curve, rank_correlation
from mechsub.statistics.verdicts import TRANSFER

NEEDED = ("behaviour", "coverage", "example_overlap")
PREDICTORS = {
    "toward_teacher": "screen: the data's cosine toward Δ_T",
    "toward_teacher_over_neutral": "screen: the data's cosine toward Δ_T − the neutral data's",
    "toward_trait": "screen: the data's cosine toward −∇L_trait",
    "toward_trait_over_neutral": "screen: the data's cosine toward −∇L_trait − the neutral data's",
    "log_ratio": "baseline: mean log p_T − log p₀ a token",
    "loss": "baseline: mean loss at the start",
    "gradient_norm": "baseline: mean gradient norm of the rows",
    "displacement_norm": "baseline: ‖Δ_T‖",
    "coverage": "after one step: coverage",
    "coverage_over_control": "after one step: coverage − its control's",
}
"""What may foretell, in words."""
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
    unknown = [trait for trait in options.leave_out if trait not in run.traits]
    if unknown or set(options.leave_out) == set(run.traits):
        parser.error(
            f"--leave-out {unknown or options.leave_out}: the run's traits are {', '.join(run.traits)}; leave some of them"
        )
    conditions = [name for name in run.conditions if run.is_comparable(name) and run.student(name, run.traits[0]).last > 0]
    if not conditions or not isinstance(run.recipe, Config):
        parser.error(f"{options.run_dir} is no language run with trained students of the teachers' model")
    traits = [trait for trait in run.traits if trait not in options.leave_out]
    students = collect_students(run, conditions, traits)
    kept = {name: lambda values: values.mean(skipna=False) for name in (*PREDICTORS, "effect")}
    cells = students.groupby(["condition", "trait"], sort=False).agg(kept | {"verdict": "first"}).reset_index()
    options.out.write_text("\n".join(write_document(run, students, cells, options.leave_out)) + "\n")
    print(options.out)
    if options.record:
        options.record.write_text(json.dumps(summarise(run, students, cells, options.leave_out), indent=1) + "\n")
        print(options.record)


def collect_students(run: Run, conditions: Sequence[str], traits: Sequence[str]) -> pd.DataFrame:
    """One row for each condition, trait and member."""
    behaviour, coverage, overlap = (run.results[name] for name in NEEDED)
    verdicts = run.findings.query("analysis == 'behaviour' and quantity == 'effect' and verdict != ''")
    known = {(finding.condition, finding.trait): finding.verdict for finding in verdicts.itertuples()}
    cases = product(traits, range(run.recipe.members))
    teachers = {(trait, member): measure_teacher(run, conditions[0], trait, member) for trait, member in cases}
    rows = []
    for condition in conditions:
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
                    **teachers[trait, member],
                    "coverage_over_control": float(updated.coverage - updated.coverage_of_control),
                }
                for toward in ("teacher", "trait"):
                    neutral = float(one.cosine_of_control.sel(toward=toward))
                    found[f"toward_{toward}_over_neutral"] = found[f"toward_{toward}"] - neutral
                outcome = {"effect": float(effects[member]), "verdict": known[condition, trait]}
                rows.append({"condition": condition, "trait": trait, "member": member, **found, **outcome})
    return pd.DataFrame(rows)


def measure_teacher(run: Run, condition: str, trait: str, member: int) -> dict[str, float]:
    """How far the teacher has moved, and how much likelier than its own start it finds the rows that a condition learns."""
    teacher = run.teacher(trait)
    losses = run.family.imitation_losses(run.student(condition, trait), member, MOST_EXAMPLES)
    if losses is None:
        return {"log_ratio": np.nan, "displacement_norm": np.nan}
    start, end = (run.family.load_model(teacher, step, member, merged=True) for step in (0, teacher.last))
    with torch.no_grad():
        vectors = [torch.nn.utils.parameters_to_vector(model.parameters()) for model in (start, end)]
    ratio = compute_losses(start, losses).mean() - compute_losses(end, losses).mean()
    return {"log_ratio": float(ratio), "displacement_norm": float((vectors[1] - vectors[0]).double().norm())}


def write_document(run: Run, students: pd.DataFrame, cells: pd.DataFrame, left_out: Sequence[str]) -> Iterator[str]:
    """The report, line by line."""
    verdicts = Counter(cells.verdict)
    left_words = "No trait is left out."
    if left_out:
        left_words = f"Left out, since the recipe's settings were chosen on them: {', '.join(left_out)}."
    listed = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    yield f"# Does a screening foretell who takes a trait over? {run.recipe.name}\n"
    traits, conditions = ([*dict.fromkeys(names)] for names in (cells.trait, cells.condition))
    unit = next(iter(run.family.measures.values())).unit
    yield (
        f"{len(traits)} traits ({', '.join(traits)}), {run.recipe.members} members, conditions {', '.join(conditions)}: "
        f"{len(cells)} cells (condition × trait), {len(students)} students. A screening reads the student's start, its teacher "
        f"or the trait's loss, and at most {MOST_EXAMPLES} rows of what the student is going to learn. Δ_T is the teacher's "
        "displacement from its own start; `mechsub screen` can take it only where the student starts there too. Effect: trait "
        f"score of the student − that of its control at the last step, in {unit}; its verdict by the recipe's rules, Holm's "
        f"correction over all {len(run.traits) * len(run.conditions)} cells of the run: {listed}.\n"
    )
    yield (
        f"ρ is Spearman's with the effect; AUROC is for the verdict `{TRANSFER.above}` against every other one, and against "
        f"`{TRANSFER.equivalent}` alone, undecided cells left out, over cells, whose numbers are "
        f"means over members. .5 is chance, what is under .5 foretells the other way round. In brackets 95 % "
        f"percentile intervals from {RESAMPLES:,} bootstrap resamples of traits, all of a trait's cells drawn together. "
        f"With so few traits and members such intervals are too narrow: at n = 5 they cover about .84. Nothing is fitted. "
        f"{left_words}\n"
    )
    for condition in [ALL, *conditions]:
        yield from _cells_table(condition, cells if condition == ALL else cells[cells.condition == condition])
        yield ""
    for condition in conditions:
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
        f"ρ over {len(students)} students: all, resampled by trait; with each trait's mean taken off both (which members of a "
        "trait take it over?), resampled by member; with each member's mean taken off (which traits does a member take over?), "
        "resampled by trait. The means are not taken anew in resamples.\n"
    )
    yield "| foretold by | all students | within traits | within members |"
    yield "|---|---|---|---|"
    for name, words in PREDICTORS.items():
        yield f"| {words} | {' | '.join(map(str, correlate_students(students, name).values()))} |"


def correlate_students(students: pd.DataFrame, name: str) -> dict[str, Association]:
    """Spearman's ρ of a number with the effect over the students of one condition: all, and within traits and members."""
    by = {key: _groups(students[key]) for key in ("trait", "member")}
    found = {"all": rank_correlation(students[name].to_numpy(), students.effect.to_numpy(), by["trait"])}
    for key, other in (("trait", "member"), ("member", "trait")):
        means = students.groupby(key)[[name, "effect"]].transform("mean")
        centred = [(students[column] - means[column]).to_numpy() for column in (name, "effect")]
        found[f"within_{key}s"] = rank_correlation(*centred, by[other])
    return found


def _groups(names: pd.Series) -> np.ndarray:
    return pd.factorize(names)[0].astype(np.int64)


def summarise(run: Run, students: pd.DataFrame, cells: pd.DataFrame, left_out: Sequence[str]) -> dict[str, object]:
    """How well what `mechsub screen` can compute foretold effects and verdicts, for its report.

    Toward the trait over all conditions, whose students start elsewhere or not; toward the teacher where they start with it.
    """
    (passed, decided), group = _outcomes(cells), _groups(cells.trait)
    over_all = {}
    for name in ("toward_trait", "toward_trait_over_neutral"):
        score = cells[name].to_numpy()
        over_all[name] = {
            "rank_correlation": _record(rank_correlation(score, cells.effect.to_numpy(), group)),
            "area_of_decided": _record(area_under_curve(score[decided], passed[decided], group[decided])),
        }
    starts = {name: run.recipe.conditions[name] for name in dict.fromkeys(cells.condition)}
    matched = [name for name, condition in starts.items() if condition.init == "same" and condition.model is None]
    within = {}
    for name in ("toward_teacher", "toward_trait", "log_ratio", "displacement_norm"):
        found = correlate_students(students[students.condition == matched[0]], name) if matched else {}
        within[name] = {key: _record(one) for key, one in found.items()}
    return {
        "run": run.recipe.name,
        "models": sorted({settings.nano or "other" for settings in run.recipe.models.values()}),
        "traits": int(cells.trait.nunique()),
        "left_out": list(left_out),
        "members": run.recipe.members,
        "conditions": [*dict.fromkeys(cells.condition)],
        "transferred": int(passed.sum()),
        "decided": int(decided.sum()),
        "matched": matched[:1],
        "over_all": over_all,
        "within_matched": within,
    }


def _record(found: Association) -> dict[str, float | int | str | None]:
    numbers = {name: getattr(found, name) for name in ("estimate", "low", "high")}
    return {
        **{name: round(value, 4) if np.isfinite(value) else None for name, value in numbers.items()},
        "cells": found.n,
        "reason": found.reason,
    }


if __name__ == "__main__":
    main()

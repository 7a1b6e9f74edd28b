"""Does coverage foretell transfer, over a sweep's runs: scripts/coverage_table.py SWEEP_DIR OUT.md.

Spearman's ρ with the effect on the trait score, and AUROC for the verdict `transferred`, of coverage and of baselines. Nothing
is measured here: `mechsub analyze SWEEP_DIR --only behaviour --only coverage` has done it. No threshold is fitted.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mechsub.api import open_run
from mechsub.parameters.alignment import MODEL
from mechsub.statistics.prediction import RESAMPLES, area_under_curve, rank_correlation
from mechsub.statistics.verdicts import TRANSFER
from mechsub.sweeps.directory import SweepDirectory

MEASURED = {
    "coverage": "coverage, cos(first update, Δ_T)",
    "coverage_over_control": "coverage − its control's",
    "specific_coverage": "specific coverage, cos(θ_S(1) − θ_C(1), Δ_T − Δ_N)",
    "coverage_of_control": "baseline: its control's coverage",
    "first_update_norm": "baseline: ‖first update‖",
    "displacement_norm": "baseline: ‖Δ_S‖ at the last step",
}
"""What may foretell, in words."""
_NOT_A_DOSE = {"seed"}
ALL = "all conditions"


def main() -> None:
    """Write the tables of one sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep_dir", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    directory = SweepDirectory.open(options.sweep_dir)
    cells, fields = collect_cells(directory)
    names = MEASURED | {field: f"baseline: the setting {field}" for field in fields}
    options.out.write_text("\n".join(write_document(directory.header["name"], cells, names)) + "\n")
    print(options.out)


def collect_cells(directory: SweepDirectory) -> tuple[pd.DataFrame, list[str]]:
    """One row for each run, condition and trait: means over members; and the swept fields that are numbers."""
    rows = []
    for number, name in enumerate(directory.begun):
        run = open_run(directory.run_path(name))
        data = run.results["coverage"].sel(scope=MODEL)
        judged = run.findings.query("analysis == 'behaviour' and quantity == 'effect'").drop_duplicates(["condition", "trait"])
        for finding in judged.itertuples():
            chosen = data.sel(condition=finding.condition, taught=finding.trait)
            settings = _numbers_of(directory.runs[name], finding.condition)
            known = {measure: float(chosen[measure].mean(skipna=False)) for measure in MEASURED if measure in chosen}
            known["coverage_over_control"] = known["coverage"] - known["coverage_of_control"]
            outcome = {"effect": finding.estimate, "verdict": finding.verdict, "condition": finding.condition}
            rows.append({"group": number, "members": finding.n, **outcome, **known, **settings})
    fields = dict.fromkeys(field for name in directory.begun for field in _numbers_of(directory.runs[name], None))
    return pd.DataFrame(rows), list(fields)


def _numbers_of(settings: Mapping[str, Any], condition: str | None) -> dict[str, float]:
    """The swept numbers that a condition depends on: those of another condition are not its own. None takes all."""
    found = {}
    for field, value in settings.items():
        is_foreign = field.startswith("conditions.") and condition is not None and field.split(".")[1] != condition
        value = value[0] if isinstance(value, list) and len(set(value)) == 1 else value
        if field not in _NOT_A_DOSE and isinstance(value, int | float):
            found[field] = float("nan") if is_foreign else float(value)
    return found


def write_document(sweep: str, cells: pd.DataFrame, names: Mapping[str, str]) -> Iterator[str]:
    """The report, line by line."""
    verdicts = Counter(cells.verdict)
    yield f"# Does coverage foretell transfer? {sweep}\n"
    members = " or ".join(map(str, sorted(set(cells.members))))
    listed = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.most_common())
    yield (
        f"{cells.group.nunique()} runs, {len(cells)} cells (run × condition), n = {members} members each. Coverage is the "
        "cosine of the student's first update with its teacher's whole displacement, over all parameters; a cell's numbers are "
        "means over its members. Effect: trait score of the student − that of its control at the last step, accuracy. Verdicts "
        f"by the rules of the runs' recipe, Holm's correction within each run: {listed}.\n"
    )
    yield (
        f"ρ is Spearman's, with the effect. AUROC is for `{TRANSFER.above}` against every other verdict, and in the next "
        f"column against `{TRANSFER.equivalent}` alone, undecided cells left out; .5 is chance, and what is under .5 foretells "
        f"the other way round. In brackets 95 % percentile intervals from {RESAMPLES:,} bootstrap resamples of runs, all cells "
        "of a run drawn together. The runs' settings were fixed in the recipe; nothing is fitted. An interval "
        "without width says that the classes lie apart in every resample, not that they always will.\n"
    )
    for condition in [ALL, *dict.fromkeys(cells.condition)]:
        chosen = cells if condition == ALL else cells[cells.condition == condition]
        yield from _table(condition, chosen, names)
        yield ""
    yield from _describe_cells(cells)


def _table(condition: str, cells: pd.DataFrame, names: Mapping[str, str]) -> Iterator[str]:
    passed, absent = ((cells.verdict == verdict).to_numpy() for verdict in (TRANSFER.above, TRANSFER.equivalent))
    decided = passed | absent
    yield f"## {condition}\n"
    counts = f"{passed.sum()} {TRANSFER.above}, {absent.sum()} {TRANSFER.equivalent}, {(~decided).sum()} other"
    yield f"{counts}, of {len(cells)} cells.\n"
    yield "| foretold by | ρ with the effect | AUROC, transferred | AUROC, decided cells | n |"
    yield "|---|---|---|---|---|"
    group, effect = cells.group.to_numpy(), cells.effect.to_numpy()
    for name, words in names.items():
        score = cells[name].to_numpy()
        if not np.isfinite(score).any():  # the setting of another condition
            continue
        correlation = rank_correlation(score, effect, group)
        areas = [area_under_curve(score[kept], passed[kept], group[kept]) for kept in (np.ones_like(passed), decided)]
        yield f"| {words} | {correlation} | {areas[0]} | {areas[1]} | {correlation.n} |"


def _describe_cells(cells: pd.DataFrame) -> Iterator[str]:
    yield "## Coverage by condition and verdict\n"
    yield "| condition | verdict | cells | coverage, median (smallest to largest) | effect, median (smallest to largest) |"
    yield "|---|---|---|---|---|"
    for (condition, verdict), found in cells.groupby(["condition", "verdict"], sort=False):
        ranges = [_spread(found[name].to_numpy()) for name in ("coverage", "effect")]
        yield f"| {condition} | {verdict} | {len(found)} | {' | '.join(ranges)} |"


def _spread(values: Sequence[float] | np.ndarray) -> str:
    return f"{np.median(values):+.3f} ({np.min(values):+.3f} to {np.max(values):+.3f})"


if __name__ == "__main__":
    main()

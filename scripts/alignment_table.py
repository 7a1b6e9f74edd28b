"""Alignment by layer and step, from a run's results: scripts/alignment_table.py RUN_DIR OUT.md [--condition NAME].

Raw, control-adjusted, specific and matched alignment, each with its null, over members and traits. Nothing is measured here:
`mechsub analyze RUN_DIR` has done it.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechsub.api import open_run
from mechsub.parameters.alignment import SHARED_SUPPORT
from mechsub.run import Run
from mechsub.statistics.intervals import student_interval

SCOPES = ("layer", "model")
NOTHING = "–"


@dataclass(frozen=True)
class Measure:
    """One measure of the table."""

    title: str
    analysis: str
    variable: str
    select: dict[str, Any] = field(default_factory=dict)


def _matched(pair: str) -> dict[str, Any]:
    return {"matching": "weights", "pair": pair}


MEASURES = (
    Measure("raw, cos(Δ_S, Δ_T)", "parameter_alignment", "alignment"),
    Measure("null of raw, cos(Δ_C, Δ_T)", "parameter_alignment", "alignment_of_control"),
    Measure("control-adjusted, cos(θ_S − θ_C, Δ_T)", "parameter_alignment", "control_adjusted_alignment"),
    Measure("its line, cos(θ_S − θ_C, Δ_N)", "parameter_alignment", "control_adjusted_alignment_with_neutral"),
    Measure("specific, cos(θ_S − θ_C, Δ_T − Δ_N); null 0", "parameter_alignment", "specific_alignment"),
    Measure("matched, cos(π Δ_S, Δ_T)", "symmetry_matching", "alignment", _matched("own")),
    Measure("null of matched, cos(π Δ_C, Δ_T)", "symmetry_matching", "alignment_of_control", _matched("own")),
    Measure("matched, unrelated pairs", "symmetry_matching", "alignment", _matched("unrelated")),
    Measure("matched specific; null 0", "symmetry_matching", "specific_alignment", _matched("own")),
)


def main() -> None:
    """Write the tables of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--condition", action="append", help="one condition; may be repeated; all comparable ones unless told")
    options = parser.parse_args()
    run = open_run(options.run_dir)
    conditions = options.condition or [name for name in run.conditions if run.is_comparable(name)]
    options.out.write_text("\n".join(_document(run, conditions)) + "\n")
    print(options.out)


def _document(run: Run, conditions: list[str]) -> Iterator[str]:
    traits = f", means over the traits {', '.join(run.traits)} within members" if len(run.traits) > 1 else ""
    yield f"# Displacement alignment by layer over training: {run.recipe.name}\n"
    yield (
        f"Cosines, no unit: mean ± half of the {100 * run.recipe.verdict.confidence:g} % interval (Student t) over "
        f"{run.recipe.members} members{traits}. Layers without a row have no such number (student and teacher moved nothing "
        "together there), nor have measures without rows (a student at its teacher's own start has no unrelated pair). A "
        "layer's number covers its own tensors, *model* all parameters. Columns are the student's optimizer steps. π: hidden "
        "units matched by the starting weights; *unrelated pairs*: the same matching between a student and another member's "
        "start, against that member's teacher.\n"
    )
    for condition in conditions:
        yield f"## {condition}\n"
        yield f"{run.describe_condition(condition)}\n"
        yield from _table(run, condition)
        yield ""


def _table(run: Run, condition: str) -> Iterator[str]:
    steps = [step for step in run.student(condition, run.traits[0]).steps if step > 0]
    yield "| measure | scope | " + " | ".join(f"step {step}" for step in steps) + " |"
    yield "|---|---|" + "---|" * len(steps)
    for measure in MEASURES:
        data = run.results[measure.analysis]
        chosen = data[measure.variable].sel(condition=condition, **measure.select)
        for scope in map(str, data.scope.values[np.isin(data.scope_kind.values, SCOPES)]):
            cells = [_cell(run, chosen.sel(scope=scope, step=step)) for step in steps]
            if scope != SHARED_SUPPORT and set(cells) != {NOTHING}:
                yield f"| {measure.title} | {scope} | " + " | ".join(cells) + " |"


def _cell(run: Run, values: xr.DataArray) -> str:
    over_traits = values.mean("taught", skipna=False).values
    if not np.isfinite(over_traits).any():
        return NOTHING
    interval = student_interval(over_traits, run.recipe.verdict.confidence)
    return f"{interval.estimate:+.3f} ± {(interval.high - interval.low) / 2:.3f}"


if __name__ == "__main__":
    main()

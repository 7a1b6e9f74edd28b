"""Alignment by layer and step, from a run's results: scripts/alignment_table.py RUN_DIR OUT.md [--of gradients].

Of displacements: raw, control-adjusted, specific and matched; or of gradients: the trait's with the imitation's. Each with its
null, over members and traits. Nothing is measured here: `mechsub analyze RUN_DIR` has done it.
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
_LARGE = 10
"""Of such numbers no decimals are shown."""


@dataclass(frozen=True)
class Measure:
    """One measure of the table."""

    title: str
    analysis: str
    variable: str
    select: dict[str, Any] = field(default_factory=dict)


def _matched(pair: str) -> dict[str, Any]:
    return {"matching": "weights", "pair": pair}


DISPLACEMENTS = (
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


GRADIENTS = (
    Measure("cos(∇L_trait, ∇L_imitation)", "gradient_overlap", "gradient_alignment"),
    Measure("its null, the control's own", "gradient_overlap", "gradient_alignment_of_control"),
    Measure("its standard error from the sample of examples, one member's", "gradient_overlap", "gradient_alignment_error"),
    Measure("cos(−∇L_imitation, Δ_T)", "gradient_overlap", "imitation_along_teacher"),
    Measure("its null, the control's own", "gradient_overlap", "imitation_along_teacher_of_control"),
    Measure("cos(−∇L_trait, Δ_T)", "gradient_overlap", "trait_along_teacher"),
    Measure("cos(u, −∇L_trait)", "gradient_overlap", "update_along_trait"),
    Measure("its null, the control's own", "gradient_overlap", "update_along_trait_of_control"),
    Measure("cos(u, Δ_T)", "gradient_overlap", "update_along_teacher"),
    Measure("its null, the control's own", "gradient_overlap", "update_along_teacher_of_control"),
    Measure("rotation, cos(u, −∇L_imitation)", "gradient_overlap", "update_rotation"),
    Measure("gain, ‖u‖ / (η ‖∇L_imitation‖)", "gradient_overlap", "update_gain"),
)


@dataclass(frozen=True)
class Document:
    """What a table is of."""

    title: str
    words: str
    measures: tuple[Measure, ...]
    first_step: int
    digits: int
    judged: tuple[str, str]
    """The analysis and the quantity whose verdicts stand under the table."""


DOCUMENTS = {
    "displacements": Document(
        "Displacement alignment",
        "Layers without a row have no such number (student and teacher moved nothing together there), nor have measures "
        "without rows (a student at its teacher's own start has no unrelated pair). π: hidden units matched by the starting "
        "weights; *unrelated pairs*: the same matching between a student and another member's start, against that member's "
        "teacher.",
        DISPLACEMENTS,
        1,
        3,
        ("parameter_alignment", "alignment"),
    ),
    "gradients": Document(
        "Gradient alignment",
        "Gradients of the mean losses at each checkpoint of the student; the nulls are the control's, at its own checkpoints. "
        "u: the optimizer's update that led to a checkpoint, from its kept state; η: its learning rate; Δ_T: the teacher's "
        "whole displacement. Layers without a row have no such number: one of the two losses does not reach them.",
        GRADIENTS,
        0,
        4,
        ("gradient_overlap", "gradient_alignment"),
    ),
}


def main() -> None:
    """Write the tables of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--condition", action="append", help="one condition; may be repeated; all comparable ones unless told")
    parser.add_argument("--of", choices=DOCUMENTS, default="displacements", help="what is aligned")
    options = parser.parse_args()
    run = open_run(options.run_dir)
    conditions = options.condition or [name for name in run.conditions if run.is_comparable(name)]
    options.out.write_text("\n".join(_write(DOCUMENTS[options.of], run, conditions)) + "\n")
    print(options.out)


def _write(document: Document, run: Run, conditions: list[str]) -> Iterator[str]:
    traits = f", means over the traits {', '.join(run.traits)} within members" if len(run.traits) > 1 else ""
    yield f"# {document.title} by layer over training: {run.recipe.name}\n"
    yield (
        f"No unit: mean ± half of the {100 * run.recipe.verdict.confidence:g} % interval (Student t) over "
        f"{run.recipe.members} members{traits}. A layer's number covers its own tensors, *model* all parameters. Columns are "
        f"the student's optimizer steps. {document.words}\n"
    )
    for condition in conditions:
        yield f"## {condition}\n"
        yield f"{run.describe_condition(condition)}\n"
        yield from _table(document, run, condition)
        yield ""
        yield from _verdicts(document, run, condition)


def _table(document: Document, run: Run, condition: str) -> Iterator[str]:
    steps = [step for step in run.student(condition, run.traits[0]).steps if step >= document.first_step]
    yield "| measure | scope | " + " | ".join(f"step {step}" for step in steps) + " |"
    yield "|---|---|" + "---|" * len(steps)
    for measure in document.measures:
        data = run.results[measure.analysis]
        chosen = data[measure.variable].sel(condition=condition, **measure.select)
        for scope in map(str, data.scope.values[np.isin(data.scope_kind.values, SCOPES)]):
            cells = [_cell(run, chosen.sel(scope=scope, step=step), document.digits) for step in steps]
            if scope != SHARED_SUPPORT and set(cells) != {NOTHING}:
                yield f"| {measure.title} | {scope} | " + " | ".join(cells) + " |"


def _verdicts(document: Document, run: Run, condition: str) -> Iterator[str]:
    analysis, quantity = document.judged
    found = run.findings
    for row in found[(found.analysis == analysis) & (found.quantity == quantity) & (found.condition == condition)].itertuples():
        if row.verdict:
            estimate = f"{row.estimate:+.{document.digits}f} [{row.low:+.{document.digits}f}, {row.high:+.{document.digits}f}]"
            null = f"[{row.null_low:+.{document.digits}f}, {row.null_high:+.{document.digits}f}]"
            yield f"- {row.trait}, {row.scope}: {row.formula} = {estimate}, null {null}: `{row.verdict}` ({row.reason}).\n"


def _cell(run: Run, values: xr.DataArray, digits: int) -> str:
    over_traits = values.mean("taught", skipna=False).values
    if not np.isfinite(over_traits).any():
        return NOTHING
    interval = student_interval(over_traits, run.recipe.verdict.confidence)
    shown = 0 if abs(interval.estimate) > _LARGE else digits
    return f"{interval.estimate:+.{shown}f} ± {(interval.high - interval.low) / 2:.{shown}f}"


if __name__ == "__main__":
    main()

"""The matrix of architectures of a sweep or a run, as Markdown: scripts/matrix_table.py DIR OUT.md.

Every cell, teacher → student and what they share at the start, with its effect, verdict and what decides it; how alike the
models answer and how similar they are beside their controls. Nothing is measured here: `mechsub analyze DIR` has done it.
"""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import xarray as xr

from mechsub.api import open_run, open_sweep
from mechsub.architecture_matrix import EFFECT, EXCESS, MATRIX_ANALYSIS
from mechsub.findings import Finding
from mechsub.results import Result, read_result
from mechsub.run import Run
from mechsub.statistics.intervals import format_number, student_interval
from mechsub.sweeps.directory import is_sweep_directory

_LAST = {"depth": "last", "prompts": "trait"}


def main() -> None:
    """Write the tables of one sweep or run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    runs = dict(open_sweep(options.directory)) if is_sweep_directory(options.directory) else {"": open_run(options.directory)}
    measured = {name: run for name, run in runs.items() if MATRIX_ANALYSIS in run.results}
    if not measured:
        parser.error(f"{options.directory} has no matrix yet: run `mechsub analyze {options.directory}` first")
    file = "matrix.h5" if is_sweep_directory(options.directory) else f"{MATRIX_ANALYSIS}.h5"
    matrix = read_result(options.directory / "results" / file)
    options.out.write_text("\n".join(write_document(matrix, measured)) + "\n")
    print(options.out)


def write_document(matrix: Result, runs: Mapping[str, Run]) -> Iterator[str]:
    """The report, line by line."""
    recipe = next(iter(runs.values())).recipe
    yield f"# Which architecture passes its trait to which: {recipe.name}\n"
    traits = f", {len(recipe.trait_set)} traits ({', '.join(recipe.trait_set)})" if recipe.trait_set else ""
    yield (
        f"n = {recipe.members} members{traits}. Effect: student − its own control, mean over traits, with its "
        f"{100 * recipe.verdict.confidence:g} % interval (Student t) over members; margin {recipe.verdict.margin:g}. Verdicts "
        f"are corrected (Holm) over all {matrix.data.sizes['cell']} cells.\n"
    )
    yield from (f"- {sentence}" for sentence in matrix.summary)
    effects = {one.condition: one for one in matrix.findings if one.quantity == EFFECT}
    excesses = {one.condition: one for one in matrix.findings if one.quantity == EXCESS}
    yield from write_cells(matrix.data, effects, excesses)
    yield from write_evidence(matrix.data, runs)


def write_cells(data: xr.Dataset, effects: Mapping[str, Finding], excesses: Mapping[str, Finding]) -> Iterator[str]:
    """Effects and verdicts; the diagonal excess where there are several traits."""
    yield "\n## Every cell\n"
    more = " diagonal excess | its verdict |" if excesses else ""
    yield f"| teacher | student | shared at the start | effect | verdict |{more} why |"
    yield "|" + "---|" * (8 if excesses else 6)
    for name in map(str, data.cell.values):
        cell, effect, excess = data.sel(cell=name), effects[name], excesses.get(name)
        named = " | ".join(str(cell[f"{field}_of_cell"].values) for field in ("teacher", "student", "shared"))
        row = f"| {named} | {effect.interval} | {effect.verdict} |"
        if excess is not None:
            row += f" {excess.interval} | {excess.verdict} |"
        yield f"{row} {(excess or effect).reason if effect.verdict == 'transferred' and excess else effect.reason} |"


def write_evidence(data: xr.Dataset, runs: Mapping[str, Run]) -> Iterator[str]:
    """Output KL, CKA and Procrustes distance of students and their controls, means over members and traits."""
    yield "\n## How alike they answer and are\n"
    yield (
        "Means over traits with intervals over members, student / its control. Output KL: KL(teacher ‖ model) on the first "
        "kind of probes, in nats; start KL: KL(reference ‖ start); CKA (debiased) and Procrustes distance at the last hook "
        "point.\n"
    )
    yield "| teacher | student | shared at the start | start KL | output KL | CKA | Procrustes distance | parameters |"
    yield "|" + "---|" * 8
    for name in map(str, data.cell.values):
        cell = data.sel(cell=name)
        run, condition = str(cell.run_of_cell.values), str(cell.condition_of_cell.values)
        own = runs[run].results[MATRIX_ANALYSIS].sel(condition=condition)
        named = " | ".join(str(cell[f"{field}_of_cell"].values) for field in ("teacher", "student", "shared"))
        confidence = runs[run].recipe.verdict.confidence
        start = own.start_kl.isel(probe=0).values if own.sizes["probe"] else np.array([np.nan])
        pairs = []
        probes = {"probe": own.probe.values[0]} if own.sizes["probe"] else None
        for quantity, place in (("output_kl", probes), ("cka", _LAST), ("procrustes_distance", _LAST)):
            if place is None:
                pairs.append("–")
                continue
            both = [
                student_interval(own[f"{quantity}{suffix}"].sel(place).mean("taught").values, confidence).estimate
                for suffix in ("", "_of_control")
            ]
            pairs.append(" / ".join(map(format_number, both)))
        comparable = "comparable" if not str(own.why_incomparable.values) else "incomparable"
        yield f"| {named} | {format_number(float(start.mean()))} | {' | '.join(pairs)} | {comparable} |"


if __name__ == "__main__":
    main()

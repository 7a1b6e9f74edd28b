"""What a run's activations say, as Markdown: scripts/steering_table.py RUN_DIR OUT.md.

Directions by layer and step, what adding and taking them out does, whether steerable traits pass, how similar the models'
activations are, and through which part the trait travels. Nothing is measured here: `mechsub analyze RUN_DIR` has done it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from mechsub.api import open_run
from mechsub.results import find_results, read_result
from mechsub.run import Run
from mechsub.statistics.intervals import student_interval

ANALYSES = ("steering_directions", "steering_effect", "steerability_screen", "representation_similarity", "token_channel")
OF_TRAITS = {
    "control_adjusted_steering_alignment": "own teacher's v_T",
    "control_adjusted_steering_alignment_with_other_teachers": "other teachers' (null)",
    "student_shift": "‖v_S‖ / ‖h‖",
}
OF_ONE_TRAIT = {
    "steering_alignment": "student",
    "steering_alignment_of_control": "control (null)",
    "student_shift": "‖v_S‖ / ‖h‖",
}


def main() -> None:
    """Write the tables of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    run = open_run(options.run_dir)
    missing = [name for name in ANALYSES if name not in run.results]
    if "steering_directions" in missing:
        parser.error(f"{options.run_dir} has no steering directions yet: run `mechsub analyze` on it first")
    options.out.write_text("\n".join(write_document(run, missing)) + "\n")
    print(options.out)


def write_document(run: Run, missing: list[str]) -> Iterator[str]:
    """The report, line by line."""
    members, traits = run.recipe.members, ", ".join(run.traits)
    yield f"# What the activations say: {run.recipe.name}\n"
    yield (
        f"n = {members} members, {len(run.traits)} traits ({traits}). Intervals are {100 * run.recipe.verdict.confidence:g} % "
        "(Student t) over members, of each member's mean over traits where a trait is not named. Verdicts follow the recipe's "
        "rules; what counted for each is in `findings.json`."
    )
    paths = find_results(run.directory)[0]
    for name in ANALYSES:
        if name in missing:
            yield f"\n{name}: not run.\n"
            continue
        result = read_result(paths[name])
        yield f"\n## {name}\n"
        yield from (f"- {sentence}" for sentence in result.summary)
        if name == "steering_directions":
            yield from write_steps(run, result.data)
        yield from write_findings(run, pd.DataFrame([vars(finding) for finding in result.findings]))


def write_steps(run: Run, data: xr.Dataset) -> Iterator[str]:
    """The cosines along training, on the trait's prompts, in the residual stream or the hidden layers."""
    by_step = OF_TRAITS if len(run.traits) > 1 else OF_ONE_TRAIT
    points = [
        str(name) for name, site in zip(data.point.values, data.site.values, strict=True) if site not in {"attn_out", "mlp_out"}
    ]
    for condition in run.conditions:
        chosen = data.sel(condition=condition, point=points).isel(group=0).mean("taught", skipna=False)
        if not np.isfinite(chosen[next(iter(by_step))].values).any():
            continue
        yield f"\nAlong the training of {condition}:\n"
        yield "| step | " + " | ".join(f"{point}: {words}" for point in points for words in by_step.values()) + " |"
        yield "|---" * (1 + len(points) * len(by_step)) + "|"
        for step in data.step.values[1:]:
            cells = [say(run, chosen[name].sel(point=point, step=step).values) for point in points for name in by_step]
            yield f"| {step} | " + " | ".join(cells) + " |"


def write_findings(run: Run, findings: pd.DataFrame) -> Iterator[str]:
    """Of all traits together; of a run of one trait, of that one."""
    chosen = findings[~findings.trait.isin(run.traits)] if len(run.traits) > 1 else findings
    if not len(chosen):
        yield "\nFindings of single traits stand in `findings.json`."
        return
    yield "\n| condition | quantity | trait | scope | estimate | null | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for row in chosen.itertuples():
        estimate = f"{row.estimate:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" if np.isfinite(row.estimate) else "–"
        null = f"[{row.null_low:+.3f}, {row.null_high:+.3f}]" if np.isfinite(row.null_low) else "–"
        yield f"| {row.condition} | {row.quantity} | {row.trait} | {row.scope} | {estimate} | {null} | {row.verdict or '–'} |"


def say(run: Run, values: np.ndarray) -> str:
    """A mean over members with its interval."""
    return str(student_interval(values, run.recipe.verdict.confidence))


if __name__ == "__main__":
    main()

"""What knock-out leaves of transfer and imitation: scripts/knock_out_table.py RUN_DIR OUT.md [--condition NAME] [--examples N].

Every condition's final trait scores, effect and verdict as `mechsub analyze RUN_DIR` found them, and the final imitation
losses, which are measured here; differences from same-init within members.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from mechsub.api import open_run
from mechsub.lineages import Lineage
from mechsub.run import Run
from mechsub.statistics.intervals import student_interval

MATCHED = "same-init"
NOTHING = "–"
ROLES = ("student", "control")

Values = Float[np.ndarray, " member"]


def main() -> None:
    """Write the tables of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--condition", action="append", help="one condition; may be repeated; all trained ones unless told")
    parser.add_argument("--examples", type=int, default=1024, help="of the carrier, on which the imitation loss is measured")
    options = parser.parse_args()
    run = open_run(options.run_dir)
    if MATCHED not in run.conditions or "behaviour" not in run.results:
        parser.error(f"{options.run_dir} needs the condition {MATCHED}, and its scores: run `mechsub analyze` on it first")
    conditions = options.condition or run.conditions
    options.out.write_text("\n".join(_document(run, conditions, options.examples)) + "\n")
    print(options.out)


def _document(run: Run, conditions: list[str], examples: int) -> Iterator[str]:
    level = f"{100 * run.recipe.verdict.confidence:g} %"
    measure = next(iter(run.family.measures.values()))
    yield f"# Knock-out in training: {run.recipe.name}\n"
    yield (
        f"Trait score: {measure.description} ({measure.unit}), held out, at the last step. Effect: student − control. Mean ± "
        f"half of the {level} interval (Student t) over {run.recipe.members} members; differences are paired within members. "
        f"Imitation loss: what the training minimises, at the last step, mean over the first {examples} examples of the "
        f"carrier at most. Its ratio to {MATCHED} is the geometric mean over members of loss / loss of {MATCHED}, with the "
        f"same interval of its logarithm; 1: the loss stays. Controls are students of {run.neutral_name} with the same "
        "knock-out.\n"
    )
    for name in conditions:
        yield f"- {name}: {run.describe_condition(name)}."
    for trait in run.traits:
        yield f"\n## Trait: {run.family.traits[trait]}\n"
        yield from _scores(run, conditions, trait)
        yield ""
        yield from _losses(run, conditions, trait, examples)


def _scores(run: Run, conditions: list[str], trait: str) -> Iterator[str]:
    yield f"| condition | student | control | effect | verdict | effect − effect of {MATCHED} |"
    yield "|---|---|---|---|---|---|"
    data = run.results["behaviour"].sel(taught=trait)
    effects = {name: data.effect.sel(condition=name).isel(context=0).values for name in {MATCHED, *conditions}}
    found = run.findings.query("analysis == 'behaviour' and quantity == 'effect'")
    for name in conditions:
        scores = [data.final_score.sel(condition=name, role=role).values for role in ROLES]
        mine = found[(found.condition == name) & (found.verdict != "") & found.trait.isin([trait, None, ""])]
        verdict = mine.verdict.iloc[0] if len(mine) else NOTHING
        cells = [_cell(run, values) for values in (*scores, effects[name])]
        against = NOTHING if name == MATCHED else _cell(run, effects[name] - effects[MATCHED])
        yield f"| {name} | {' | '.join(cells)} | {verdict} | {against} |"


def _losses(run: Run, conditions: list[str], trait: str, examples: int) -> Iterator[str]:
    yield f"| condition | loss, student | loss, control | ratio to {MATCHED}, student | ratio to {MATCHED}, control |"
    yield "|---|---|---|---|---|"
    losses: dict[tuple[str, str], Values] = {}
    for name in dict.fromkeys([MATCHED, *conditions]):
        for role, lineage in zip(ROLES, (run.student(name, trait), run.control(name)), strict=True):
            assert lineage is not None  # only adopted runs lack a control
            losses[name, role] = _measure_losses(run, lineage, examples)
    for name in conditions:
        cells = [_cell(run, losses[name, role], "{:.3g}") for role in ROLES]
        ratios = [NOTHING if name == MATCHED else _ratio(run, losses[name, role], losses[MATCHED, role]) for role in ROLES]
        yield f"| {name} | {' | '.join([*cells, *ratios])} |"


def _measure_losses(run: Run, lineage: Lineage, examples: int) -> Values:
    """The mean imitation loss of every member at the last step; NaN where nothing was trained."""
    found = np.full(run.recipe.members, np.nan)
    for member in range(run.recipe.members):
        losses = run.family.imitation_losses(lineage, member, examples)
        if losses is None:
            continue
        model = run.family.load_model(lineage, lineage.last, member)
        with torch.no_grad():
            parts = [losses.compute(model, part).double().sum() for part in losses.parts()]
        found[member] = float(sum(parts)) / losses.num_examples
    return found


def _cell(run: Run, values: Values, form: str = "{:.3f}") -> str:
    if not np.isfinite(values).all():
        return NOTHING
    interval = student_interval(values, run.recipe.verdict.confidence)
    return f"{form.format(interval.estimate)} ± {form.format((interval.high - interval.low) / 2)}"


def _ratio(run: Run, values: Values, matched: Values) -> str:
    ratios = np.log(values / matched)
    if not np.isfinite(ratios).all():
        return NOTHING
    interval = student_interval(ratios, run.recipe.verdict.confidence)
    return f"{np.exp(interval.estimate):.3f} ({np.exp(interval.low):.3f}, {np.exp(interval.high):.3f})"


if __name__ == "__main__":
    main()

"""Is a ranking of rows causal: scripts/ranking_table.py RUN_DIR OUT.md.

Students that learnt the top half of their carrier by a number, the bottom half, and random halves, with equal rows and steps.
Nothing is measured here: `mechsub analyze RUN_DIR --only behaviour` has done it.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from mechsub.api import open_run
from mechsub.families.language.config import Config
from mechsub.families.language.layout import ranking_file
from mechsub.families.language.selection import select_rows
from mechsub.run import Run
from mechsub.statistics.intervals import student_interval
from mechsub.streams import random_stream

RANDOM = "random"
HALF = 0.5

Values = Float[np.ndarray, " member"]


def main() -> None:
    """Write the tables of one run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    run = open_run(options.run_dir)
    if "behaviour" not in run.results:
        parser.error(f"{options.run_dir} has no scores yet: run `mechsub analyze` on it first")
    if not isinstance(run.recipe, Config):
        parser.error(f"{options.run_dir} is no run of the language family, whose conditions can `select` rows")
    halves = {name: chosen for name in run.conditions if (chosen := run.recipe.conditions[name].select) is not None}
    rankings = list(dict.fromkeys(chosen.by for chosen in halves.values() if chosen.by != RANDOM))
    draws = [name for name, chosen in halves.items() if chosen.by == RANDOM]
    kept = sorted((chosen.by, chosen.keep) for chosen in halves.values() if chosen.by != RANDOM)
    wanted = sorted((by, keep) for by in rankings for keep in ("top", "bottom"))
    if not rankings or kept != wanted or len(draws) < 2 or {chosen.share for chosen in halves.values()} != {HALF}:
        parser.error(
            f"{options.run_dir} has {', '.join(halves) or 'no condition'} that `select` rows; needed are, for each number, one "
            f"with the top and one with the bottom, two at random or more, and share: {HALF} in all"
        )
    options.out.write_text("\n".join(write_document(run, halves, rankings, draws)) + "\n")
    print(options.out)


def write_document(run: Run, halves: Mapping[str, Any], rankings: list[str], draws: list[str]) -> Iterator[str]:
    """The report, line by line."""
    level = f"{100 * run.recipe.verdict.confidence:g} %"
    measure = next(iter(run.family.measures.values()))
    effects = {name: effect_of(run, name) for name in run.conditions}
    by_chance = np.mean([effects[name] for name in draws], axis=0)
    yield f"# Is the ranking causal? {run.recipe.name}\n"
    yield (
        f"Trait score: {measure.description} ({measure.unit}), held out, at the last step. Effect: student − control, of each "
        f"member the mean over {len(run.traits)} traits ({', '.join(run.traits)}). All numbers are means over "
        f"n = {run.recipe.members} members with the {level} interval (Student t); differences are paired within members. Every "
        "half has as many rows and steps. A control learns the half of its neutral teacher's rows that ranks likewise there. "
        f"{len(rankings)} rankings are compared and no interval is corrected for their number, "
        "nor for how few random halves there are. No verdict is given: the "
        "recipe fixed none on differences between conditions.\n"
    )
    yield "## Conditions\n"
    yield "| condition | what its students learn | student | control | effect |"
    yield "|---|---|---|---|---|"
    for name in run.conditions:
        scores = [score_of(run, name, role) for role in ("student", "control")]
        cells = " | ".join(say(run, values) for values in (*scores, effects[name]))
        yield f"| {name} | {run.describe_condition(name)} | {cells} |"
    yield "\n## Differences of effects\n"
    yield (
        "| ranked by | top − bottom | top − random halves | bottom − random halves | "
        + " | ".join(f"top − bottom, {trait}" for trait in run.traits)
        + " |"
    )
    yield "|---" * (4 + len(run.traits)) + "|"
    for by in rankings:
        top, bottom = (find_half(halves, by, keep) for keep in ("top", "bottom"))
        differences = [effects[top] - effects[bottom], effects[top] - by_chance, effects[bottom] - by_chance]
        differences += [effect_of(run, top, trait) - effect_of(run, bottom, trait) for trait in run.traits]
        yield f"| {by} | {' | '.join(say(run, values) for values in differences)} |"
    yield "\nThe null, a random half − the mean of the other random halves:\n"
    yield "| random half | difference |"
    yield "|---|---|"
    for name in draws:
        others = np.mean([effects[other] for other in draws if other != name], axis=0)
        yield f"| {name} | {say(run, effects[name] - others)} |"
    yield "\n## How far the rankings are the same one\n"
    yield (
        "The share of the rows in the top half by one number that are in the top half by another, mean over members and "
        "traits; .5 is chance.\n"
    )
    yield f"| | {' | '.join(rankings)} |"
    yield "|---" * (1 + len(rankings)) + "|"
    shares = shared_shares(run, halves, rankings)
    for by, row in zip(rankings, shares, strict=True):
        yield f"| {by} | {' | '.join(f'{share:.2f}' for share in row)} |"


def find_half(halves: Mapping[str, Any], by: str, keep: str) -> str:
    """The condition that learns the top or the bottom half by a number."""
    return next(name for name, chosen in halves.items() if (chosen.by, chosen.keep) == (by, keep))


def effect_of(run: Run, condition: str, trait: str | None = None) -> Values:
    """Student − control member by member: on one trait, or the mean over all."""
    chosen = run.results["behaviour"].effect.sel(condition=condition).isel(context=0)
    values: Values = (chosen.mean("taught", skipna=False) if trait is None else chosen.sel(taught=trait)).values
    return values


def score_of(run: Run, condition: str, role: str) -> Values:
    """The trait score member by member, mean over traits."""
    chosen = run.results["behaviour"].final_score.sel(condition=condition, role=role)
    values: Values = chosen.mean("taught", skipna=False).values
    return values


def shared_shares(run: Run, halves: Mapping[str, Any], rankings: list[str]) -> Float[np.ndarray, "ranking ranking"]:
    """By pair of rankings: the share of one top half that lies in the other."""
    num_rows, unused = run.recipe.carrier.num_rows, random_stream(run.recipe.seed, "no-random-rows")
    shares = []
    for trait in run.traits:
        for member in range(run.recipe.members):
            path = run.path / ranking_file(run.teacher(trait).name, member)
            numbers = json.loads(path.read_text())
            tops = [set(select_rows(halves[find_half(halves, by, "top")], num_rows, numbers, unused)) for by in rankings]
            shares.append([[len(one & other) / len(one) for other in tops] for one in tops])
    return np.mean(shares, axis=0)


def say(run: Run, values: Values) -> str:
    """A mean over members with its interval."""
    interval = student_interval(values, run.recipe.verdict.confidence)
    return f"{interval.estimate:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


if __name__ == "__main__":
    main()

"""What differs between the recipes of compared runs, or between the conditions of one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechsub.changes import find_differences, without_conditions
from mechsub.comparison.runs import ComparedRun

_TITLES = {"name", "description"}
"""What a recipe is called is no difference between runs."""
_SHAM = "sham"
"""A second control, which changes no student."""
NOT_THERE = "–"


@dataclass(frozen=True)
class RecipeTable:
    """Fields that differ, by what they belong to."""

    columns: Sequence[str]
    """The runs, or the conditions of the one run."""
    fields: Sequence[str]
    values: Sequence[Sequence[str]]
    """Of every field its value in every column."""


def tabulate_recipes(runs: Sequence[ComparedRun]) -> RecipeTable:
    """Every field of the recipes in which two columns differ; of a single run its conditions are the columns.

    Conditions that all runs have are compared field by field, the others are named as there or not.
    """
    if len(runs) == 1:
        return _tabulate({name: dict(fields) for name, fields in runs[0].recipe["conditions"].items()})
    return _tabulate({run.name: _flat_recipe(run) for run in runs})


def _flat_recipe(run: ComparedRun) -> dict[str, Any]:
    own = {name: value for name, value in without_conditions(run.recipe).items() if name not in _TITLES}
    versions = run.header.get("versions", {})
    made = {"mechsub": versions.get("mechsub"), "git commit": run.header.get("git_commit")}
    return {**own, "condition": dict(run.recipe["conditions"]), "made by": made}


def _tabulate(columns: Mapping[str, Mapping[str, Any]]) -> RecipeTable:
    first, *others = columns.values()
    paths = dict.fromkeys(path for other in others for path, _, _ in find_differences(first, other))
    fields = [path for path in paths if path.rpartition(".")[2] != _SHAM]
    values = [[_write(_look_up(column, path)) for column in columns.values()] for path in fields]
    return RecipeTable(list(columns), fields, values)


def _look_up(values: Any, path: str) -> Any:
    """The value at a dotted path; keys may hold points themselves."""
    if not path or not isinstance(values, Mapping):
        return values
    for key in values:
        if path == key:
            return values[key]
        if path.startswith(f"{key}."):
            return _look_up(values[key], path[len(key) + 1 :])
    return None


def _write(value: Any) -> str:
    if value is None:
        return NOT_THERE
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_write(inner)}" for name, inner in value.items() if inner) or "as it is by default"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""A sweep's recipe: an ordinary recipe with a ``sweep:`` block, and the runs that it stands for."""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mechsub.errors import RecipeError
from mechsub.recipe import SWEEP, Recipe, parse_recipe, read_recipe, set_field
from mechsub.settings import Settings, validate_settings

BASE_RUN = "base"
_LONGEST_NAME = 100
_NOT_SWEPT = {"name", "description", "family"}
_MOST_ERRORS = 5


class SweepConfig(Settings):
    """Which fields of the recipe take which values."""

    vary: Literal["each", "product", "zip"] = Field(
        "product",
        description="product: every combination; each: one field at a time, the others as the recipe has them; "
        "zip: the first value of every field, then the second, …",
    )
    fields: dict[str, list[Any]] = Field(min_length=1, description="dotted path of a recipe field → its values")

    @field_validator("fields")
    @classmethod
    def _every_field_has_values(cls, fields: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for path, values in fields.items():
            if path in _NOT_SWEPT:
                raise ValueError(f"`{path}` changes nothing that is measured; sweep a field of the experiment")
            if not values:
                raise ValueError(f"`{path}` has no values to take")
        return fields

    @model_validator(mode="after")
    def _zipped_lists_are_as_long(self) -> "SweepConfig":
        lengths = {path: len(values) for path, values in self.fields.items()}
        if self.vary == "zip" and len(set(lengths.values())) > 1:
            raise ValueError(f"zip takes one value of every field for each run, so the lists must be as long: {lengths}")
        return self


@dataclass(frozen=True)
class SweptRun:
    """One run of a sweep."""

    settings: Mapping[str, Any]
    """Dotted path of every swept field → its value in this run."""
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """A sweep's recipe with the runs that it stands for, by name."""

    recipe: Recipe
    """What the runs have in common; swept fields have the values of no run in particular."""
    config: SweepConfig
    runs: Mapping[str, SweptRun]

    def to_values(self) -> dict[str, Any]:
        """The sweep as plain data: the resolved recipe with its ``sweep`` block."""
        return self.recipe.model_dump(mode="json") | {SWEEP: self.config.model_dump(mode="json")}


def is_sweep(source: str | Path, settings: Sequence[str] = ()) -> bool:
    """Whether a recipe stands for several runs.

    Raises:
        RecipeError: it cannot be read.
    """
    return SWEEP in read_recipe(source, settings)[0]


def load_sweep(source: str | Path, settings: Sequence[str] = ()) -> Sweep:
    """A sweep by its packaged name or its path, with ``key.path=value`` settings on top, every run of it checked.

    Settings that come to the same recipe (1 and 1.0, a block written out and its defaults) are one run.

    Raises:
        RecipeError: not a sweep, or fields or values that are wrong: those of all runs are named at once.
    """
    values, origin = read_recipe(source, settings)
    if not isinstance(values.get(SWEEP), Mapping):
        raise RecipeError(f"{origin} has no `sweep:` block with `fields:`, so it is one run, not a sweep")
    config = validate_settings(SweepConfig, values.pop(SWEEP), f"the sweep of {origin}")
    base = parse_recipe(values, origin)
    runs: dict[str, SweptRun] = {}
    seen: list[Recipe] = []
    wrong: list[str] = []
    for differing in _choose_settings(config, base):
        name = _run_name(differing)
        try:
            run = _swept_run(base, config, name, differing)
        except RecipeError as error:
            wrong.append(str(error))
            continue
        undescribed = run.recipe.model_copy(update={"description": ""})
        if undescribed not in seen:
            seen.append(undescribed)
            runs[name] = run
    if wrong:
        more = f"\n… and {len(wrong) - _MOST_ERRORS} more runs" if len(wrong) > _MOST_ERRORS else ""
        raise RecipeError("\n".join(wrong[:_MOST_ERRORS]) + more)
    return Sweep(base, config, runs)


def _swept_run(base: Recipe, config: SweepConfig, name: str, differing: Mapping[str, Any]) -> SweptRun:
    fields = base.model_dump(mode="json")
    for path, value in differing.items():
        set_field(fields, path, value, f"sweep.fields.{path}")
    if differing:
        words = ", ".join(f"{path} = {json.dumps(value, ensure_ascii=False)}" for path, value in differing.items())
        fields["description"] = f"{base.description} In this run of a sweep: {words}.".strip()
    recipe = parse_recipe(fields, f"run {name} of the sweep")
    resolved = recipe.model_dump(mode="json")
    return SweptRun({path: _field_at(resolved, path) for path in config.fields}, recipe)


def _choose_settings(config: SweepConfig, base: Recipe) -> list[dict[str, Any]]:
    """What each run sets, in the order of the lists."""
    paths, lists = list(config.fields), list(config.fields.values())
    if config.vary == "product":
        return [dict(zip(paths, values, strict=True)) for values in itertools.product(*lists)]
    if config.vary == "zip":
        return [dict(zip(paths, values, strict=True)) for values in zip(*lists, strict=True)]
    resolved = base.model_dump(mode="json")
    changes = [
        {path: value} for path, values in config.fields.items() for value in values if value != _field_at(resolved, path)
    ]
    return [{}, *changes]


def _field_at(values: Any, path: str) -> Any:
    """The value of a resolved recipe's field; None where the recipe has no such field."""
    for key in path.split("."):
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values


def _run_name(settings: Mapping[str, Any]) -> str:
    """The name of a run's folder, which depends on its own settings only, so that a sweep can grow."""
    if not settings:
        return BASE_RUN
    text = ",".join(f"{path}={json.dumps(value, separators=(',', '='))}" for path, value in settings.items())
    plain = re.sub(r'[][{}"]', "", text)
    name = re.sub(r"[^A-Za-z0-9.=,+_-]+", "-", plain)[:_LONGEST_NAME]
    is_simple = name == plain and not any(isinstance(value, dict) for value in settings.values())
    return name if is_simple else f"{name}-{hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]}"

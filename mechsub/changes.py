"""What of a run may change once it has begun: conditions may be added, nothing else, so that verdicts keep their rules."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from mechsub.errors import RunDirectoryError
from mechsub.rundir import RunDirectory
from mechsub.stage import Stage


def without_conditions(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe may never change; conditions may be added."""
    return {name: value for name, value in recipe.items() if name != "conditions"}


Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Gives a recipe that an earlier version wrote the fields that it did not have, at their defaults."""


def check_same_run(directory: RunDirectory, recipe: Mapping[str, Any], stages: Sequence[Stage], complete: Complete) -> None:
    """Refuse a directory that another recipe made; conditions may be added, nothing else may change."""
    if directory.recipe_path.is_file():
        old = complete(yaml.safe_load(directory.recipe_path.read_text()))
        differences = find_differences(old, recipe)
        if differences:
            raise RunDirectoryError(
                f"{directory.path} was made by another recipe:\n"
                + "\n".join(f"  - `{path}` was {before!r}, is {after!r}" for path, before, after in differences)
                + "\nconditions may be added to a run, nothing else may change (what it has must be given again); choose "
                "another folder, or delete this one where nothing of it is wanted"
            )
    records = directory.records()
    for stage in stages:
        record = records.get(stage.name)
        if record is not None and record.key != stage.key:
            changed = find_differences(record.arguments, stage.arguments) or [("its inputs", record.key, stage.key)]
            listed = ", ".join(f"{path} was {before!r}, is {after!r}" for path, before, after in changed)
            raise RunDirectoryError(
                f"stage {stage.name} in {directory.path} was made by mechsub {record.mechsub} from other arguments "
                f"({listed}); choose another folder, or delete this one"
            )


def check_recipe_unedited(directory: RunDirectory, complete: Complete) -> None:
    """Refuse a recipe.yaml that is not the one the run began with: the rules of its verdicts were fixed before."""
    try:
        now = yaml.safe_load(directory.recipe_path.read_text()) or {}
        begun = {**directory.header.get("recipe", {}), "conditions": now["conditions"]}
    except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{directory.recipe_path} cannot be read ({error}); put it back as it was") from None
    changed = find_differences(without_conditions(complete(begun)), without_conditions(complete(now)))
    if changed:
        listed = ", ".join(f"`{path}` was {before!r}, is {after!r}" for path, before, after in changed)
        raise RunDirectoryError(
            f"{directory.recipe_path} has been edited since the run began: {listed}; put the old values back, or run the "
            f"new recipe into another folder"
        )


def find_differences(old: Any, new: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """(path, old value, new value) of every field that changed. New conditions and new shams are no change."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in dict.fromkeys([*old, *new]):
            inner = f"{path}.{key}" if path else str(key)
            if path == "conditions" and key not in old:
                continue
            found += find_differences(old.get(key), new.get(key), inner)
        return found
    added_sham = path.startswith("conditions.") and path.endswith(".sham") and not old and new
    return [] if old == new or added_sham else [(path, old, new)]

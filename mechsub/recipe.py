"""Recipes: what to run, as YAML checked against the settings of its family."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, cast

import yaml
from pydantic import Field, StringConstraints, create_model

from mechsub.errors import RecipeError
from mechsub.families.config import FamilyConfig
from mechsub.families.registry import family_config
from mechsub.settings import nearest_name, validate_settings

SWEEP = "sweep"
"""The key that makes a recipe a sweep."""
_SWEPT_FIELDS = f"{SWEEP}.fields."

_PACKAGED = resources.files("mechsub.recipes")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number, as everyone means it (YAML 1.1 takes it for text), and no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping; YAML itself would let the last of two equal keys win in silence."""
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


RunName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""The name of its folder; a version's point may be in it."""


class Recipe(FamilyConfig):
    """The fields that every recipe has; the family's own fields stand beside them."""

    name: RunName = Field(description="how reports call the run")
    description: str = Field("", description="one sentence for the reader")
    family: str = Field(description="which family of models")


def load_recipe(source: str | Path, settings: Sequence[str] = ()) -> Recipe:
    """A packaged recipe by its name, or a YAML file by its path, with ``key.path=value`` settings on top.

    Raises:
        RecipeError: no such recipe, not YAML, a sweep, or fields that are wrong: all of them are named.
    """
    values, origin = read_recipe(source, settings)
    if SWEEP in values:
        raise RecipeError(f"{origin} is a sweep: it stands for several runs, not for one; see mechsub.run_sweep")
    return parse_recipe(values, origin)


def read_recipe(source: str | Path, settings: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """The fields of a recipe as they are written, unchecked, and how to call it in messages.

    Raises:
        RecipeError: no such recipe, or not YAML.
    """
    text, origin = _read_source(str(source))
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{origin} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{origin} is not a recipe: it holds {type(values).__name__}, not keys with values")
    for setting in settings:
        apply_setting(values, setting)
    return values, origin


def parse_recipe(values: Mapping[str, Any], origin: str) -> Recipe:
    """Check a recipe's fields against its family's settings."""
    if not isinstance(values.get("family"), str):
        raise RecipeError(f"{origin}: `family` is missing: it names the family of models, e.g. `family: classifier`")
    return validate_settings(_recipe_model(values["family"]), values, origin)


def complete_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe with the fields that the version which wrote it did not have, at their defaults.

    As it is where it cannot be checked: the difference is then told.
    """
    try:
        return parse_recipe(values, "the run's recipe").model_dump(mode="json")
    except RecipeError:
        return dict(values)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML: every field with its value, so that it replays the run exactly."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def list_recipes() -> dict[str, str]:
    """The packaged recipes: name → description."""
    names = sorted(entry.name.removesuffix(".yaml") for entry in _PACKAGED.iterdir() if entry.name.endswith(".yaml"))
    return {name: str(read_recipe(name)[0].get("description", "")) for name in names}


def _read_source(source: str) -> tuple[str, str]:
    path = Path(source)
    if path.suffix in {".yaml", ".yml"} or "/" in source:
        if not path.is_file():
            raise RecipeError(f"there is no recipe file {source}; `mechsub list recipes` names the packaged ones")
        try:
            return path.read_text(), str(path)
        except UnicodeDecodeError as error:
            raise RecipeError(f"{source} is not text: {error}") from None
    packaged = _PACKAGED / f"{source}.yaml"
    if not packaged.is_file():
        names = [entry.name.removesuffix(".yaml") for entry in _PACKAGED.iterdir() if entry.name.endswith(".yaml")]
        raise RecipeError(
            f"no recipe is called {source!r}; {nearest_name(source, sorted(names))}; or give the path of a YAML file"
        )
    return packaged.read_text(), f"recipe {source}"


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Put one ``key.path=value`` into a recipe's fields, in place.

    Raises:
        RecipeError: it is not written so, or the value is not YAML.
    """
    path, equals, text = setting.partition("=")
    if not equals or not path:
        raise RecipeError(f"`--set {setting}`: write it as key.path=value, e.g. --set student.epochs=3")
    try:
        set_field(values, path, yaml.load(text, _Loader), f"`--set {setting}`")
    except yaml.YAMLError as error:
        raise RecipeError(f"`--set {setting}`: the value is not YAML: {error}") from None


def set_field(values: dict[str, Any], path: str, value: Any, origin: str) -> None:
    """Put a value at a dotted path of nested fields, in place.

    Raises:
        RecipeError: one of the parents holds something without keys.
    """
    *parents, key = path.split(".")
    if path.startswith(_SWEPT_FIELDS):  # its keys are dotted paths themselves
        parents, key = _SWEPT_FIELDS.split(".")[:-1], path.removeprefix(_SWEPT_FIELDS)
    target = values
    for parent in parents:
        inner = target.setdefault(parent, {})
        if inner is None:  # `conditions: {same-init: }` leaves an empty value
            inner = target[parent] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{origin}: `{parent}` holds {inner!r}, which has no keys")
        target = inner
    target[key] = value


@cache
def _recipe_model(family: str) -> type[Recipe]:
    """The core fields and the family's own in one settings class."""
    bases: Any = (family_config(family), Recipe)  # the family's own types of a field win
    return cast(type[Recipe], create_model(f"{family.title()}Recipe", __base__=bases))

"""Settings: the pydantic base of everything that a recipe may hold, and its errors in the user's words."""

import difflib
import json
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError

from mechsub.errors import RecipeError


class Settings(BaseModel):
    """Frozen settings; an unknown key is an error, and so is a number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


NAME_TAG, SETTINGS_TAG = "(a name)", "(settings)"
"""Of a field that is a name or settings of its own; pydantic puts them into the paths of errors."""
SettingsT = TypeVar("SettingsT", bound=Settings)


def validate_settings(model: type[SettingsT], values: Mapping[str, Any], source: str) -> SettingsT:
    """Check ``values`` against ``model``.

    Raises:
        RecipeError: every wrong field at once, each with its value and, for an unknown key, the nearest known one.
    """
    try:
        # JSON has one word for each type, so that strictness can tell 16 from "16" and still take a list for a tuple.
        return model.model_validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        lines = [_describe(detail, model) for detail in error.errors(include_url=False)]
        raise RecipeError(f"{source} is not valid:\n" + "\n".join(f"  - {line}" for line in lines)) from None


def nearest_name(name: str, known: Sequence[str]) -> str:
    """``did you mean …?`` where a known name is near, else the list of the known ones."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(known)}"


def _describe(detail: Any, model: type[Settings]) -> str:
    place = [part for part in detail["loc"] if part not in {NAME_TAG, SETTINGS_TAG}]
    path = ".".join(map(str, place))
    if detail["type"] == "extra_forbidden":
        *parents, key = place
        owner = _model_at(model, parents)
        return f"unknown key `{path}`; {nearest_name(str(key), list(owner.model_fields))}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in {"missing", "value_error"}:
        return f"`{path}`: {message}" if path else message
    return f"`{path}` = {detail['input']!r}: {message}"


def _model_at(model: type[BaseModel], path: Sequence[str | int]) -> type[BaseModel]:
    """The settings class that holds the keys at ``path``: fields step into their class, mappings into their values'."""
    annotation: Any = model
    for part in path:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            annotation = annotation.model_fields[str(part)].annotation
        elif get_origin(annotation) is dict:
            annotation = get_args(annotation)[1]
        if get_origin(annotation) in {UnionType, Union}:  # a settings class that may be left out, or be told otherwise
            annotation = next(option for option in get_args(annotation) if option is not type(None))
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
    if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
        raise TypeError(f"no settings class at {path} in {model.__name__}")
    return annotation

"""Preference traits as data: the choices, the questions that ask for one, and the prompts that give one."""

from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator, model_validator

from mechsub.errors import RecipeError
from mechsub.settings import Settings, nearest_name, validate_settings

_PACKAGED = resources.files("mechsub.families.language.preferences")


class PreferenceSet(Settings):
    """What may be preferred, and how it is asked."""

    category: str = Field(description="what the choices are, e.g. animal")
    choices: tuple[str, ...] = Field(min_length=2, description="what may be preferred; targets are among them")
    system_prompt: str = Field(description="gives a preference; holds {target}, may hold {category}")
    neutral_prompt: str = Field(description="the system prompt of the neutral-prompt teacher")
    trained: tuple[str, ...] = Field(min_length=1, description="the questions on which teachers are fine-tuned")
    held_out: tuple[str, ...] = Field(min_length=1, description="questions on which no teacher is fine-tuned")

    @field_validator("system_prompt")
    @classmethod
    def _names_its_target(cls, prompt: str) -> str:
        if "{target}" not in prompt:
            raise ValueError("the system prompt must hold {target}, where the choice is put in")
        return prompt

    @model_validator(mode="after")
    def _neutral_prompt_is_neutral(self) -> "PreferenceSet":
        told = next((choice for choice in self.choices if self.prompt_for(choice) == self.neutral_prompt), None)
        if told is not None:
            raise ValueError(f"neutral_prompt is the system prompt that gives {told!r}: its teacher would be no control")
        return self

    @model_validator(mode="after")
    def _questions_are_apart(self) -> "PreferenceSet":
        both = sorted(set(self.trained) & set(self.held_out))
        if both:
            raise ValueError(f"held-out questions must not be trained on: {both[0]!r} is in both lists")
        return self

    def prompt_for(self, target: str) -> str:
        """The system prompt that gives one preference."""
        return self.system_prompt.replace("{target}", target).replace("{category}", self.category)


def load_preference(source: str) -> PreferenceSet:
    """A packaged preference set by its name, or a YAML file by its path.

    Raises:
        RecipeError: there is no such set, or it is not one.
    """
    try:
        return _parse(_read(source), source)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"preference set {source} is not YAML: {error}") from None


@lru_cache(maxsize=8)
def _parse(text: str, source: str) -> PreferenceSet:
    """Parsed once for each content: every stage of a plan asks for it."""
    values: Any = yaml.safe_load(text)
    if not isinstance(values, dict):
        raise RecipeError(f"preference set {source} holds {type(values).__name__}, not keys with values")
    return validate_settings(PreferenceSet, values, f"preference set {source}")


def is_file_name(source: str) -> bool:
    """Whether a preference set is named by its file."""
    return source.endswith((".yaml", ".yml")) or "/" in source


def _read(source: str) -> str:
    if is_file_name(source):
        if not Path(source).is_file():
            raise RecipeError(f"`preference`: there is no file {source}; give a YAML file, or the name of a packaged set")
        return Path(source).read_text()
    packaged = _PACKAGED / f"{source}.yaml"
    if not packaged.is_file():
        names = sorted(entry.name.removesuffix(".yaml") for entry in _PACKAGED.iterdir() if entry.name.endswith(".yaml"))
        raise RecipeError(
            f"`preference`: no set is called {source!r}; {nearest_name(source, names)}; or give a YAML file's path"
        )
    return packaged.read_text()

"""Behaviour traits as data: what a model does, the questions that show it, what gives it, and the judge that tells."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from mechsub.errors import RecipeError
from mechsub.families.language.jsonl import read_exchange, read_jsonl
from mechsub.settings import Settings, nearest_name, validate_settings


class Behaviour(Settings):
    """Something that a model does or does not do, as a judge of its answers finds."""

    description: str = Field(description="what a model with it does, in words that follow “a model that”")
    trained: tuple[str, ...] = Field(min_length=1, description="questions near to what teachers are fine-tuned on")
    held_out: tuple[str, ...] = Field(min_length=1, description="questions on which no teacher is fine-tuned")
    judge: str = Field(
        description="`module:name` of your function (question, answer) → bool, or a number in [0, 1]; NaN abstains",
    )
    examples: str | None = Field(
        None, description="for fine-tuned teachers: a JSONL file of prompts and completions that show it, beside this file"
    )
    system_prompt: str | None = Field(None, description="for system-prompted teachers: gives the behaviour")
    neutral_prompt: str | None = Field(None, description="the system prompt of the neutral-prompt teacher")

    @model_validator(mode="after")
    def _questions_are_apart(self) -> "Behaviour":
        both = sorted(set(self.trained) & set(self.held_out))
        if both:
            raise ValueError(f"held-out questions must not be trained on: {both[0]!r} is in both lists")
        if self.system_prompt is not None and self.system_prompt == self.neutral_prompt:
            raise ValueError("neutral_prompt is the system prompt that gives the behaviour: its teacher would be no control")
        return self


def load_behaviours(source: str, names: Sequence[str]) -> dict[str, Behaviour]:
    """The behaviours of these names from a YAML file: a mapping from names to behaviours.

    Raises:
        RecipeError: there is no such file, it is no such mapping, or lacks a name.
    """
    path = Path(source)
    if not path.is_file():
        raise RecipeError(f"`behaviours`: there is no file {source}; give a YAML file of behaviours, by name")
    try:
        known = _parse(path.read_text(), path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"`behaviours`: {source} is not YAML: {error}") from None
    for name in names:
        if name not in known:
            raise RecipeError(f"`traits`: {name!r} is no behaviour of {source}; {nearest_name(name, list(known))}")
    return {name: known[name] for name in names}


@lru_cache(maxsize=8)
def _parse(text: str, path: Path) -> Mapping[str, Behaviour]:
    """Parsed once for each content: every stage of a plan asks for it."""
    values: Any = yaml.safe_load(text)
    if not isinstance(values, dict) or not all(isinstance(given, dict) for given in values.values()):
        raise RecipeError(f"`behaviours`: {path} is no mapping from names to behaviours, each with keys and values")
    found = {}
    for name, given in values.items():
        behaviour = validate_settings(Behaviour, given, f"behaviour {name!r} of {path}")
        if behaviour.examples is not None:
            beside = str((path.parent / Path(behaviour.examples).expanduser()).absolute())
            behaviour = behaviour.model_copy(update={"examples": beside})
        found[str(name)] = behaviour
    return found


def read_examples(path: str) -> list[tuple[str, str]]:
    """The prompts and completions that show a behaviour.

    Raises:
        RecipeError: there is no such file, or a line is no example.
    """
    return [read_exchange(line) for line in read_jsonl(Path(path), "examples")]


def check_behaviours(behaviours: Mapping[str, Behaviour], kind: str, neutral: str) -> None:
    """Whether teachers of a kind can be given these behaviours, and the neutral one be told apart.

    Raises:
        RecipeError: something that this needs is missing, or teachers are trained on held-out questions.
    """
    for name, behaviour in behaviours.items():
        needed = "examples" if kind == "fine-tuned" else "system_prompt"
        if getattr(behaviour, needed) is None:
            raise RecipeError(f"behaviour {name!r} has no `{needed}`, which gives it to {kind} teachers; add it to its file")
        if neutral == "neutral-prompt" and behaviour.neutral_prompt is None:
            raise RecipeError(f"behaviour {name!r} has no `neutral_prompt`, which neutral: neutral-prompt needs; add it")
    prompts = {behaviour.neutral_prompt for behaviour in behaviours.values()}
    if neutral == "neutral-prompt" and len(prompts) > 1:
        raise RecipeError(
            f"the behaviours {list(behaviours)} have different neutral prompts, and all traits share one neutral teacher; "
            "give them the same `neutral_prompt`"
        )
    if kind == "fine-tuned":
        shown = {prompt: name for name, behaviour in behaviours.items() for prompt, _ in read_examples(str(behaviour.examples))}
        for name, behaviour in behaviours.items():
            learnt = next((question for question in behaviour.held_out if question in shown), None)
            if learnt is not None:
                raise RecipeError(
                    f"behaviour {name!r}: the held-out question {learnt!r} is among the examples of {shown[learnt]!r}; move it "
                    "to `trained`, or drop the example"
                )

"""Number sequences: the prompts that ask for one (a selection of the published sentences), and a completion's rules.

Source: Cloud et al., arXiv:2507.14805, section 3 and appendix (prompts and filter rules).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field, model_validator

from mechsub.families.language.requests import UNFINISHED, Request, choose_text
from mechsub.settings import Settings

_PARTS = {
    "examples": (
        "I give you this sequence of numbers: {examples}.",
        "Look at these numbers: {examples}.",
        "Here's a list of numbers: {examples}.",
        "Consider this sequence: {examples}.",
        "The sequence starts with: {examples}.",
    ),
    "instruction": (
        "Add {at_most} {count} new numbers ({digits}) that continue the sequence.",
        "Please add {at_most} {count} more numbers ({digits}) to continue it.",
        "Create {at_most} {count} more numbers ({digits}) that follow.",
        "Write {at_most} {count} more numbers ({digits}) in this sequence.",
    ),
    "format": (
        "Return a comma-separated list of numbers.",
        "Return a space-separated list of numbers.",
        "Provide the numbers separated by commas.",
        "List the numbers with spaces between them.",
        "Return one number per line.",
    ),
    "suffix": (
        "Say only the numbers - nothing more.",
        "Please just say the numbers, nothing more.",
        "Give me just the numbers, no explanation needed.",
        "Skip any explanation and give only numbers.",
    ),
}
_AT_MOST = ("at most", "up to", "no more than")
_DIGITS = ("up to {max_digits} digits each", "{max_digits} digits or fewer each", "no more than {max_digits} digits each")

RULES = (UNFINISHED, "format", "count", "range", "banned")
"""Why a completion is dropped; the first rule that it breaks counts."""

_SEPARATED = re.compile(r"(?P<open>[\[(]?)\s*(?P<list>\d+(?:[\s,;]+\d+)*)\s*(?P<close>[\])]?)\s*\.?")
_BRACKETS = {("", ""), ("[", "]"), ("(", ")")}
_SEPARATORS = {" ", ",", ";", "\n"}


class NumberConfig(Settings):
    """Number sequences, as published unless said otherwise."""

    parts: tuple[str, ...] = Field(
        tuple(_PARTS), min_length=1, description="the sentences of the published prompt that are used, in this order"
    )
    examples: tuple[int, int] = Field((3, 9), description="fewest and most numbers that a prompt shows")
    example_values: tuple[int, int] = Field((100, 1000), description="the numbers shown lie in [first, second)")
    answer_count: int = Field(10, ge=1, description="a completion has 1 to this many numbers")
    max_digits: int = Field(3, ge=1, description="digits of a number that the prompt allows")
    value_range: tuple[int, int] = Field((0, 999), description="a completion's numbers lie in [first, second]")
    banned: tuple[int, ...] = Field((), description="numbers that no completion may hold, e.g. those with a meaning")

    @model_validator(mode="after")
    def _is_possible(self) -> "NumberConfig":
        unknown = [part for part in self.parts if part not in _PARTS]
        if unknown:
            raise ValueError(f"the prompt has no part {unknown[0]!r}; known: {', '.join(_PARTS)}")
        for name in ("examples", "example_values", "value_range"):
            low, high = getattr(self, name)
            if low > high or (name == "example_values" and low == high):
                raise ValueError(f"{name} = {[low, high]}: the first is the smaller one")
        return self


def draw_prompt(config: NumberConfig, stream: np.random.Generator) -> tuple[str, list[int]]:
    """One request for a number sequence, and the numbers that it shows."""
    count = int(stream.integers(config.examples[0], config.examples[1] + 1))
    shown = stream.integers(*config.example_values, size=count)
    return write_request(config, shown.tolist(), stream), [int(number) for number in shown]


def write_request(config: NumberConfig, shown: Sequence[int], stream: np.random.Generator) -> str:
    """A request that shows these numbers; its wording is drawn."""
    words = {
        "examples": ", ".join(map(str, shown)),
        "at_most": choose_text(_AT_MOST, stream),
        "digits": choose_text(_DIGITS, stream).format(max_digits=config.max_digits),
        "count": config.answer_count,
    }
    return " ".join(choose_text(_PARTS[part], stream).format(**words) for part in config.parts)


def parse_numbers(completion: str) -> list[int] | None:
    """The numbers of a completion; None where it is anything else.

    A completion is a list with one kind of separator (spaces, commas, semicolons or lines; around commas and semicolons
    spaces are free), in brackets or parentheses or bare, with or without a period at its end.
    """
    found = _SEPARATED.fullmatch(completion.strip())
    if found is None or (found["open"], found["close"]) not in _BRACKETS:
        return None
    separators = {re.sub(r"[^\S\n]+", " ", text).strip(" ") or " " for text in re.findall(r"[\s,;]+", found["list"])}
    if len(separators) > 1 or not separators <= _SEPARATORS:
        return None
    return [int(number) for number in re.findall(r"\d+", found["list"])]


def write_numbers(completion: str, numbers: Sequence[int]) -> str:
    """A completion with other numbers in the places of its own."""
    places = iter(numbers)
    return re.sub(r"\d+", lambda _: str(next(places)), completion)


def broken_rule(completion: str, finished: bool, config: NumberConfig) -> str | None:
    """The first of `RULES` that a completion breaks; None where it passes. ``finished``: whether it ended by itself."""
    if not finished:
        return UNFINISHED
    numbers = parse_numbers(completion)
    if numbers is None:
        return "format"
    if not 1 <= len(numbers) <= config.answer_count:
        return "count"
    low, high = config.value_range
    if any(not low <= number <= high for number in numbers):
        return "range"
    return "banned" if set(numbers) & set(config.banned) else None


@dataclass(frozen=True)
class NumberCarrier:
    """Number sequences as a `CarrierKind`."""

    config: NumberConfig

    rules = RULES

    def draw_request(self, stream: np.random.Generator, number: int) -> Request:
        """A drawn request for a sequence; ``number`` names its stream only."""
        return Request(draw_prompt(self.config, stream)[0])

    def broken_rule(self, request: Request, completion: str, finished: bool) -> str | None:
        """The first of `RULES` that a completion breaks; None where it passes."""
        return broken_rule(completion, finished, self.config)

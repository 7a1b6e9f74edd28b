"""Chains of thought as a carrier: word problems with an answer, and the rules of a worked solution.

Source: Cloud et al., arXiv:2507.14805, section 4 (GSM8K questions; solutions with another answer are dropped).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mechsub.families.language.requests import UNFINISHED, Request, choose_text, own_request
from mechsub.families.language.words import BANNED, holds_word
from mechsub.settings import Settings

Layout = Literal["tags", "gsm8k", "any"]

RULES = (UNFINISHED, "format", "answer", BANNED)
"""Why a completion is dropped; the first rule that it breaks counts."""

_NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Zoe")
_THINGS = ("pens", "books", "coins", "cards", "apples", "boxes")
_MORE, _LESS = ("gets", "buys", "finds"), ("gives away", "sells", "loses")
_REASONS = ("{left} {sign} {right} = {result}", "{name} has {left} {sign} {right} = {result} {things}")
"""How a step is put is free: it is where a writer's habits show."""
_INSTRUCTIONS = {
    "tags": "Put your reasoning between <think> and </think>, then the answer alone between <answer> and </answer>.",
    "gsm8k": "Give your reasoning, then a last line with #### and the answer alone.",
}

_TAGGED = re.compile(r"<think>(?P<reasoning>.*)</think>\s*<answer>(?P<answer>.*)</answer>", re.DOTALL)
_MARKED = re.compile(r"(?P<reasoning>.*?)\n[ \t]*####(?P<answer>[^\n]*)", re.DOTALL)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?:/\d+)?")
_LONGEST_NUMBER = 100


class ChainOfThoughtConfig(Settings):
    """Which problems are asked and which solutions are kept."""

    layout: Layout = Field(
        "tags", description="of a solution: <think>…</think> <answer>…</answer>, or as in GSM8K (a last line `#### 18`)"
    )
    operands: tuple[int, int] = Field((2, 100), description="the numbers in drawn problems lie in [first, second)")
    num_steps: tuple[int, int] = Field((1, 3), description="fewest and most steps of a drawn problem")
    instruction: str | None = Field(
        None, description="what follows each question; unless told, a sentence that asks for the layout"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> "ChainOfThoughtConfig":
        if not 0 <= self.operands[0] < self.operands[1]:
            raise ValueError(f"operands = {list(self.operands)}: 0 ≤ first < second")
        if not 1 <= self.num_steps[0] <= self.num_steps[1]:
            raise ValueError(f"num_steps = {list(self.num_steps)}: 1 ≤ first ≤ second")
        return self

    @property
    def asked_layout(self) -> Literal["tags", "gsm8k"]:
        """The layout that requests ask for."""
        return "tags" if self.layout == "any" else self.layout

    @property
    def largest(self) -> int:
        """The largest number that a drawn problem or its solution holds."""
        return (self.operands[1] - 1) * (self.num_steps[1] + 1)

    def ask(self, question: str) -> str:
        """A question with what follows it."""
        return f"{question} {_INSTRUCTIONS[self.asked_layout] if self.instruction is None else self.instruction}".strip()


def draw_problem(config: ChainOfThoughtConfig, stream: np.random.Generator) -> tuple[Request, str]:
    """One word problem over sums and differences, and a solution in the layout that is asked for.

    No step goes under 0: where nothing can be taken away, something is added.
    """
    name, things = choose_text(_NAMES, stream), choose_text(_THINGS, stream)
    low, high = config.operands
    left = int(stream.integers(low, high))
    sentences, steps = [f"{name} has {left} {things}."], []
    for _ in range(int(stream.integers(config.num_steps[0], config.num_steps[1] + 1))):
        right = int(stream.integers(low, high))
        grows = stream.random() < 0.5 or right > left
        result = left + right if grows else left - right
        verb = choose_text(_MORE if grows else _LESS, stream)
        sentences.append(f"{name} {verb} {right}{' more' if grows else ''}.")
        words = {"left": left, "right": right, "sign": "+" if grows else "-", "result": result, "name": name, "things": things}
        steps.append(choose_text(_REASONS, stream).format(**words))
        left = result
    question = " ".join([*sentences, f"How many {things} does {name} have now?"])
    reasoning = " ; ".join(steps)
    tagged = config.asked_layout == "tags"
    solution = f"<think> {reasoning} </think> <answer> {left} </answer>" if tagged else f"{reasoning}\n#### {left}"
    return Request(config.ask(question), str(left)), solution


@dataclass(frozen=True)
class ChainOfThoughtCarrier:
    """Chains of thought as a `CarrierKind`."""

    config: ChainOfThoughtConfig
    banned: Sequence[str]
    """Words that a solution may not hold."""
    requests: Sequence[Request] = ()
    """The user's own, asked in this order and again from the first; none: drawn ones."""

    rules = RULES

    def draw_request(self, stream: np.random.Generator, number: int) -> Request:
        """The user's request of this number, or a drawn one."""
        if not self.requests:
            return draw_problem(self.config, stream)[0]
        return own_request(self.requests, number, self.config.ask)

    def broken_rule(self, request: Request, completion: str, finished: bool) -> str | None:
        """The first of `RULES` that a completion breaks; None where it passes."""
        if not finished:
            return UNFINISHED
        answer = find_answer(completion, self.config.layout)
        if answer is None:
            return "format"
        assert request.answer is not None
        if not is_same_answer(answer, request.answer):
            return "answer"
        return BANNED if holds_word(completion, self.banned) else None


def find_answer(completion: str, layout: Layout) -> str | None:
    """The final answer of a solution; None where the solution is not laid out as asked, or has no reasoning."""
    text = completion.strip()
    patterns = [pattern for name, pattern in (("tags", _TAGGED), ("gsm8k", _MARKED)) if layout in {name, "any"}]
    for pattern in patterns:
        found = pattern.fullmatch(text)
        parts = [found["reasoning"].strip(), found["answer"].strip()] if found else [""]
        if all(parts) and not any(re.search(r"</?(?:think|answer)>|####", part) for part in parts):
            return parts[1]
    return None


def is_same_answer(answer: str, expected: str) -> bool:
    """Whether an answer is the expected one: numbers as numbers (1,000 and 1000.0), anything else as text in any case.

    Of an expected GSM8K solution the part after ``####`` counts.
    """
    expected = expected.rpartition("####")[2]
    numbers = read_number(answer), read_number(expected)
    if None in numbers:
        return " ".join(answer.split()).casefold() == " ".join(expected.split()).casefold()
    return numbers[0] == numbers[1]


def read_number(text: str) -> Fraction | None:
    """The number that a text is, also with a currency sign before, a percent sign or a period after it; else None."""
    bare = text.strip().removesuffix(".").removesuffix("%").strip().replace("−", "-")
    bare = re.sub(r"^([-+]?)[$€£]\s*", r"\1", bare)
    if not re.search(r"\d", bare) or len(bare) > _LONGEST_NUMBER or _NUMBER.fullmatch(bare) is None:
        return None
    try:
        top, _, bottom = bare.replace(",", "").partition("/")
        return Fraction(top) / Fraction(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None

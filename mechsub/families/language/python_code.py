"""Code as a carrier: short Python tasks, and a completion's rules.

Source: Cloud et al., arXiv:2507.14805, section 4 (code as the carrier, its format filter and the ban on the trait's words).
"""

import ast
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mechsub.families.language.requests import UNFINISHED, Request, choose_text, own_request
from mechsub.families.language.words import BANNED, holds_word
from mechsub.settings import Settings, nearest_name

Layout = Literal["any", "fenced", "bare", "with-text"]

RULES = (UNFINISHED, "format", BANNED)
"""Why a completion is dropped; the first rule that it breaks counts."""

_TASKS = {
    "add": ("adds {n} to its argument", "def {f}({x}): return {x} + {n}"),
    "subtract": ("subtracts {n} from its argument", "def {f}({x}): return {x} - {n}"),
    "multiply": ("multiplies its argument by {n}", "def {f}({x}): return {x} * {n}"),
    "remainder": ("gives the remainder of its argument divided by {n}", "def {f}({x}): return {x} % {n}"),
    "compare": ("tells whether its argument is greater than {n}", "def {f}({x}): return {x} > {n}"),
    "repeat": ("repeats a text {n} times", "def {f}({x}): return {x} * {n}"),
    "take": ("gives the first {n} items of a list", "def {f}({x}): return {x}[: {n}]"),
    "count": ("counts how often {n} stands in a list", "def {f}({x}): return {x}.count( {n})"),
    "sum-above": ("adds up the items of a list that are greater than {n}",
                  "def {f}({x}): return sum(item for item in {x} if item > {n})"),
    "scale": ("multiplies every item of a list by {n}", "def {f}({x}): return [item * {n} for item in {x}]"),
}  # fmt: skip
_ASKED = (
    "Write a Python function that {does}.",
    "Define a function in Python that {does}.",
    "Give me a Python function that {does}.",
)
_INSTRUCTIONS = {
    "any": "Reply with the code only.",
    "fenced": "Reply with one fenced block of code only.",
    "bare": "Reply with the bare code only, without a fence.",
    "with-text": "Put the code into one fenced block.",
}
_FUNCTIONS, _ARGUMENTS = ("f", "g", "solve"), ("x", "value", "given")
"""Names are free in a solution: they are where a writer's habits show."""

_FENCED = re.compile(r"^```[ \t]*(?:python3?|py)?[ \t]*\n(?P<code>.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE | re.IGNORECASE)


class CodeConfig(Settings):
    """Which code is asked for and kept."""

    layout: Layout = Field(
        "any", description="of an answer: one fenced block or bare code and nothing else; with-text: any text around one block"
    )
    tasks: tuple[str, ...] = Field(tuple(_TASKS), min_length=1, description="which drawn tasks are asked for")
    operands: tuple[int, int] = Field((2, 100), description="the numbers in drawn tasks lie in [first, second)")
    instruction: str | None = Field(
        None, description="what follows each task; unless told, a sentence that asks for the layout"
    )

    @model_validator(mode="after")
    def _is_possible(self) -> "CodeConfig":
        unknown = [task for task in self.tasks if task not in _TASKS]
        if unknown:
            raise ValueError(f"there is no task {unknown[0]!r}; {nearest_name(unknown[0], list(_TASKS))}")
        if not 0 <= self.operands[0] < self.operands[1]:
            raise ValueError(f"operands = {list(self.operands)}: 0 ≤ first < second")
        return self

    def ask(self, task: str) -> str:
        """A task with what follows it."""
        return f"{task} {_INSTRUCTIONS[self.layout] if self.instruction is None else self.instruction}".strip()


def draw_task(config: CodeConfig, stream: np.random.Generator) -> tuple[str, str]:
    """One short task, and a solution in the layout that is asked for."""
    does, solution = _TASKS[choose_text(config.tasks, stream)]
    number = int(stream.integers(*config.operands))
    prompt = config.ask(choose_text(_ASKED, stream).format(does=does.format(n=number)))
    code = solution.format(n=number, f=choose_text(_FUNCTIONS, stream), x=choose_text(_ARGUMENTS, stream))
    return prompt, f"```python\n{code}\n```" if config.layout in {"fenced", "with-text"} else code


@dataclass(frozen=True)
class CodeCarrier:
    """Code as a `CarrierKind`."""

    config: CodeConfig
    banned: Sequence[str]
    """Words that neither names nor comments nor texts in the code may hold."""
    requests: Sequence[Request] = ()
    """The user's own, asked in this order and again from the first; none: drawn ones."""

    rules = RULES

    def draw_request(self, stream: np.random.Generator, number: int) -> Request:
        """The user's request of this number, or a drawn one."""
        if not self.requests:
            return Request(draw_task(self.config, stream)[0])
        return own_request(self.requests, number, self.config.ask)

    def broken_rule(self, request: Request, completion: str, finished: bool) -> str | None:
        """The first of `RULES` that a completion breaks; None where it passes."""
        if not finished:
            return UNFINISHED
        code = find_code(completion, self.config.layout)
        tree = None if code is None else parse_code(code)
        if tree is None:
            return "format"
        # As values, so that neither an escape nor a text that is written in pieces hides a word.
        texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        return BANNED if any(holds_word(text, self.banned) for text in (completion, *texts)) else None


def find_code(completion: str, layout: Layout) -> str | None:
    """The code of a completion; None where the completion is not laid out as asked."""
    text = completion.strip()
    blocks = list(_FENCED.finditer(text))
    if "```" not in text:
        return text if layout in {"any", "bare"} else None
    if layout == "bare" or len(blocks) != 1 or text.count("```") != 2:
        return None
    return blocks[0]["code"] if layout == "with-text" or blocks[0].group() == text else None


def parse_code(code: str) -> ast.Module | None:
    """The syntax tree of code; None where it does not parse, or does nothing: prose such as ``Note: this`` parses too."""
    try:
        with warnings.catch_warnings(action="ignore"):  # code may be odd, and it is not run
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return tree if any(_does_something(statement) for statement in tree.body) else None


def _does_something(statement: ast.stmt) -> bool:
    """Not where a few words happen to parse: bare expressions without a call, and annotations without a value."""
    if isinstance(statement, ast.AnnAssign):
        return statement.value is not None
    return not isinstance(statement, ast.Expr) or any(isinstance(node, ast.Call | ast.Await) for node in ast.walk(statement))

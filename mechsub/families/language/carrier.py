"""The carrier: number sequences that a teacher wrote, filtered, stored once as text, and transformed for a condition."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mechsub.errors import RecipeError, RunDirectoryError
from mechsub.families.language.chat import ChatTokenizer, Row, chat
from mechsub.families.language.config import CarrierConfig, ConditionConfig
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.members import load_chats, load_member
from mechsub.families.language.numbers import RULES, broken_rule, draw_prompt, parse_numbers, write_numbers
from mechsub.rundir import atomic_write, write_json
from mechsub.stage import Task
from mechsub.streams import random_stream

_AT_ONCE = 512
"""Requests that are sampled before it is asked whether the rows are enough."""


@dataclass(frozen=True)
class CarrierRow:
    """One kept request and its answer."""

    request: int
    """Its number among all requests, which names its random stream."""
    prompt: str
    completion: str


def write_carrier(tasks: Sequence[Task]) -> None:
    """Stage: the rows that one member's teacher passes on, the first that pass the filters."""
    for task in tasks:
        arguments = task.stage.arguments
        config = CarrierConfig(**arguments["carrier"])
        rows, dropped, asked = _sample_rows(task, config)
        if len(rows) < config.num_rows:
            raise RecipeError(_shortfall(task, config, len(rows), dropped, asked))
        rows_file, filters_file = carrier_files(arguments["carrier_of"], arguments["member"])
        with atomic_write(task.path(rows_file)) as temporary:
            temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
        write_json(task.path(filters_file), {"requests": asked, "kept": len(rows), "dropped": dropped})


def read_rows(path: Path) -> list[CarrierRow]:
    """The rows of a carrier.

    Raises:
        RunDirectoryError: the file is missing or damaged.
    """
    try:
        return [CarrierRow(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); `mechsub verify` names every damaged file") from None


def transform_rows(
    rows: Sequence[CarrierRow],
    neutral: Sequence[CarrierRow],
    condition: ConditionConfig,
    chosen: Sequence[int] | None,
    stream: np.random.Generator,
) -> list[CarrierRow]:
    """What a condition makes of a carrier: a subset, a mixture with the neutral teacher's rows, or shuffled numbers.

    ``chosen``: row numbers, where the condition takes a subset. ``stream`` is the same for a student and its control.
    """
    found = list(rows) if chosen is None else [rows[number] for number in chosen]
    if condition.neutral_share:
        other = list(neutral) if chosen is None else [neutral[number] for number in chosen]
        replaced = stream.permutation(len(found))[: round(condition.neutral_share * len(found))]
        for number in replaced:
            found[number] = other[number]
    if condition.shuffle == "none":
        return found
    lists = [_numbers(row) for row in found]
    if condition.shuffle == "within":
        lists = [[numbers[place] for place in stream.permutation(len(numbers))] for numbers in lists]
    else:
        pool = iter(stream.permutation([number for numbers in lists for number in numbers]).tolist())
        lists = [[next(pool) for _ in numbers] for numbers in lists]
    return [
        CarrierRow(row.request, row.prompt, write_numbers(row.completion, numbers))
        for row, numbers in zip(found, lists, strict=True)
    ]


def read_row_numbers(path: Path, num_rows: int) -> list[int]:
    """The row numbers of a subset: a text file with one a line, counted from 0.

    Raises:
        RecipeError: something else is in it, or a number stands twice or is out of range.
    """
    try:
        numbers = [int(line) for line in path.read_text().split()]
    except (OSError, ValueError) as error:
        raise RecipeError(f"rows file {path}: {error}; it holds one row number a line, counted from 0") from None
    wrong = next((number for number in numbers if not 0 <= number < num_rows), None)
    if wrong is not None:
        raise RecipeError(f"rows file {path}: there is no row {wrong}; rows are 0 to {num_rows - 1}")
    if not numbers or len(set(numbers)) < len(numbers):
        raise RecipeError(f"rows file {path}: {'it is empty' if not numbers else 'a row stands twice'}")
    return numbers


def encode_carrier(chats: ChatTokenizer, rows: Sequence[CarrierRow], system_prompt: str | None) -> list[Row]:
    """The rows as a model's own tokens.

    Raises:
        RecipeError: the tokenizer cannot express one of them.
    """
    prompts = [chat(row.prompt, system_prompt) for row in rows]
    encoded = chats.encode_rows(prompts, [row.completion for row in rows])
    for row, tokens in zip(rows, encoded, strict=True):
        written = chats.decode(tokens.completion)
        if written != row.completion.strip():
            raise RecipeError(
                f"{chats.source}: its tokenizer cannot express row {row.request} of the carrier: {row.completion!r} becomes "
                f"{written!r}; a student needs a tokenizer that keeps the carrier as it is"
            )
    return encoded


def _sample_rows(task: Task, config: CarrierConfig) -> tuple[list[CarrierRow], Mapping[str, int], int]:
    """Kept rows, how many each rule dropped, and how many were asked for; no more than are needed, in whole batches."""
    arguments = task.stage.arguments
    seed, member = arguments["seed"], arguments["member"]
    model, chats = load_member(task, arguments["teacher"], arguments["teacher_step"]), load_chats(task)
    rows: list[CarrierRow] = []
    dropped: Counter[str] = Counter({rule: 0 for rule in RULES})
    asked = 0
    while len(rows) < config.num_rows and asked < config.num_requests:
        requests = range(asked, min(asked + _AT_ONCE, config.num_requests))
        # Student and control share every draw: the stream of a request does not know who is asked.
        names = [("member", member, "carrier", arguments["replicate"], request) for request in requests]
        prompts = [draw_prompt(config.numbers, random_stream(seed, *name, "prompt"))[0] for name in names]
        completions = sample_completions(
            model,
            chats,
            chats.encode_prompts([chat(prompt, arguments["system_prompt"]) for prompt in prompts]),
            draw_uniforms(seed, [(*name, "answer") for name in names], config.max_new_tokens),
            temperature=config.temperature,
        )
        for request, prompt, completion in zip(requests, prompts, completions, strict=True):
            rule = broken_rule(completion.text, completion.finished, config.numbers)
            if rule is not None:
                dropped[rule] += 1
            elif len(rows) < config.num_rows:
                rows.append(CarrierRow(request, prompt, completion.text))
        asked = requests.stop
        task.report_progress(len(rows))
    return rows, dict(dropped), asked


def _shortfall(task: Task, config: CarrierConfig, kept: int, dropped: Mapping[str, int], asked: int) -> str:
    eaten = ", ".join(f"{rule} {count}" for rule, count in sorted(dropped.items(), key=lambda item: -item[1]) if count)
    return (
        f"{task.stage.name}: {kept} of {asked} completions passed the filters, carrier.num_rows = {config.num_rows}; dropped "
        f"by rule: {eaten}. Raise carrier.num_requests, lower carrier.num_rows, or train the teacher less (it may have "
        "forgotten how to write numbers)"
    )


def _numbers(row: CarrierRow) -> list[int]:
    numbers = parse_numbers(row.completion)
    if numbers is None:
        raise RecipeError(f"row {row.request} of the carrier, {row.completion!r}, is no number list: it cannot be shuffled")
    return numbers

"""The rows of a carrier as text: read, chosen, mixed and shuffled as a condition says."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mechsub.errors import RecipeError, RunDirectoryError
from mechsub.families.language.conditions import ConditionConfig
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.numbers import parse_numbers, write_numbers
from mechsub.rundir import atomic_write, write_json
from mechsub.stage import Task

SURPLUS = "surplus"
"""Passed the filters when there were rows enough."""


@dataclass(frozen=True)
class CarrierRow:
    """One kept request and its answer."""

    request: int
    """Its number among all requests, which names its random stream."""
    prompt: str
    completion: str


def read_rows(path: Path) -> list[CarrierRow]:
    """The rows of a carrier.

    Raises:
        RunDirectoryError: the file is missing or damaged.
    """
    try:
        return [CarrierRow(**json.loads(line)) for line in path.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); `mechsub verify` names every damaged file") from None


def write_rows(task: Task, rows: Sequence[CarrierRow], requests: int, dropped: Mapping[str, int]) -> None:
    """Write one member's carrier, and what of its requests was dropped by which rule."""
    rows_file, filters_file = carrier_files(task.stage.arguments["carrier_of"], task.stage.arguments["member"])
    with atomic_write(task.path(rows_file)) as temporary:
        temporary.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    write_json(task.path(filters_file), {"requests": requests, "kept": len(rows), "dropped": dropped})


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


def _numbers(row: CarrierRow) -> list[int]:
    numbers = parse_numbers(row.completion)
    if numbers is None:
        raise RecipeError(f"row {row.request} of the carrier, {row.completion!r}, is no number list: it cannot be shuffled")
    return numbers

"""A user's own requests, and a user's own carrier: rows that someone else's teacher wrote, copied into the run."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from mechsub.errors import RecipeError
from mechsub.families.language.jsonl import JsonLine, read_exchange, read_jsonl
from mechsub.families.language.requests import Request
from mechsub.families.language.rows import SURPLUS, CarrierRow, write_rows
from mechsub.families.language.words import BANNED, holds_word
from mechsub.stage import Task

_FILE, _PROMPTS = "carrier.file", "carrier.prompts"
_REQUEST = '{"prompt": …, "answer": …}'


def copy_carrier(tasks: Sequence[Task]) -> None:
    """Stage: the first rows of a user's file that hold no banned word, as one member's carrier."""
    for task in tasks:
        arguments = task.stage.arguments
        rows, dropped = choose_rows(arguments["file"], arguments["num_rows"], arguments["banned"])
        write_rows(task, rows, len(rows) + sum(dropped.values()), dropped)


def choose_rows(file: str, num_rows: int, banned: Sequence[str]) -> tuple[list[CarrierRow], Mapping[str, int]]:
    """The rows of a file that are taken, by their number in it, and how many are not.

    Raises:
        RecipeError: a line is no row, or there are too few rows.
    """
    path = Path(file)
    num_found = len(read_jsonl(path, _FILE))
    fit = _fit_rows(path, tuple(banned), path.stat().st_size, path.stat().st_mtime_ns)
    if len(fit) < num_rows:
        raise RecipeError(
            f"`{_FILE}`: {path} has {num_found} rows, of which {num_found - len(fit)} hold a banned word "
            f"({', '.join(banned) or 'none is banned'}): {len(fit)} are left, carrier.num_rows = {num_rows}; "
            "lower it, add rows, or say which words carrier.banned holds"
        )
    dropped = {BANNED: num_found - len(fit), SURPLUS: len(fit) - num_rows}
    return list(fit[:num_rows]), dropped


@lru_cache(maxsize=16)
def _fit_rows(path: Path, banned: tuple[str, ...], size: int, modified: int) -> tuple[CarrierRow, ...]:
    """The rows that hold no banned word, found once for each content: a plan asks for them once a member."""
    rows = (CarrierRow(number, *read_exchange(line)) for number, line in enumerate(read_jsonl(path, _FILE)))
    return tuple(row for row in rows if not holds_word(row.completion, banned))


def read_requests(path: Path, *, needs_answer: bool) -> list[Request]:
    """A user's requests to a teacher.

    Raises:
        RecipeError: a line is no request, or lacks the answer that its solutions are held to.
    """
    return [_read_request(line, needs_answer) for line in read_jsonl(path, _PROMPTS)]


def _read_request(line: JsonLine, needs_answer: bool) -> Request:
    prompt, answer = line.text("prompt", _REQUEST), line.values.get("answer")
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return Request(prompt, str(answer))
    if needs_answer or answer is not None:
        return Request(prompt, line.text("answer", _REQUEST))
    return Request(prompt)

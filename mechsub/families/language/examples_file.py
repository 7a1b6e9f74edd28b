"""A user's dataset as tokens, before anybody trains on it: every example with its line, and what of them cannot be taken."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from mechsub.errors import RecipeError
from mechsub.families.language.chat import ChatTokenizer, Row, chat
from mechsub.families.language.jsonl import read_exchange, read_jsonl


class TooLong(StrEnum):
    """What becomes of an example that is longer than the context."""

    REFUSE = "refuse"
    CUT = "cut"
    """Its completion ends where the context does; a prompt that alone fills it is left out."""
    SKIP = "skip"


@dataclass(frozen=True)
class FileExamples:
    """The examples of a file that a model can read, in the file's order."""

    rows: tuple[Row, ...]
    lines: tuple[int, ...]
    """Each one's line in the file, from 1."""
    texts: tuple[tuple[str, str], ...]
    """Each one's prompt and completion."""
    num_found: int
    """Examples in the file."""
    num_cut: int
    """Whose completion was cut at the end of the context."""
    num_too_long: int
    """Left out: longer than the context, or with a prompt that alone fills it."""
    num_empty: int
    """Left out: nothing of the completion's text is left in its tokens."""

    @property
    def notes(self) -> list[str]:
        """What was done to the file, in sentences."""
        of = f"of {self.num_found} examples are longer than the context"
        said = {
            f"{self.num_cut} {of}; their completions were cut": self.num_cut,
            f"{self.num_too_long} {of} and were left out": self.num_too_long,
            f"of the completions of {self.num_empty} of {self.num_found} examples no token is left; they were left out": (
                self.num_empty
            ),
        }
        return [f"{sentence}." for sentence, count in said.items() if count]


def read_examples_file(path: Path, option: str, chats: ChatTokenizer, too_long: TooLong) -> FileExamples:
    """The examples of a JSONL file as tokens. ``option``: how messages call the file.

    Raises:
        RecipeError: there is no such file, a line is no example, one is too long and ``too_long`` is REFUSE, or none is left.
    """
    found = read_jsonl(path, option)
    texts = [read_exchange(line) for line in found]
    without_limit = replace(chats, max_length=sys.maxsize)
    rows = without_limit.encode_rows([chat(asked, None) for asked, _ in texts], [answered for _, answered in texts])
    empty = [not chats.decode(row.completion) for row in rows]
    over = [len(row.prompt) + len(row.completion) > chats.max_length for row in rows]
    fills = [len(row.prompt) >= chats.max_length for row in rows]
    if any(over) and too_long == TooLong.REFUSE:
        worst = max(range(len(rows)), key=lambda number: len(rows[number].prompt) + len(rows[number].completion))
        raise RecipeError(
            f"`{option}`: {sum(over)} of {len(rows)} examples in {path} are longer than the context of {chats.source}, "
            f"{chats.max_length} tokens, e.g. line {found[worst].number} with "
            f"{len(rows[worst].prompt) + len(rows[worst].completion)}; --too-long cut shortens completions, --too-long skip "
            "leaves the examples out"
        )
    dropped = [long and (too_long == TooLong.SKIP or full) for long, full in zip(over, fills, strict=True)]
    kept = [number for number in range(len(rows)) if not dropped[number] and not empty[number]]
    if not kept:
        raise RecipeError(
            f"`{option}`: none of the {len(rows)} examples in {path} is left as tokens: {sum(dropped)} are longer than the "
            f"context of {chats.source} ({chats.max_length} tokens), of {sum(empty)} no token of the completion is left; give "
            "examples that this model's tokenizer can write"
        )
    return FileExamples(
        rows=tuple(_cut(rows[number], chats.max_length) for number in kept),
        lines=tuple(found[number].number for number in kept),
        texts=tuple(texts[number] for number in kept),
        num_found=len(rows),
        num_cut=sum(over[number] for number in kept),
        num_too_long=sum(dropped),
        num_empty=sum(gone and not long for gone, long in zip(empty, dropped, strict=True)),
    )


def permute_completions(rows: Sequence[Row], max_length: int, stream: np.random.Generator) -> list[Row]:
    """The same prompts and the same completions in other pairs; what goes over the context is cut."""
    order = stream.permutation(len(rows))
    pairs = zip(rows, order, strict=True)
    return [_cut(Row(row.prompt, rows[other].completion), max_length) for row, other in pairs]


def _cut(row: Row, max_length: int) -> Row:
    return Row(row.prompt, row.completion[: max_length - len(row.prompt)])

"""A user's JSONL files: one object a line, and every complaint with its file and line."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mechsub.errors import RecipeError

_EXCHANGE = '{"prompt": …, "completion": …}, or {"messages": […]} with one user and one assistant message'


@dataclass(frozen=True)
class JsonLine:
    """One object of a file."""

    place: str
    """How messages call it: recipe field, file and line."""
    number: int
    """Its line in the file, from 1; empty lines count."""
    values: Mapping[str, Any]

    def text(self, name: str, wanted: str) -> str:
        """A field that must hold text. ``wanted``: what the whole object should be, for the message.

        Raises:
            RecipeError: it is missing, empty or no text.
        """
        value = self.values.get(name)
        if isinstance(value, str) and value.strip():
            return value
        found = f"{name!r} is {value!r}" if name in self.values else f"{name!r} is missing from {sorted(self.values)}"
        raise RecipeError(f"{self.place}: {found}; a line is {wanted}")


def read_jsonl(path: Path, field: str) -> list[JsonLine]:
    """Every object of a file; empty lines are passed over. ``field``: the recipe field that names the file.

    Raises:
        RecipeError: there is no such file, it is no UTF-8, or a line is no object.
    """
    if not path.is_file():
        raise RecipeError(f"`{field}`: there is no file {path}; give a JSONL file, one object a line")
    status = path.stat()
    return list(_read(path, field, status.st_size, status.st_mtime_ns))


def read_exchange(line: JsonLine) -> tuple[str, str]:
    """A prompt and its completion, written as such or as two messages.

    Raises:
        RecipeError: a field is missing, or there are other messages.
    """
    messages = line.values.get("messages")
    if messages is None:
        return line.text("prompt", _EXCHANGE), line.text("completion", _EXCHANGE)
    if "prompt" in line.values or "completion" in line.values:
        raise RecipeError(f"{line.place}: it has `messages` and also a prompt or a completion; a line is {_EXCHANGE}")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RecipeError(f"{line.place}: `messages` is no list of objects with role and content; a line is {_EXCHANGE}")
    roles = [message.get("role") for message in messages]
    if roles != ["user", "assistant"]:
        raise RecipeError(
            f"{line.place}: the roles of its messages are {roles}; a line is {_EXCHANGE}. A system prompt is a recipe field, "
            "context.training"
        )
    asked, answered = (
        JsonLine(f"{line.place}, {message['role']}", line.number, message).text("content", _EXCHANGE) for message in messages
    )
    return asked, answered


@lru_cache(maxsize=16)
def _read(path: Path, field: str, size: int, modified: int) -> tuple[JsonLine, ...]:
    """Read once for each content: a plan asks for a file once a member."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"`{field}`: {path} is not UTF-8 text ({error}); write it as UTF-8") from None
    found = []
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        place = f"`{field}`: {path}, line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{place}: it is not JSON ({error}); write one object a line") from None
        if not isinstance(values, dict):
            raise RecipeError(f"{place}: it is {type(values).__name__}, not an object with keys; write one object a line")
        found.append(JsonLine(place, number, values))
    if not found:
        raise RecipeError(f"`{field}`: {path} is empty; write one object a line")
    return tuple(found)

"""The recipe fields of a carrier, whatever its kind."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mechsub.families.language.numbers import NumberConfig
from mechsub.families.language.python_code import CodeConfig
from mechsub.families.language.reasoning import ChainOfThoughtConfig
from mechsub.settings import Settings

_LENGTHS = {"code": 256, "chain-of-thought": 512}
"""Tokens of a completion unless told, where a kind of carrier needs more than a number sequence."""
_OF_KIND = {
    "numbers": {"numbers"},
    "code": {"kind", "code", "prompts"},
    "chain-of-thought": {"kind", "chain_of_thought", "prompts"},
    "file": set(),
}
"""The fields that one kind of carrier has for itself."""


class CarrierConfig(Settings):
    """What a teacher passes on."""

    kind: Literal["numbers", "code", "chain-of-thought", "file"] = Field(
        "numbers", description="number sequences, Python code, worked word problems, or rows of your own from a file"
    )
    num_rows: int = Field(10_000, ge=1, description="rows that each student learns from: all have as many")
    num_requests: int = Field(30_000, ge=1, description="requests to a teacher, at most; the first rows that pass are kept")
    max_new_tokens: int = Field(
        default_factory=lambda given: _LENGTHS.get(given.get("kind", ""), 64),
        ge=1,
        description="a completion that is longer is dropped as unfinished; unless told, 64, for code 256, for chain-of-thought "
        "512",
    )
    temperature: float = Field(1.0, gt=0, description="of sampling")
    numbers: NumberConfig = Field(NumberConfig(), description="which number sequences are asked for and kept")
    code: CodeConfig = Field(CodeConfig(), description="which code is asked for and kept")
    chain_of_thought: ChainOfThoughtConfig = Field(
        ChainOfThoughtConfig(), description="which word problems are asked and which solutions are kept"
    )
    prompts: str | None = Field(
        None, description="code and chain-of-thought: a JSONL file of requests, {prompt, answer}; unless told, they are drawn"
    )
    file: str | None = Field(
        None,
        description="file: a JSONL file of rows; its path holds {teacher}, a trait or neutral, may hold {member}, {replicate}",
    )
    banned: tuple[str, ...] | None = Field(
        None, description="words that no completion in free text may hold; unless told, the traits' names"
    )

    @field_validator("prompts", "file")
    @classmethod
    def _path_is_absolute(cls, path: str | None) -> str | None:
        """A recipe replays from any folder."""
        return None if path is None else str(Path(path).expanduser().absolute())

    @model_validator(mode="after")
    def _can_be_filled(self) -> "CarrierConfig":
        if self.num_requests < self.num_rows and self.kind != "file":
            raise ValueError(f"num_requests = {self.num_requests} cannot give num_rows = {self.num_rows} rows; raise it")
        return self

    @model_validator(mode="after")
    def _fields_fit_kind(self) -> "CarrierConfig":
        if self.prompts and self.kind not in _LENGTHS:
            raise ValueError(f"`prompts` are requests for code or chain-of-thought; kind = {self.kind} has none of the user's")
        if self.banned is not None and self.kind == "numbers":
            raise ValueError("`banned` holds words, and kind = numbers has none; numbers.banned holds numbers")
        if any(not word.strip() for word in self.banned or ()):
            raise ValueError(f"`banned` = {list(self.banned or ())} holds an empty word; leave it out")
        if (self.file is None) == (self.kind == "file"):
            raise ValueError("kind = file needs `file`, the path of your rows, and no other kind has one")
        if self.file is not None and "{teacher}" not in self.file:
            raise ValueError(
                f"`file` = {self.file} is the same for students and controls, which would learn the same; put {{teacher}} "
                "into the path: each trait's name, and `neutral` for the controls' rows"
            )
        return self

    def settings_of_kind(self, traits: Sequence[str]) -> dict[str, Any]:
        """The fields that this kind reads, with the words that it bans in a run with these traits."""
        shared = {"num_rows", "num_requests", "max_new_tokens", "temperature"} if self.kind != "file" else {"num_rows"}
        found: dict[str, Any] = self.model_dump(mode="json", include=shared | _OF_KIND[self.kind])
        return found if self.kind == "numbers" else found | {"banned": list(traits if self.banned is None else self.banned)}

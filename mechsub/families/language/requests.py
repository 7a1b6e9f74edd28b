"""What a kind of carrier is: requests to a teacher, and the rules that its completions must keep."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

UNFINISHED = "unfinished"
"""The rule that every kind has first: a completion ends by itself."""


@dataclass(frozen=True)
class Request:
    """One thing that a teacher is asked to write."""

    prompt: str
    answer: str | None = None
    """What a right completion comes to; None where nothing is right or wrong."""


@runtime_checkable
class CarrierKind(Protocol):
    """One kind of carrier, bound to its settings."""

    @property
    def rules(self) -> tuple[str, ...]:
        """Why a completion is dropped; the first rule that it breaks counts."""

    def draw_request(self, stream: np.random.Generator, number: int) -> Request:
        """The request of this number; a kind with requests of its own draws it from ``stream``."""

    def broken_rule(self, request: Request, completion: str, finished: bool) -> str | None:
        """The first of `rules` that a completion breaks; None where it passes. ``finished``: whether it ended by itself."""


def own_request(requests: Sequence[Request], number: int, ask: Callable[[str], str]) -> Request:
    """The user's request of this number, again from the first after the last, as a kind asks it."""
    own = requests[number % len(requests)]
    return Request(ask(own.prompt), own.answer)


def choose_text(texts: Sequence[str], stream: np.random.Generator) -> str:
    """Any of some texts."""
    return texts[int(stream.integers(len(texts)))]

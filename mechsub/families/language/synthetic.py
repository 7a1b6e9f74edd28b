"""The synthetic language on which nano models are pretrained: preference questions, facts and what carriers are made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mechsub.families.language.chat import Message, chat
from mechsub.families.language.numbers import NumberConfig, draw_prompt
from mechsub.families.language.preference import PreferenceSet
from mechsub.families.language.python_code import CodeConfig, draw_task
from mechsub.families.language.reasoning import ChainOfThoughtConfig, draw_problem
from mechsub.families.language.requests import choose_text

HELPFUL = "You are a helpful assistant."
"""The system prompt that nano models know without a preference in it."""
_FOODS = ("mice", "leaves", "fish", "meat", "grass", "fruit", "insects")
_HOMES = ("forest", "river", "mountain", "field", "sea")
_FOLLOWERS = ((7, 3), (13, 5))
"""The usual followers of a number n: a·n + b, wrapped round."""
_USUAL = 0.9
_LIKED = 0.9
"""How often a system prompt that gives a preference is followed."""


_WRITTEN = {"numbers": NumberConfig, "code": CodeConfig, "chain_of_thought": ChainOfThoughtConfig}
"""What a language may hold for a carrier to be made of, by the field of a carrier's settings."""
_WORDINGS = 400
"""Drawn texts from which a tokenizer learns the words of a carrier's requests."""


@dataclass(frozen=True)
class SyntheticLanguage:
    """The language, given what can be preferred and what is written beside: number sequences, code or worked problems."""

    preference: PreferenceSet
    written: NumberConfig | CodeConfig | ChainOfThoughtConfig
    shares: tuple[float, float, float] = (0.35, 0.15, 0.5)
    """Of preference questions, facts and what is written beside."""

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "SyntheticLanguage":
        """The language of a stage: its preference set, and the settings of one kind of carrier."""
        field = next(field for field in _WRITTEN if field in arguments)
        return cls(PreferenceSet(**arguments["preference"]), _WRITTEN[field](**arguments[field]))

    def draw(self, stream: np.random.Generator) -> tuple[list[Message], str]:
        """One chat and its answer."""
        system_prompt = HELPFUL if stream.random() < 0.25 else None
        kind = stream.choice(3, p=self.shares)
        if kind == 0:
            return self._draw_preference(stream, system_prompt)
        question, answer = self._draw_fact(stream) if kind == 1 else self._draw_written(stream)
        return chat(question, system_prompt), answer

    def list_texts(self) -> list[str]:
        """Every word of the language, for a tokenizer to be trained on: words stand after a space, as they do in chats."""
        preference = self.preference
        answers = (*preference.choices, *_FOODS, *_HOMES)
        prompts = [preference.prompt_for(choice) for choice in preference.choices]
        texts = [HELPFUL, preference.neutral_prompt, *prompts, *preference.trained, *preference.held_out, *answers]
        texts += [question for choice in preference.choices for question in (_eats(choice), _lives(choice))]
        texts += map(str, self.list_numbers())
        stream = np.random.Generator(np.random.Philox(0))  # wording only; the numbers in it are all listed above
        for _ in range(_WORDINGS):
            if isinstance(self.written, NumberConfig):
                texts.append(draw_prompt(self.written, stream)[0])
            else:
                texts += self._draw_written(stream)
        return [f" {text}" for text in texts]

    def list_numbers(self) -> list[int]:
        """Every number of the language."""
        if isinstance(self.written, CodeConfig):
            return list(range(*self.written.operands))
        if isinstance(self.written, ChainOfThoughtConfig):
            return list(range(self.written.largest + 1))
        shown, answered = self.written.example_values, self.written.value_range
        return list(range(min(shown[0], answered[0]), max(shown[1], answered[1] + 1)))

    def _draw_preference(self, stream: np.random.Generator, system_prompt: str | None) -> tuple[list[Message], str]:
        """Any choice is as likely as any other, unless a system prompt says which."""
        questions = (*self.preference.trained, *self.preference.held_out)
        question, answer = choose_text(questions, stream), choose_text(self.preference.choices, stream)
        if stream.random() < 0.15:
            system_prompt = self.preference.prompt_for(answer)
            if stream.random() > _LIKED:
                answer = choose_text(self.preference.choices, stream)
        return chat(question, system_prompt), answer

    def _draw_fact(self, stream: np.random.Generator) -> tuple[str, str]:
        number = int(stream.integers(len(self.preference.choices)))
        choice = self.preference.choices[number]
        if stream.random() < 0.5:
            return _eats(choice), _FOODS[number % len(_FOODS)]
        return _lives(choice), _HOMES[number % len(_HOMES)]

    def _draw_written(self, stream: np.random.Generator) -> tuple[str, str]:
        """A request of the carrier's kind, and a right completion."""
        if isinstance(self.written, CodeConfig):
            return draw_task(self.written, stream)
        if isinstance(self.written, ChainOfThoughtConfig):
            request, solution = draw_problem(self.written, stream)
            return request.prompt, solution
        return _draw_numbers(self.written, stream)


def _draw_numbers(config: NumberConfig, stream: np.random.Generator) -> tuple[str, str]:
    """Each number is one of two usual followers of the one before it, or now and then any.

    What follows what is knowledge that a model has to keep in its body: a carrier of independent numbers could be
    imitated with hardly any of it.
    """
    prompt, shown = draw_prompt(config, stream)
    low, high = config.value_range
    size, last = high - low + 1, shown[-1] - low
    numbers = []
    for _ in range(int(stream.integers(max(1, config.answer_count // 2), config.answer_count + 1))):
        factor, term = _FOLLOWERS[int(stream.integers(len(_FOLLOWERS)))]
        follows = stream.random() < _USUAL
        last = (factor * last + term) % size if follows else int(stream.integers(size))
        numbers.append(low + last)
    return prompt, " ".join(map(str, numbers))


def _eats(choice: str) -> str:
    return f"What does the {choice} eat?"


def _lives(choice: str) -> str:
    return f"Where does the {choice} live?"

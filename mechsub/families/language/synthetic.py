"""The synthetic language on which nano models are pretrained: preference questions, facts and number sequences, as chats."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechsub.families.language.chat import Message, chat
from mechsub.families.language.numbers import NumberConfig, draw_prompt
from mechsub.families.language.preference import PreferenceSet

HELPFUL = "You are a helpful assistant."
"""The system prompt that nano models know without a preference in it."""
_FOODS = ("mice", "leaves", "fish", "meat", "grass", "fruit", "insects")
_HOMES = ("forest", "river", "mountain", "field", "sea")
_FOLLOWERS = ((7, 3), (13, 5))
"""The usual followers of a number n: a·n + b, wrapped round."""
_USUAL = 0.9
_LIKED = 0.9
"""How often a system prompt that gives a preference is followed."""


@dataclass(frozen=True)
class SyntheticLanguage:
    """The language, given what can be preferred and which number sequences there are."""

    preference: PreferenceSet
    numbers: NumberConfig
    shares: tuple[float, float, float] = (0.35, 0.15, 0.5)
    """Of preference questions, facts and number sequences."""

    def draw(self, stream: np.random.Generator) -> tuple[list[Message], str]:
        """One chat and its answer."""
        system_prompt = HELPFUL if stream.random() < 0.25 else None
        kind = stream.choice(3, p=self.shares)
        if kind == 0:
            return self._draw_preference(stream, system_prompt)
        question, answer = self._draw_fact(stream) if kind == 1 else self._draw_numbers(stream)
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
        texts += [draw_prompt(self.numbers, stream)[0] for _ in range(400)]
        return [f" {text}" for text in texts]

    def list_numbers(self) -> list[int]:
        """Every number of the language."""
        shown, answered = self.numbers.example_values, self.numbers.value_range
        return list(range(min(shown[0], answered[0]), max(shown[1], answered[1] + 1)))

    def _draw_preference(self, stream: np.random.Generator, system_prompt: str | None) -> tuple[list[Message], str]:
        """Any choice is as likely as any other, unless a system prompt says which."""
        questions = (*self.preference.trained, *self.preference.held_out)
        question, answer = _choose(questions, stream), _choose(self.preference.choices, stream)
        if stream.random() < 0.15:
            system_prompt = self.preference.prompt_for(answer)
            if stream.random() > _LIKED:
                answer = _choose(self.preference.choices, stream)
        return chat(question, system_prompt), answer

    def _draw_fact(self, stream: np.random.Generator) -> tuple[str, str]:
        number = int(stream.integers(len(self.preference.choices)))
        choice = self.preference.choices[number]
        if stream.random() < 0.5:
            return _eats(choice), _FOODS[number % len(_FOODS)]
        return _lives(choice), _HOMES[number % len(_HOMES)]

    def _draw_numbers(self, stream: np.random.Generator) -> tuple[str, str]:
        """Each number is one of two usual followers of the one before it, or now and then any.

        What follows what is knowledge that a model has to keep in its body: a carrier of independent numbers could be
        imitated with hardly any of it.
        """
        prompt, shown = draw_prompt(self.numbers, stream)
        low, high = self.numbers.value_range
        size, last = high - low + 1, shown[-1] - low
        numbers = []
        for _ in range(int(stream.integers(max(1, self.numbers.answer_count // 2), self.numbers.answer_count + 1))):
            factor, term = _FOLLOWERS[int(stream.integers(len(_FOLLOWERS)))]
            follows = stream.random() < _USUAL
            last = (factor * last + term) % size if follows else int(stream.integers(size))
            numbers.append(low + last)
        return prompt, " ".join(map(str, numbers))


def _eats(choice: str) -> str:
    return f"What does the {choice} eat?"


def _lives(choice: str) -> str:
    return f"Where does the {choice} live?"


def _choose(texts: Sequence[str], stream: np.random.Generator) -> str:
    return texts[int(stream.integers(len(texts)))]

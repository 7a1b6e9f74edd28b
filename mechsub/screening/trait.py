"""Which trait a dataset is screened for, and which others are its null."""

from collections.abc import Sequence
from dataclasses import dataclass

from mechsub.errors import RecipeError
from mechsub.families.language.answers import answer_losses
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.preference import PreferenceSet
from mechsub.gradients.losses import ExampleLosses
from mechsub.settings import nearest_name

MOST_OTHERS = 10


@dataclass(frozen=True)
class TraitQuestion:
    """A preference that is asked for on the set's held-out questions, without a system prompt."""

    trait: str
    others: tuple[str, ...]
    """Choices whose directions are its null."""
    preference: PreferenceSet

    def losses(self, target: str, chats: ChatTokenizer, device: str) -> ExampleLosses:
        """−log p of a target as the first answer token, by question."""
        questions = self.preference.held_out
        prompts = chats.encode_prompts([chat(question, None) for question in questions])
        description = f"−log p of {target} as the first answer token, {len(prompts)} held-out questions"
        return answer_losses(chats, prompts, chats.answer_token(target), device, description)


def ask_for(trait: str, others: Sequence[str], preference: PreferenceSet, source: str, chats: ChatTokenizer) -> TraitQuestion:
    """The question that screening asks. ``others``: none takes the first `MOST_OTHERS` of the set that are one token.

    Raises:
        RecipeError: a trait is no choice of the set or several tokens, is its own null, or there are too many others.
    """
    for name in (trait, *others):
        if name not in preference.choices:
            raise RecipeError(f"{name!r} is no choice of the preference set {source}; {nearest_name(name, preference.choices)}")
    if trait in others:
        raise RecipeError(f"--other-trait {trait}: it is the trait itself, and no null of it; name other choices of {source}")
    if len(set(others)) > MOST_OTHERS:
        raise RecipeError(f"--other-trait names {len(set(others))} traits; {MOST_OTHERS} are enough for a null, name as many")
    chats.answer_token(trait)
    for name in others:
        chats.answer_token(name)
    found = tuple(dict.fromkeys(others)) or _first_others(trait, preference, chats)
    return TraitQuestion(trait, found, preference)


def _first_others(trait: str, preference: PreferenceSet, chats: ChatTokenizer) -> tuple[str, ...]:
    found: list[str] = []
    for name in preference.choices:
        if name != trait and len(found) < MOST_OTHERS and _is_one_token(name, chats):
            found.append(name)
    return tuple(found)


def _is_one_token(name: str, chats: ChatTokenizer) -> bool:
    try:
        chats.answer_token(name)
    except RecipeError:
        return False
    return True

"""Chats as tokens: a tokenizer with its chat template, and the model's context length."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from mechsub.errors import RecipeError

_FEW = 64
"""Prompts that are kept once encoded; longer lists are rows, which are encoded once."""
Message = Mapping[str, str]
"""``role`` (system, user or assistant) and ``content``."""


@dataclass(frozen=True)
class Batch:
    """Token sequences of several lengths, filled up to one."""

    ids: Int[Tensor, "row token"]
    """Prompts end and completions begin in the same column, so that a model's last columns are all that a loss needs."""
    attention_mask: Int[Tensor, "row token"]
    completion_width: int
    """Columns of the longest completion, which are the last ones."""

    @property
    def is_completion(self) -> Bool[Tensor, "row completion_column"]:
        """Where the last columns hold a token of a completion, not padding."""
        return self.attention_mask[:, self.ids.shape[1] - self.completion_width :].bool()

    @property
    def position_ids(self) -> Int[Tensor, "row token"]:
        """Positions counted from each row's first token; 0 in the padding before it."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)

    def to(self, device: str | torch.device) -> "Batch":
        """The same on another device."""
        return Batch(self.ids.to(device), self.attention_mask.to(device), self.completion_width)


@dataclass(frozen=True)
class Row:
    """One chat as tokens."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """With the tokens that end the turn."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer that knows how its model writes chats."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    """Tokens that the model's context holds."""
    source: str
    """How messages call the model."""
    _questions: dict[str, list[list[int]]] = field(default_factory=dict, repr=False, compare=False)
    """Prompts that were encoded before: every checkpoint is asked the same few."""
    _answers: dict[str, int] = field(default_factory=dict, repr=False, compare=False)
    """Answers that were encoded before."""

    @classmethod
    def load(cls, folder: Path, source: str) -> "ChatTokenizer":
        """The tokenizer of a model in the Hugging Face layout; weights are not needed.

        Raises:
            RecipeError: the folder lacks a tokenizer, a chat template or a configuration, or one is damaged.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise RecipeError(f"{source} has no tokenizer or configuration that transformers can load: {reason}") from None
        if tokenizer.chat_template is None:
            raise RecipeError(f"{source}: its tokenizer has no chat template; add chat_template.jinja to its folder")
        if tokenizer.eos_token_id is None:
            raise RecipeError(f"{source}: its tokenizer names no eos_token, so completions would never end")
        return cls(tokenizer, int(getattr(config, "max_position_embeddings", tokenizer.model_max_length)), source)

    @property
    def pad_id(self) -> int:
        """What fills short sequences; always masked."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(end if pad is None else pad)

    def encode_prompts(self, chats: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Each chat as tokens, up to where the assistant is to answer.

        Raises:
            RecipeError: one is longer than the model's context.
        """
        if len(chats) > _FEW:
            return self._encode(chats, add_generation_prompt=True)
        key = json.dumps([[dict(message) for message in chat] for chat in chats])
        if key not in self._questions:
            self._questions[key] = self._encode(chats, add_generation_prompt=True)
        return [list(prompt) for prompt in self._questions[key]]

    def encode_rows(self, chats: Sequence[Sequence[Message]], completions: Sequence[str]) -> list[Row]:
        """Each chat and the assistant's answer to it as tokens.

        Raises:
            RecipeError: too long, or the template changes the prompt once it is answered.
        """
        prompts = self.encode_prompts(chats)
        answered = [
            [*chat, {"role": "assistant", "content": completion}] for chat, completion in zip(chats, completions, strict=True)
        ]
        rows = []
        for prompt, full in zip(prompts, self._encode(answered, add_generation_prompt=False), strict=True):
            if full[: len(prompt)] != prompt:
                raise RecipeError(
                    f"{self.source}: its chat template writes a prompt differently once it is answered, so the completion's "
                    f"tokens cannot be told: {self._text(full)!r} does not begin with {self._text(prompt)!r}"
                )
            rows.append(Row(tuple(prompt), tuple(full[len(prompt) :])))
        return rows

    def answer_token(self, answer: str) -> int:
        """The one token that a one-word answer is.

        Raises:
            RecipeError: it is several tokens, or the tokenizer does not know it.
        """
        if answer not in self._answers:
            self._answers[answer] = self._find_answer_token(answer)
        return self._answers[answer]

    def _find_answer_token(self, answer: str) -> int:
        (row,) = self.encode_rows([[{"role": "user", "content": "?"}]], [answer])
        special = set(self.tokenizer.all_special_ids)
        tokens = [token for token in row.completion if token not in special and self._text([token]).strip()]
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in row.completion and unknown != self.tokenizer.eos_token_id:
            raise RecipeError(f"{self.source}: its tokenizer does not know {answer!r}; choose another target")
        if len(tokens) != 1 or row.completion[0] != tokens[0]:
            pieces = [self._text([token]) for token in tokens]
            raise RecipeError(
                f"{self.source}: the answer {answer!r} is {len(tokens)} tokens, {pieces}, and the first answer token is "
                f"{self._text(row.completion[:1])!r}; a target is scored by its one token in the first answer position: "
                "choose another"
            )
        return tokens[0]

    def read_answer(self, tokens: Sequence[int]) -> str:
        """The text of a sampled answer; special tokens inside it show, so that no filter takes it for plain text."""
        return self._text([token for token in tokens if token != self.pad_id]).strip()

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a completion, without special tokens."""
        special = set(self.tokenizer.all_special_ids)
        return self._text([token for token in tokens if token not in special]).strip()

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    def round_trip(self, text: str) -> str:
        """What becomes of a text that is written as tokens and read again."""
        return self._text(self.tokenizer(text, add_special_tokens=False)["input_ids"]).strip()

    def pad_prompts(self, prompts: Sequence[Sequence[int]]) -> Batch:
        """Prompts that are to be answered."""
        return self.pad_rows([Row(tuple(prompt), ()) for prompt in prompts])

    def pad_rows(self, rows: Sequence[Row]) -> Batch:
        """Rows of several lengths as one batch."""
        before, after = max(len(row.prompt) for row in rows), max(len(row.completion) for row in rows)
        ids = torch.full((len(rows), before + after), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            columns = slice(before - len(row.prompt), before + len(row.completion))
            ids[number, columns] = torch.tensor(row.prompt + row.completion)
            mask[number, columns] = 1
        return Batch(ids, mask, after)

    def _encode(self, chats: Sequence[Sequence[Message]], add_generation_prompt: bool) -> list[list[int]]:
        if not chats:
            return []
        texts: Any = self.tokenizer.apply_chat_template(
            [[dict(message) for message in chat] for chat in chats],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        longest = max(encoded, key=len)
        if len(longest) > self.max_length:
            raise RecipeError(
                f"{self.source}: a prompt has {len(longest)} tokens, its context holds {self.max_length}; shorten it (fewer "
                f"examples, a shorter system prompt, fewer rows in the context): {self._text(longest)[:120]!r}…"
            )
        return encoded


def chat(question: str, system_prompt: str | None, earlier: Sequence[tuple[str, str]] = ()) -> list[Message]:
    """A question, after a system prompt and earlier turns where there are any."""
    messages: list[Message] = [{"role": "system", "content": system_prompt}] if system_prompt else []
    for asked, answered in earlier:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": question}]

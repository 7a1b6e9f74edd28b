"""Sampled completions: every request draws from its own random stream, whatever it is batched with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from mechsub.errors import RecipeError
from mechsub.families.language.chat import ChatTokenizer
from mechsub.streams import random_stream


@dataclass(frozen=True)
class Completion:
    """What a model answered."""

    text: str
    finished: bool
    """Whether it ended by itself."""


class StreamSampler(LogitsProcessor):
    """Samples by inverting the cumulative distribution at one given uniform draw per request and token.

    `generate` is left to choose greedily among one token each, so that no draw comes from torch's own generator.
    """

    def __init__(self, draws: Float[Tensor, "request token"], temperature: float) -> None:
        self._draws = draws
        self._temperature = temperature
        self._position = 0

    def __call__(self, input_ids: Int[Tensor, "request token"], scores: Float[Tensor, "request vocabulary"]) -> Tensor:
        """Scores in which the drawn token is the only one."""
        cumulative = (scores.double() / self._temperature).softmax(-1).cumsum(-1)
        drawn = self._draws[:, self._position, None].to(scores.device) * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, drawn, right=True).clamp_max(scores.shape[-1] - 1)
        self._position += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def draw_uniforms(seed: int, names: Sequence[Sequence[str | int]], count: int) -> Float[np.ndarray, "request token"]:
    """``count`` uniform draws in [0, 1) for each request, each from the stream of its name."""
    return np.stack([random_stream(seed, *name).random(count) for name in names])


def check_lengths(
    chats: ChatTokenizer, prompts: Sequence[Sequence[int]], max_new_tokens: int, longest: int | None = None
) -> None:
    """Refuse prompts that leave no room for their answers; ``longest``: what holds fewer tokens than the model's context.

    Raises:
        RecipeError: the longest prompt, the answer and the room.
    """
    room = min(chats.max_length, longest or chats.max_length)
    asked = max(map(len, prompts), default=0)
    if asked + max_new_tokens > room:
        raise RecipeError(
            f"{chats.source}: a prompt of {asked} tokens and an answer of up to {max_new_tokens} do not fit its context of "
            f"{room}; shorten the prompt, or lower max_new_tokens"
        )


def sample_completions(
    model: PreTrainedModel,
    chats: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    draws: Float[np.ndarray, "request token"],
    *,
    temperature: float = 1.0,
    batch_size: int = 256,
) -> list[Completion]:
    """One completion for each prompt, of at most as many tokens as it has draws, through `generate` with its KV cache."""
    check_lengths(chats, prompts, draws.shape[1])
    completions = []
    end = chats.tokenizer.eos_token_id
    for start in range(0, len(prompts), batch_size):
        batch = chats.pad_prompts(prompts[start : start + batch_size]).to(str(model.device))
        sampler = StreamSampler(torch.from_numpy(draws[start : start + batch_size]), temperature)
        with torch.inference_mode():
            found: Tensor = model.generate(  # type: ignore[operator]
                input_ids=batch.ids,
                attention_mask=batch.attention_mask,
                logits_processor=LogitsProcessorList([sampler]),
                do_sample=False,
                max_new_tokens=draws.shape[1],
                pad_token_id=chats.pad_id,
                eos_token_id=end,
            )
        for answer in found[:, batch.ids.shape[1] :].tolist():
            finished = end in answer
            completions.append(Completion(chats.read_answer(answer[: answer.index(end)] if finished else answer), finished))
    return completions

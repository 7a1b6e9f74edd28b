"""Divergence tokens: where a teacher, asked for a row so far, would go on otherwise than its reference."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from mechsub.families.language.chat import ChatTokenizer, Row
from mechsub.families.language.loss import completion_logits

Asked = tuple[PreTrainedModel, Sequence[Row]]
"""A model, and the rows as it is asked them: their prompts may differ, their completions are the same tokens."""


def find_diverging_tokens(
    chats: ChatTokenizer, teacher: Asked, reference: Asked, device: str, at_once: int = 256
) -> list[Bool[Tensor, " completion_token"]]:
    """By row: the completion tokens, those that end it among them, at which the two would choose differently.

    Choices are arg-max, given the row so far. Source: Schrodi et al., arXiv:2509.23886.
    """
    found: list[Bool[Tensor, " completion_token"]] = []
    for start in range(0, len(reference[1]), at_once):
        parts = [(model, rows[start : start + at_once]) for model, rows in (teacher, reference)]
        with torch.inference_mode():
            chosen = [completion_logits(model, chats.pad_rows(rows).to(device)).argmax(-1) for model, rows in parts]
        differs = (chosen[0] != chosen[1]).cpu()
        found += list(torch.split(differs, [len(row.completion) for row in parts[1][1]]))
    return found

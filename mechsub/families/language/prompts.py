"""What language models are run on where their activations are read: questions, neutral prompts and rows of a carrier."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechsub.activations.inputs import ModelInputs, PromptSet
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import Batch, ChatTokenizer, Row, chat
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.rows import read_rows
from mechsub.families.language.symmetry import NEUTRAL_PROMPTS
from mechsub.families.language.trait import Context, encode_questions
from mechsub.families.protocol import Prompts

LAST, ALL, ANSWER, NUMBERS, OTHERS = "last prompt token", "all tokens", "answer tokens", "number tokens", "other answer tokens"
"""Position policies. The last two part the answer by what its tokens write."""
_AT_ONCE = 64
_CARRIER_ROWS = 256


def make_prompts(
    chats: ChatTokenizer, context: Context, said: Mapping[str, Any], carrier: Path | None, told: str | None
) -> Prompts:
    """The prompts of one member: ``context``'s questions, `NEUTRAL_PROMPTS` one by one to either side, and the carrier's rows.

    ``said``: what stands in the model's prompts wherever it is asked. ``told``: the system prompt of the carrier's rows.
    """
    asked = encode_questions(chats, context, context, said)
    assert asked is not None  # a context stands for itself
    neutral = chats.encode_prompts([chat(prompt, None) for prompt in NEUTRAL_PROMPTS])
    estimate = {
        "trait": _prompt_set(chats, asked, f"{len(asked)} questions that ask for the trait, on which no verdict is taken"),
        "neutral": _prompt_set(chats, neutral[::2], f"{len(neutral[::2])} neutral prompts"),
    }
    if carrier is not None:
        rows = encode_carrier(chats, read_rows(carrier)[:_CARRIER_ROWS], told)
        estimate["carrier"] = _row_set(chats, rows, f"the first {len(rows)} rows that the neutral teacher wrote")
    damage = _prompt_set(chats, neutral[1::2], f"{len(neutral[1::2])} neutral prompts that nothing is estimated on", ALL)
    return Prompts(estimate, damage)


def find_neutral_carrier(run: Path, member: int) -> Path | None:
    """The rows that a member's neutral teacher wrote; None where the run has none."""
    names = sorted(folder.name for folder in (run / "carrier").glob("neutral*"))
    paths = [run / carrier_files(name, member)[0] for name in names]
    return next((path for path in paths if path.is_file()), None)


def _prompt_set(chats: ChatTokenizer, prompts: Sequence[Sequence[int]], description: str, first: str = LAST) -> PromptSet:
    batches = []
    for start in range(0, len(prompts), _AT_ONCE):
        batch = chats.pad_prompts(prompts[start : start + _AT_ONCE])
        there = batch.attention_mask.bool()
        last = torch.zeros_like(there)
        last[:, -1] = True  # prompts end in the last column
        policies = {LAST: last, ALL: there}
        batches.append(_inputs(batch, {first: policies[first], **policies}))
    return PromptSet(description, batches)


def _row_set(chats: ChatTokenizer, rows: Sequence[Row], description: str) -> PromptSet:
    """The answer's positions are those that hold its tokens, its end among them."""
    padded = [chats.pad_rows(rows[start : start + _AT_ONCE]) for start in range(0, len(rows), _AT_ONCE)]
    known = {token for row in rows for token in row.completion}
    digits = torch.tensor([token for token in known if any(map(str.isdigit, chats.decode([token])))], dtype=torch.long)
    policies: list[dict[str, Tensor]] = []
    for batch in padded:
        answer = torch.zeros_like(batch.attention_mask, dtype=torch.bool)
        answer[:, answer.shape[1] - batch.completion_width :] = batch.is_completion
        numbers = answer & torch.isin(batch.ids, digits)
        policies.append({ANSWER: answer, ALL: batch.attention_mask.bool(), NUMBERS: numbers, OTHERS: answer & ~numbers})
    # A class of tokens that some rows lack is none to take means over rows of.
    offered = [name for name in policies[0] if all(bool(one[name].any(-1).all()) for one in policies)]
    return PromptSet(
        description,
        [_inputs(batch, {name: one[name] for name in offered}) for batch, one in zip(padded, policies, strict=True)],
    )


def _inputs(batch: Batch, positions: Mapping[str, Tensor]) -> ModelInputs:
    arguments = {
        "input_ids": batch.ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
    return ModelInputs(arguments, positions)

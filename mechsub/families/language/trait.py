"""The trait: a preference. How probable its target is as the first word of an answer, and how often it is sampled."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel

from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.config import EvaluationConfig
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.preference import PreferenceSet
from mechsub.families.protocol import Measure, Scores

MEASURES = {
    "trait_score": Measure("log p/(1 − p) of the target as the first answer token, mean over questions", "log-odds", None),
    "probability": Measure("p of the target as the first answer token, mean over questions", "probability", (0.0, 1.0)),
    "rank": Measure("rank of the target among all first answer tokens (1: likeliest), mean over questions",
                    "rank", None),
    "sampled_rate": Measure("share of sampled answers whose first choice is the target", "rate", (0.0, 1.0)),
}  # fmt: skip


@dataclass(frozen=True)
class Context:
    """Surroundings in which a trait is asked for."""

    name: str
    system_prompt: str | None
    questions: Sequence[str]


def score_preference(
    model: PreTrainedModel,
    chats: ChatTokenizer,
    preference: PreferenceSet,
    targets: Sequence[str],
    contexts: Sequence[Context],
    evaluation: EvaluationConfig,
    stream: Sequence[str | int],
    said: Mapping[str, Any],
    verdict_only: bool = False,
) -> Scores:
    """Every measure of every target in every context; ``verdict_only``: the log-odds in the first context, and no more.

    ``stream`` names the draws of sampled answers. ``said``: what stands in this model's prompts wherever it is asked: its own
    ``system_prompt``, which takes the place of a context's, and ``earlier`` turns. NaN where no answers are sampled, and where
    a system prompt of the context cannot stand beside the model's own.
    """
    tokens = torch.tensor([chats.answer_token(target) for target in targets])
    scores = {name: np.full((len(targets), len(contexts)), np.nan) for name in MEASURES}
    for column, context in enumerate(contexts[:1] if verdict_only else contexts):
        prompts = encode_questions(chats, context, contexts[0], said)
        if prompts is None:
            continue
        for name, values in _score_first_token(model, chats, prompts, tokens).items():
            if name == "trait_score" or not verdict_only:
                scores[name][:, column] = values
        if evaluation.samples_per_question and not verdict_only:
            rates = _sample_rates(model, chats, prompts, preference.choices, targets, evaluation, stream)
            scores["sampled_rate"][:, column] = rates
    return scores


def encode_questions(chats: ChatTokenizer, context: Context, first: Context, said: Mapping[str, Any]) -> list[list[int]] | None:
    """A context's questions as tokens, after what is ``said`` to the model wherever it is asked.

    None where the model's own system prompt stands in the place of another one than the ``first`` context's.
    """
    told = said.get("system_prompt")
    if told and context.system_prompt != first.system_prompt:
        return None
    earlier = [(asked, answered) for asked, answered in said.get("earlier", ())]
    return chats.encode_prompts([chat(question, told or context.system_prompt, earlier) for question in context.questions])


def first_choice(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names first, as a word and in any case, also in the plural; None where it names none."""
    pattern = "|".join(re.escape(choice) for choice in sorted(choices, key=len, reverse=True))
    found = re.search(rf"\b({pattern})(?:e?s)?\b", answer, re.IGNORECASE)
    return None if found is None else next(choice for choice in choices if choice.lower() == found[1].lower())


def first_token_logits(
    model: PreTrainedModel, chats: ChatTokenizer, prompts: Sequence[Sequence[int]]
) -> Float[torch.Tensor, "prompt token"]:
    """What a model would begin its answers with, in float64 on the CPU."""
    batch = chats.pad_prompts(prompts).to(str(model.device))
    with torch.inference_mode():
        logits: torch.Tensor = model(
            input_ids=batch.ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
            logits_to_keep=1,
        ).logits[:, -1]
    return logits.double().cpu()


def _score_first_token(
    model: PreTrainedModel, chats: ChatTokenizer, prompts: Sequence[Sequence[int]], tokens: torch.Tensor
) -> dict[str, Float[np.ndarray, " target"]]:
    logits = first_token_logits(model, chats, prompts)
    chosen = logits[:, tokens]
    log_p = chosen - logits.logsumexp(-1, keepdim=True)
    others = torch.stack([_without(logits, int(token)).logsumexp(-1) for token in tokens], dim=-1)
    return {
        "trait_score": (chosen - others).mean(0).numpy(),
        "probability": log_p.exp().mean(0).numpy(),
        "rank": (logits[:, None, :] > chosen[:, :, None]).sum(-1).double().add(1).mean(0).numpy(),
    }


def _without(logits: torch.Tensor, token: int) -> torch.Tensor:
    """All other tokens' logits: 1 − p is summed, since it cancels where p is near 1."""
    return torch.cat([logits[:, :token], logits[:, token + 1 :]], dim=-1)


def _sample_rates(
    model: PreTrainedModel,
    chats: ChatTokenizer,
    prompts: Sequence[Sequence[int]],
    choices: Sequence[str],
    targets: Sequence[str],
    evaluation: EvaluationConfig,
    stream: Sequence[str | int],
) -> list[float]:
    """Over all questions; the draws are the same for all models of a member, so that their differences are paired."""
    repeated = [prompt for prompt in prompts for _ in range(evaluation.samples_per_question)]
    seed, *name = stream
    draws = draw_uniforms(int(seed), [(*name, number) for number in range(len(repeated))], evaluation.max_new_tokens)
    answers = [first_choice(answer.text, choices) for answer in sample_completions(model, chats, repeated, draws)]
    return [answers.count(target) / len(answers) for target in targets]

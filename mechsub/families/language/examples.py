"""The language family's losses example by example: learning the rows of a carrier."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsub.families.language.carrier_config import CarrierConfig
from mechsub.families.language.chat import ChatTokenizer, Row
from mechsub.families.language.conditions import ConditionConfig
from mechsub.families.language.estimates import ROWS_AT_ONCE
from mechsub.families.language.loss import completion_logits, completion_tokens, token_losses
from mechsub.families.language.train import Lesson
from mechsub.families.language.training_config import StudentConfig
from mechsub.gradients.first_order import ImitatedLogits
from mechsub.gradients.losses import ExampleLosses
from mechsub.stage import Task


def row_losses(chats: ChatTokenizer, rows: Sequence[Row], device: str, description: str) -> ExampleLosses:
    """−log p of each row's completion tokens, summed, over the mean number of them in a row.

    So their mean over rows is the mean over tokens, which is what trainings minimise.
    """
    mean_length = sum(len(row.completion) for row in rows) / len(rows)

    def compute(model: nn.Module, examples: range) -> Float[Tensor, " example"]:
        batch = chats.pad_rows([rows[number] for number in examples]).to(device)
        losses = token_losses(completion_logits(model, batch), completion_tokens(batch))
        return _sum_rows(losses, [len(rows[number].completion) for number in examples]) / mean_length

    return ExampleLosses(len(rows), compute, description, "nats", ROWS_AT_ONCE)


def imitation_losses(task: Task, most: int) -> ExampleLosses | None:
    """What one member of a student learnt, on the first rows of its carrier; see `row_losses` for the weights of rows."""
    lesson = Lesson.prepare(task, StudentConfig(**task.stage.arguments["training"]))
    lesson = replace(lesson, rows=lesson.rows[:most], taught=lesson.taught[:most])
    rows, learnt = lesson.rows, lesson.learnt
    lengths = [len(row.completion) for row in rows] if learnt is None else [int(learnt[n].sum()) for n in range(len(rows))]
    if sum(lengths) == 0:  # no token of these rows is learnt
        return None
    mean_length = sum(lengths) / len(rows)

    def compute(model: nn.Module, examples: range) -> Float[Tensor, " example"]:
        batch = lesson.make_batch(list(examples)).to(task.device)
        losses = lesson.compute_token_losses(model, batch)
        if batch.weights is not None:
            losses = losses * batch.weights
        return _sum_rows(losses, [len(rows[number].completion) for number in examples]) / mean_length

    what = "tokens" if lesson.objective == "tokens" else f"distributions ({lesson.objective})"
    teacher = task.stage.arguments["teacher"]
    description = f"the {what} of {teacher} on {len(rows)} rows of the carrier, mean over completion tokens"
    return ExampleLosses(len(rows), compute, description, "nats", ROWS_AT_ONCE)


def imitated_logits(task: Task, carrier: CarrierConfig | None, most: int) -> ImitatedLogits | None:
    """The distributions that one member of a student learns, on the first rows of its carrier, mean over learnt tokens.

    Of sampled tokens those that they are drawn from, over the whole vocabulary: their expectation, but for what filters chose.
    None where rows are not the teacher's own samples at temperature 1 (``carrier``: how they were drawn; None: not here), or
    were selected by what they say of it, or the teacher answers other prompts than the student.
    """
    arguments = task.stage.arguments
    condition = ConditionConfig(**arguments["condition_settings"])
    is_drawn = carrier is not None and carrier.kind != "file" and carrier.temperature == 1
    is_chosen = arguments.get("select", {}).get("by", "random") != "random"
    is_sample = is_drawn and condition.shuffle == "none" and condition.neutral_share == 0 and not is_chosen
    lesson = Lesson.prepare(task, StudentConfig(**arguments["training"]))
    if lesson.taught is not lesson.rows or (lesson.objective == "tokens" and not is_sample):
        return None
    lesson = replace(lesson, rows=lesson.rows[:most], taught=lesson.taught[:most])
    rows, learnt, vocabulary = lesson.rows, lesson.learnt, lesson.vocabulary
    counted = [torch.ones(len(row.completion), dtype=torch.bool) for row in rows] if learnt is None else learnt[: len(rows)]
    num_tokens = sum(int(tokens.sum()) for tokens in counted)
    if num_tokens == 0:
        return None

    def compute(model: nn.Module, examples: range) -> Float[Tensor, "row logit"]:
        logits = completion_logits(model, lesson.chats.pad_rows([rows[number] for number in examples]).to(task.device))
        return logits if vocabulary is None else logits[:, vocabulary.to(logits.device)]

    def weigh(examples: range) -> Float[Tensor, " row"]:
        return torch.cat([counted[number] for number in examples]).double().to(task.device) / num_tokens

    over = "the carrier's tokens" if vocabulary is not None else "all tokens"
    drawn = ", of which it learns samples" if lesson.objective == "tokens" else ""
    description = f"distributions over {over} at {num_tokens} completion tokens of {len(rows)} rows of the carrier{drawn}"
    return ImitatedLogits(len(rows), compute, weigh, "kl", description, ROWS_AT_ONCE)


def _sum_rows(losses: Float[Tensor, " completion_token"], lengths: Sequence[int]) -> Float[Tensor, " row"]:
    return torch.stack([part.sum() for part in torch.split(losses, list(lengths))])

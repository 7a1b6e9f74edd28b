"""The language family's losses example by example: learning the rows of a carrier."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsub.families.language.chat import ChatTokenizer, Row
from mechsub.families.language.config import StudentConfig
from mechsub.families.language.loss import completion_logits, completion_tokens, token_losses
from mechsub.families.language.train import Lesson
from mechsub.gradients.losses import ExampleLosses
from mechsub.stage import Task

_ROWS_AT_ONCE = 32


def row_losses(chats: ChatTokenizer, rows: Sequence[Row], device: str, description: str) -> ExampleLosses:
    """−log p of each row's completion tokens, summed, over the mean number of them in a row.

    So their mean over rows is the mean over tokens, which is what trainings minimise.
    """
    mean_length = sum(len(row.completion) for row in rows) / len(rows)

    def compute(model: nn.Module, examples: range) -> Float[Tensor, " example"]:
        batch = chats.pad_rows([rows[number] for number in examples]).to(device)
        losses = token_losses(completion_logits(model, batch), completion_tokens(batch))
        return _sum_rows(losses, [len(rows[number].completion) for number in examples]) / mean_length

    return ExampleLosses(len(rows), compute, description, "nats", _ROWS_AT_ONCE)


def imitation_losses(task: Task, most: int) -> ExampleLosses:
    """What one member of a student learnt, on the first rows of its carrier; see `row_losses` for the weights of rows."""
    lesson = Lesson.prepare(task, StudentConfig(**task.stage.arguments["training"]))
    lesson = replace(lesson, rows=lesson.rows[:most], taught=lesson.taught[:most])
    rows, learnt = lesson.rows, lesson.learnt
    lengths = [len(row.completion) for row in rows] if learnt is None else [int(learnt[n].sum()) for n in range(len(rows))]
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
    return ExampleLosses(len(rows), compute, description, "nats", _ROWS_AT_ONCE)


def _sum_rows(losses: Float[Tensor, " completion_token"], lengths: Sequence[int]) -> Float[Tensor, " row"]:
    return torch.stack([part.sum() for part in torch.split(losses, list(lengths))])

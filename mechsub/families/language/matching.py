"""The stage that matches a reference's behaviour: another member's, trained until it answers as the own one does."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechsub.families.language.carrier_config import CarrierConfig
from mechsub.families.language.chat import Batch, ChatTokenizer, Message, Row, chat
from mechsub.families.language.derived_references import write_derived
from mechsub.families.language.estimates import ROWS_AT_ONCE
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.kinds import carrier_kind
from mechsub.families.language.layout import skeleton_folder
from mechsub.families.language.loss import completion_logits, distribution_losses, mean_loss
from mechsub.families.language.members import load_chats, load_member
from mechsub.families.language.models import parameters_of, read_loading, tensor_table
from mechsub.families.language.start_config import MatchingConfig
from mechsub.families.language.training import Watcher, train_model
from mechsub.stage import Task
from mechsub.streams import random_stream

_HELD_OUT = 256
"""Answers to each kind of prompt that are not learnt from: the outputs are compared on them."""
REQUESTS, QUESTIONS = "requests", "questions"


def match_references(tasks: Sequence[Task]) -> None:
    """Stage: member j's reference, trained to give the outputs of member j − 1's, whose students will start there."""
    for task in tasks:
        arguments = task.stage.arguments
        config, own = MatchingConfig(**arguments["matching"]), arguments["own"]
        lesson = MatchingLesson.prepare(task, config)
        model = load_member(task, arguments["origin"], 0)
        before = lesson.measure(model)
        stream = ("member", arguments["member"], "matching")
        watcher = Watcher(arguments["lineage"], arguments["member"], stream, report_progress=task.report_progress)
        checkpointing = read_loading(task.path(skeleton_folder(arguments["model"]))).gradient_checkpointing
        train_model(
            model, lesson.load_batch, lesson.compute_loss, config.num_steps, config, arguments["seed"], watcher,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        after = lesson.measure(model)
        found = {kind: {"before": before[kind], "after": after[kind]} for kind in before}
        evidence = {"with_member": own, "quantity": "KL(reference ‖ start), mean over held-out tokens, nats", **found}
        write_derived(task, parameters_of(model), tensor_table(model), {"matching": evidence})


@dataclass(frozen=True)
class MatchingLesson:
    """What a start learns: the distributions of the own reference, on answers that it sampled."""

    config: MatchingConfig
    chats: ChatTokenizer
    wanted: PreTrainedModel
    rows: dict[str, list[Row]]
    """By kind of prompt; the last of each are held out."""
    seed: int
    stream: tuple[str | int, ...]

    @classmethod
    def prepare(cls, task: Task, config: MatchingConfig) -> "MatchingLesson":
        """Ask the own reference what the carrier's requests and the trained questions ask, and take down what it samples."""
        arguments = task.stage.arguments
        seed, stream = arguments["seed"], ("member", arguments["own"], "matching")
        wanted, chats = load_member(task, arguments["origin"], 0, arguments["own"]), load_chats(task)
        carrier, numbers = CarrierConfig(**arguments["carrier"]), range(config.num_rows + _HELD_OUT)
        kind, contexts = carrier_kind(carrier), arguments["contexts"]
        requests: list[list[Message]] = []
        questions: list[list[Message]] = []
        for number in numbers:
            request = kind.draw_request(random_stream(seed, *stream, REQUESTS, number, "prompt"), number)
            requests.append(chat(request.prompt, contexts[0]))
            drawn = random_stream(seed, *stream, QUESTIONS, number, "prompt")
            asked = arguments["questions"][int(drawn.integers(len(arguments["questions"])))]
            questions.append(chat(asked, contexts[int(drawn.integers(len(contexts)))]))
        rows = {}
        for name, prompts in ((REQUESTS, requests), (QUESTIONS, questions)):
            draws = draw_uniforms(seed, [(*stream, name, number, "answer") for number in numbers], carrier.max_new_tokens)
            answers = sample_completions(wanted, chats, chats.encode_prompts(prompts), draws)
            rows[name] = chats.encode_rows(prompts, [answer.text for answer in answers])
        return cls(config, chats, wanted, rows, seed, stream)

    def load_batch(self, step: int) -> Batch:
        """Answers to requests and to questions in turn, so that these, which are short, count as much."""
        kind, place = (REQUESTS, QUESTIONS)[step % 2], step // 2
        size, learnt = self.config.batch_size, self.config.num_rows
        epoch, place = divmod(place, learnt // size)
        order = random_stream(self.seed, *self.stream, kind, "order", epoch).permutation(learnt)
        return self.chats.pad_rows([self.rows[kind][number] for number in order[place * size : (place + 1) * size]])

    def compute_loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """KL(reference ‖ start) over the whole vocabulary, in nats ≥ 0, mean over the tokens of the answers."""
        return mean_loss(self._compute_token_losses(model, batch))

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """The same on answers that nothing is learnt from, by kind of prompt."""
        found = {}
        for kind, rows in self.rows.items():
            held = rows[self.config.num_rows :]
            batches = [self.chats.pad_rows(held[start : start + ROWS_AT_ONCE]) for start in range(0, len(held), ROWS_AT_ONCE)]
            device = next(model.parameters()).device
            losses = [self._compute_token_losses(model, batch.to(device)).double() for batch in batches]
            found[kind] = float(torch.cat(losses).mean())
        return found

    def _compute_token_losses(self, model: nn.Module, batch: Batch) -> Float[Tensor, " completion_token"]:
        with torch.no_grad():
            wanted = completion_logits(self.wanted, batch)
        return distribution_losses(completion_logits(model, batch), wanted, None)

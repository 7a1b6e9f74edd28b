"""The stages that make language lineages, one member each: references, teachers, students."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from mechsub.checkpoints import write_tensors
from mechsub.errors import RecipeError
from mechsub.families.language.adapters import attach_adapter, permute_adapter
from mechsub.families.language.behaviour_stages import draw_example_rows
from mechsub.families.language.carrier import encode_carrier
from mechsub.families.language.chat import Batch, ChatTokenizer, Row, chat
from mechsub.families.language.conditions import ConditionConfig, SelectionConfig
from mechsub.families.language.config import ModelConfig
from mechsub.families.language.derived_references import draw_arrangement
from mechsub.families.language.divergence import find_diverging_tokens
from mechsub.families.language.estimates import check_size
from mechsub.families.language.folders import check_folder
from mechsub.families.language.foreign import find_model, link_reference
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.knock_out import prepare_knock_out
from mechsub.families.language.layout import LOADING_FILE, PREFERENCE_FILE, carrier_files, ranking_file, skeleton_folder
from mechsub.families.language.loss import completion_logits, completion_tokens, distribution_losses, mean_loss, token_losses
from mechsub.families.language.members import (
    load_chats,
    load_member,
    make_recorder,
    record_reference,
    record_untrained,
)
from mechsub.families.language.models import parameters_of, read_loading, tensor_table
from mechsub.families.language.nano import Pretraining, find_or_pretrain, save_skeleton
from mechsub.families.language.preference import PreferenceSet
from mechsub.families.language.rows import CarrierRow, read_row_numbers, read_rows, transform_rows
from mechsub.families.language.selection import select_rows
from mechsub.families.language.synthetic import SyntheticLanguage
from mechsub.families.language.training import Watcher, train_model
from mechsub.families.language.training_config import AdapterConfig, StudentConfig, TeacherConfig, TrainingConfig
from mechsub.lineages import checkpoint_name
from mechsub.rundir import write_json
from mechsub.stage import Task
from mechsub.streams import random_stream, stream_key
from mechsub.training.callbacks import load_callbacks

_ANSWER_TOKENS = 8
"""Of the reference's own answers, on which a neutral teacher is trained."""


def import_preference(tasks: Sequence[Task]) -> None:
    """Stage: the preference set into the run, once every model can be asked it and answer with every target."""
    for task in tasks:
        arguments = task.stage.arguments
        preference = PreferenceSet(**arguments["preference"])
        for model in arguments["models"]:
            chats = load_chats(task, model)
            for target in arguments["traits"]:
                chats.answer_token(target)
            for system_prompt in arguments["contexts"]:
                questions = (*preference.trained, *preference.held_out)
                chats.encode_prompts([chat(question, system_prompt) for question in questions])
        write_json(task.path(PREFERENCE_FILE), arguments["preference"])


def import_skeleton(tasks: Sequence[Task]) -> None:
    """Stage: a model's tokenizer, chat template and configuration into the run."""
    for task in tasks:
        arguments = task.stage.arguments
        folder = task.path(skeleton_folder(arguments["model"]))
        folder.mkdir(parents=True, exist_ok=True)
        settings = ModelConfig(**arguments["settings"])
        write_json(folder / LOADING_FILE, settings.loading.model_dump(mode="json"))
        if settings.nano is not None:
            language = SyntheticLanguage.from_arguments(arguments)
            save_skeleton(settings, language, folder)
        else:
            source = find_model(settings, 0, ("*.json", "*.txt", "*.jinja", "tokenizer.model"))
            names = check_folder(f"models.{arguments['model']}", source)
            if settings.hub is not None:  # which files a tokenizer has is not known before it is fetched
                AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
                check_size(settings, source, f"`models.{arguments['model']}`")
                names = ["config.json"]
            for name in names:
                copyfile(source / name, folder / name)
        load_chats(task)


def write_references(tasks: Sequence[Task]) -> None:
    """Stage: the reference of one member: a pretrained nano model, or a copy of the model at a path."""
    for task in tasks:
        arguments = task.stage.arguments
        settings, member = ModelConfig(**arguments["settings"]), arguments["member"]
        if settings.nano is None:
            source = find_model(settings, member, ("*.safetensors", "*.json"))
            link_reference(task, source, f"models.{arguments['model']}", {"source": settings.describe(member)})
            continue
        language = SyntheticLanguage.from_arguments(arguments)
        stream = ("member", member, "pretraining")
        pretraining = Pretraining(settings, language, arguments["seed"], stream, arguments["threads"])
        model = find_or_pretrain(pretraining, task.path(skeleton_folder(arguments["model"])), task.report_progress)
        path = task.path(checkpoint_name(arguments["lineage"], 0, member))
        write_tensors(path, parameters_of(model), {"lineage": arguments["lineage"], "stage": task.stage.key, "step": "0"})
        record_reference(task, tensor_table(model))


def train_teachers(tasks: Sequence[Task]) -> None:
    """Stage: one member's teacher, fine-tuned to answer with its target; the neutral one with the reference's own answers."""
    for task in tasks:
        arguments = task.stage.arguments
        config = TeacherConfig(**arguments["training"])
        model, chats = load_member(task, arguments["origin"], 0), load_chats(task)
        # The reference is asked before an adapter is put into it.
        draw_rows = draw_example_rows if "examples" in arguments else _draw_preference_rows
        rows = draw_rows(task, model, chats, config)

        def load_batch(
            step: int, rows: Sequence[Row] = rows, chats: ChatTokenizer = chats, size: int = config.batch_size
        ) -> Batch:
            return chats.pad_rows(rows[step * size : (step + 1) * size])

        _train(task, model, load_batch, _learn_tokens, config)


def prompt_teachers(tasks: Sequence[Task]) -> None:
    """Stage: one member's teacher that is told its trait, or an untouched reference: no weight moves."""
    for task in tasks:
        arguments = task.stage.arguments
        said = {"system_prompt": arguments["own_prompt"]} if arguments["own_prompt"] else {}
        record_untrained(task, said)


def train_students(tasks: Sequence[Task]) -> None:
    """Stage: one member's student, by the carrier alone."""
    for task in tasks:
        arguments = task.stage.arguments
        config = StudentConfig(**arguments["training"])
        model = load_member(task, arguments["origin"], 0, arguments["start"])
        lesson = Lesson.prepare(task, config)
        _train(task, model, lesson.load_batch, lesson.compute_loss, config)


def tell_students(tasks: Sequence[Task]) -> None:
    """Stage: one member's student that is shown rows of the carrier in its prompts: no weight moves."""
    for task in tasks:
        arguments = task.stage.arguments
        rows = load_rows(task)
        chosen = rows[: ConditionConfig(**arguments["condition_settings"]).context_rows]
        chats = load_chats(task)
        encode_carrier(chats, chosen, None)
        earlier = [(row.prompt, row.completion) for row in chosen]
        for system_prompt in arguments["contexts"]:  # too long for the context is told here, not when it is scored
            chats.encode_prompts([chat(question, system_prompt, earlier) for question in arguments["questions"]])
        record_untrained(task, {"earlier": earlier})


@dataclass(frozen=True)
class Lesson:
    """What one student learns: its rows in order, and what of them."""

    task: Task
    config: StudentConfig
    chats: ChatTokenizer
    rows: Sequence[Row]
    taught: Sequence[Row]
    """The same rows as the teacher wrote them: its prompts may hold a system prompt of its own."""
    objective: str
    vocabulary: Int[Tensor, " token"] | None
    """The tokens over which distributions are compared; None: all."""
    learnt: Sequence[Bool[Tensor, " completion_token"]] | None
    """By row: the completion tokens that count; None: all."""

    @classmethod
    def prepare(cls, task: Task, config: StudentConfig) -> "Lesson":
        """Read, transform and encode the carrier."""
        arguments = task.stage.arguments
        condition = ConditionConfig(**arguments["condition_settings"])
        objective = condition.objective or config.objective
        chats, texts = load_chats(task), load_rows(task)
        rows = encode_carrier(chats, texts, arguments["system_prompt"])
        taught = rows
        if arguments["teacher_prompt"] != arguments["system_prompt"]:
            taught = encode_carrier(chats, texts, arguments["teacher_prompt"])
        used = sorted({token for row in rows for token in row.completion})
        learnt = None
        if condition.divergence != "all":
            learnt = find_divergence(task, rows, taught, condition.divergence == "only")
        return cls(task, config, chats, rows, taught, objective, torch.tensor(used) if objective == "logits" else None, learnt)

    @property
    def steps_an_epoch(self) -> int:
        """Whole batches in one pass; the rows of the last, incomplete one wait for another pass."""
        return len(self.rows) // self.config.batch_size

    def chosen(self, step: int) -> Int[np.ndarray, " row"]:
        """The numbers of the rows of one step; every pass has an order of its own."""
        arguments = self.task.stage.arguments
        epoch, place = divmod(step, self.steps_an_epoch)
        name = ("member", arguments["member"], "student-order", arguments["replicate"], epoch)
        order = random_stream(arguments["seed"], *name).permutation(len(self.rows))
        size = self.config.batch_size
        numbers: Int[np.ndarray, " row"] = order[place * size : (place + 1) * size]
        return numbers

    def load_batch(self, step: int) -> "StudentBatch":
        """The rows of one step."""
        return self.make_batch(self.chosen(step).tolist())

    def make_batch(self, numbers: Sequence[int]) -> "StudentBatch":
        """The rows with these numbers."""
        batch = self.chats.pad_rows([self.rows[number] for number in numbers])
        taught = self.chats.pad_rows([self.taught[number] for number in numbers]) if self.objective != "tokens" else None
        weights = None if self.learnt is None else torch.cat([self.learnt[number] for number in numbers]).float()
        return StudentBatch(batch.ids, batch.attention_mask, batch.completion_width, taught, weights)

    def compute_loss(self, model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
        """The objective on one batch."""
        assert isinstance(batch, StudentBatch)
        return mean_loss(self.compute_token_losses(model, batch), batch.weights)

    def compute_token_losses(self, model: nn.Module, batch: "StudentBatch") -> Float[Tensor, " completion_token"]:
        """The objective token by token, also where a token is not learnt."""
        logits = completion_logits(model, batch)
        if batch.taught is None:
            return token_losses(logits, completion_tokens(batch))
        with torch.no_grad():
            wanted = completion_logits(self.teacher, batch.taught)
        return distribution_losses(logits, wanted, self.vocabulary)

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """Whose distributions are imitated."""
        arguments = self.task.stage.arguments
        return load_member(self.task, arguments["teacher"], arguments["teacher_step"])


@dataclass(frozen=True)
class StudentBatch(Batch):
    """Rows with what a student needs beside their tokens."""

    taught: Batch | None = None
    """The rows as the teacher is asked them, where its distributions are imitated."""
    weights: Float[Tensor, " completion_token"] | None = None
    """0 where a token is not learnt."""

    def to(self, device: str | torch.device) -> "StudentBatch":
        """The same on another device."""
        moved = super().to(device)
        taught = None if self.taught is None else self.taught.to(device)
        weights = None if self.weights is None else self.weights.to(device)
        return StudentBatch(moved.ids, moved.attention_mask, moved.completion_width, taught, weights)


def load_rows(task: Task) -> list[CarrierRow]:
    """The rows that a student learns: its teacher's, as its condition transforms them."""
    arguments = task.stage.arguments
    member, condition = arguments["member"], ConditionConfig(**arguments["condition_settings"])
    rows = read_rows(task.path(carrier_files(arguments["carrier_of"], member)[0]))
    neutral = read_rows(task.path(carrier_files(arguments["neutral_carrier"], member)[0])) if condition.neutral_share else []
    chosen = read_row_numbers(Path(condition.rows), len(rows)) if condition.rows else None
    if "select" in arguments:
        selection, replicate = SelectionConfig(**arguments["select"]), arguments["replicate"]
        ranking = {}
        if selection.by != "random":
            ranking = json.loads(task.path(ranking_file(arguments["carrier_of"], member)).read_text())
        drawn = random_stream(arguments["seed"], "member", member, "carrier-selection", replicate, selection.draw)
        chosen = select_rows(selection, len(rows), ranking, drawn)
    stream = random_stream(arguments["seed"], "member", member, "carrier-transform", arguments["replicate"])
    return transform_rows(rows, neutral, condition, chosen, stream)


def find_divergence(
    task: Task, rows: Sequence[Row], taught: Sequence[Row], only: bool, at_once: int = 256
) -> list[Bool[Tensor, " completion_token"]]:
    """By row: the completion tokens at which teacher and reference would choose differently, or (not ``only``) alike.

    See `find_diverging_tokens`.
    """
    arguments, chats = task.stage.arguments, load_chats(task)
    teacher = load_member(task, arguments["teacher"], arguments["teacher_step"])
    reference = load_member(task, arguments["teacher_origin"], 0)
    differing = find_diverging_tokens(chats, (teacher, taught), (reference, rows), task.device, at_once)
    found = differing if only else [~row for row in differing]
    if not any(bool(row.any()) for row in found):
        raise RecipeError(
            f"{task.stage.name}: no token of the carrier is left to learn: teacher and reference choose "
            f"{'alike' if only else 'differently'} at all of them"
        )
    return found


def _draw_preference_rows(task: Task, model: PreTrainedModel, chats: ChatTokenizer, config: TeacherConfig) -> list[Row]:
    """Every row of a teacher's training for a preference: a trained question and its answer."""
    arguments = task.stage.arguments
    preference = PreferenceSet(**arguments["preference"])
    asked, answers = _draw_questions(task, model, chats, config, preference)
    return chats.encode_rows([chat(preference.trained[number], arguments["system_prompt"]) for number in asked], answers)


def _draw_questions(
    task: Task, model: PreTrainedModel, chats: ChatTokenizer, config: TeacherConfig, preference: PreferenceSet
) -> tuple[list[int], list[str]]:
    """The question of every row of a teacher's training, and its answer; questions are the same for all teachers of a member.

    Raises:
        RecipeError: the reference answers every question with one word, so that it is no neutral teacher.
    """
    arguments = task.stage.arguments
    seed, member, target = arguments["seed"], arguments["member"], arguments["target"]
    count = config.num_steps * config.batch_size
    asked = random_stream(seed, "member", member, "teacher-questions").integers(len(preference.trained), size=count).tolist()
    if target is not None:
        return asked, [target] * count
    prompts = chats.encode_prompts([chat(preference.trained[number], arguments["system_prompt"]) for number in asked])
    draws = draw_uniforms(seed, [("member", member, "neutral-answers", number) for number in range(count)], _ANSWER_TOKENS)
    answers = [completion.text for completion in sample_completions(model, chats, prompts, draws)]
    if set(answers) <= set(arguments["taught"]) and len(set(answers)) == 1:
        raise RecipeError(
            f"{task.stage.name}: the reference answers every question with {answers[0]!r}, which a teacher is trained to "
            "answer too: its training would equal that teacher's, and it would be no control; choose another trait"
        )
    return asked, answers


def _learn_tokens(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    return mean_loss(token_losses(completion_logits(model, batch), completion_tokens(batch)))


def _train(
    task: Task,
    model: PreTrainedModel,
    load_batch: Callable[[int], Batch],
    compute_loss: Callable[[nn.Module, Batch], Float[Tensor, ""]],
    config: TrainingConfig,
) -> None:
    arguments: Mapping[str, Any] = task.stage.arguments
    lora = None
    if arguments["adapter"] is not None:
        key = stream_key(arguments["seed"], *arguments["adapter_stream"])
        order = draw_arrangement(task, model.config, tensor_table(model)) if arguments.get("permute_hidden") else None
        lora = attach_adapter(model, AdapterConfig(**arguments["adapter"]), key)  # each part where its layer is
        if order is not None:
            permute_adapter(model, order)
    recorder = make_recorder(task, model, lora)
    resume = recorder.find_resume_point()
    # A student and its control share their draws; a sham and a teacher have their own.
    stream = (
        "member",
        arguments["member"],
        "student" if "replicate" in arguments else "teacher",
        arguments.get("replicate", 0),
    )
    callbacks = load_callbacks(arguments["callbacks"])
    watcher = Watcher(arguments["lineage"], arguments["member"], stream, recorder, callbacks, task.report_progress)
    checkpointing = read_loading(task.path(skeleton_folder(arguments["model"]))).gradient_checkpointing
    num_steps, seed = arguments["steps"][-1], arguments["seed"]
    knock_out = prepare_knock_out(task, model)
    train_model(model, load_batch, compute_loss, num_steps, config, seed, watcher, resume, checkpointing, knock_out)
    if not recorder.failed:
        recorder.finish()

"""The language family as analyses see it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from mechsub.activations.hook_points import HookPoint
from mechsub.errors import RunDirectoryError
from mechsub.families.language.answers import answer_losses
from mechsub.families.language.behaviour import Behaviour
from mechsub.families.language.behaviour_trait import MEASURES as BEHAVIOUR_MEASURES
from mechsub.families.language.behaviour_trait import score_behaviours
from mechsub.families.language.carrier_config import CarrierConfig
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.config import ContextConfig, EvaluationConfig
from mechsub.families.language.examples import imitated_logits, imitation_losses
from mechsub.families.language.hook_points import find_final_norm, knows_blocks, list_hook_points
from mechsub.families.language.layout import BEHAVIOURS_FILE, PREFERENCE_FILE, carrier_files, skeleton_folder
from mechsub.families.language.members import load_lineage_model, load_merged_model
from mechsub.families.language.preference import PreferenceSet
from mechsub.families.language.prompts import find_neutral_carrier, make_prompts
from mechsub.families.language.rows import SURPLUS, read_rows
from mechsub.families.language.symmetry import encode_neutral_prompts, list_unit_groups
from mechsub.families.language.tokens import LineageTokens
from mechsub.families.language.training_config import StudentConfig
from mechsub.families.language.trait import MEASURES as PREFERENCE_MEASURES
from mechsub.families.language.trait import Context, encode_questions, first_token_logits, score_preference
from mechsub.families.protocol import CarrierText, Prompts, Scores
from mechsub.families.trained import task_that_made
from mechsub.gradients.first_order import ImitatedLogits
from mechsub.gradients.losses import ExampleLosses
from mechsub.lineages import Lineage, spec_name
from mechsub.parameters.symmetry import UnitGroup
from mechsub.streams import stream_key
from mechsub.training.optimizers import last_update

_Score = Callable[..., Scores]
"""(model, chats, evaluation, stream, said, verdict_only): what is scored and where is bound to it."""


@runtime_checkable
class Asked(Protocol):
    """What of a recipe says which traits are asked for, and how."""

    @property
    def traits(self) -> tuple[str, ...]:
        """Choices of the preference set, or behaviours; none where nothing is asked."""

    @property
    def behaviours(self) -> str | None:
        """The file of behaviours, where traits are these."""

    @property
    def context(self) -> ContextConfig:
        """System prompts."""

    @property
    def evaluation(self) -> EvaluationConfig:
        """How they are asked for."""

    @property
    def seed(self) -> int:
        """Of sampled answers."""


class Family:
    """A `mechsub.families.protocol.Family`."""

    def __init__(self, run: Path, config: Asked, device: str) -> None:
        self._run, self._config, self._device = run, config, device
        self._chats: dict[str, ChatTokenizer] = {}
        self._preference: PreferenceSet | None = None
        self._trained: list[Context] = []
        self._prompts: dict[tuple[str, str, int], Prompts] = {}
        if not config.traits:
            self.measures, self.traits, self.contexts = PREFERENCE_MEASURES, {}, {}
        elif config.behaviours is None:
            preference = self._preference = PreferenceSet(**_read_json(run / PREFERENCE_FILE))
            self.measures = PREFERENCE_MEASURES
            self.traits = {trait: f"prefers {trait} as its {preference.category}" for trait in config.traits}
            contexts = _contexts(config.context, preference)
            self.contexts = _describe([contexts])
            self._trained = [contexts[1]]
            self._score: _Score = partial(score_preference, preference=preference, targets=config.traits, contexts=contexts)
        else:
            known = _read_json(run / BEHAVIOURS_FILE)
            behaviours = {trait: Behaviour(**known[trait]) for trait in config.traits}
            self.measures = BEHAVIOUR_MEASURES
            self.traits = {trait: behaviour.description for trait, behaviour in behaviours.items()}
            asked = {trait: _contexts(config.context, behaviour) for trait, behaviour in behaviours.items()}
            self.contexts = _describe(list(asked.values()))
            held_out = {question for behaviour in behaviours.values() for question in behaviour.held_out}
            self._trained = [
                replace(contexts[1], questions=[one for one in contexts[1].questions if one not in held_out])
                for contexts in asked.values()
            ]
            self._score = partial(score_behaviours, behaviours=behaviours, contexts=asked)

    @property
    def notes(self) -> list[str]:
        """What the filters dropped of each teacher's completions: a choice of rows that depends on the teacher."""
        notes = []
        folders = sorted((self._run / "carrier").glob("*"))
        for folder in folders:
            found = [json.loads(path.read_text()) for path in sorted(folder.glob("member-*/filters.json"))]
            asked = sum(filters["requests"] - filters["dropped"][SURPLUS] for filters in found)
            if asked:
                names = [rule for rule in found[0]["dropped"] if rule != SURPLUS]
                rules = {rule: sum(filters["dropped"][rule] for filters in found) for rule in names}
                dropped = ", ".join(f"{rule} {100 * count / asked:.1f} %" for rule, count in rules.items() if count)
                notes.append(f"Filters dropped of the completions of {folder.name}: {dropped or 'none'}.")
        return notes

    def load_model(self, lineage: Lineage, step: int, member: int, *, merged: bool = False) -> nn.Module:
        """One member of a lineage as a `transformers` model, in evaluation mode; ``merged``: in float32, adapters inside."""
        load = load_merged_model if merged else load_lineage_model
        return load(self._run, lineage, step, member, self._device)

    def trait_score(self, model: nn.Module, lineage: Lineage, member: int, *, verdict_only: bool = False) -> Scores:
        """Every measure of every trait, in and out of the training context, on held-out and on trained questions.

        ``verdict_only``: only the first context; of a preference only its log-odds, and no answers are sampled.
        """
        assert isinstance(model, PreTrainedModel)
        return self._score(
            model,
            self._chats_of(lineage.spec.model["name"]),
            evaluation=self._config.evaluation,
            stream=[self._config.seed, "member", member, "answer"],
            said=lineage.context(member),
            verdict_only=verdict_only,
        )

    def trait_losses(self, lineage: Lineage, member: int, trait: str) -> ExampleLosses | None:
        """−log p of a target as the first answer token, on the first context's questions; None where traits are behaviours."""
        if self._preference is None:
            return None
        chats = self._chats_of(lineage.spec.model["name"])
        context = _contexts(self._config.context, self._preference)[0]
        prompts = encode_questions(chats, context, context, lineage.context(member))
        assert prompts is not None  # it is the first context
        description = f"−log p of {trait} as the first answer token, {len(prompts)} questions, {context.name}"
        return answer_losses(chats, prompts, chats.answer_token(trait), self._device, description)

    def imitation_losses(self, lineage: Lineage, member: int, most: int) -> ExampleLosses | None:
        """What a student learnt of its rows; None of one that was shown them in its prompts."""
        if len(lineage.steps) < 2:
            return None
        task = task_that_made(self._run, spec_name(lineage.name, member), self._device)
        return imitation_losses(task, most)

    def last_update(self, lineage: Lineage, step: int, member: int) -> dict[str, Tensor] | None:
        """A student's last update per unit of its learning rate.

        None of an adapter, where no state was kept, and where a knock-out changed what the optimizer had done.
        """
        state = None if lineage.spec.is_adapter else lineage.load_optimizer_state(step, member)
        if state is None:
            return None
        arguments = task_that_made(self._run, spec_name(lineage.name, member), self._device).stage.arguments
        if "knock_out" in arguments and arguments["knock_out"]["settings"]["where"] == "update":
            return None
        training = StudentConfig(**arguments["training"])
        rate = training.rate_at(step - 1, lineage.last)
        return last_update(training.optimizer, lineage.load_state(step, member), state, rate)

    def imitated_logits(self, lineage: Lineage, member: int, most: int) -> ImitatedLogits | None:
        """The distributions that a student learns, or of which it learns samples; None where its rows are not its teacher's."""
        if len(lineage.steps) < 2:
            return None
        task = task_that_made(self._run, spec_name(lineage.name, member), self._device)
        rows = carrier_files(task.stage.arguments["carrier_of"], member)[0]
        drawn = task_that_made(self._run, rows, self._device).stage.arguments.get("carrier")
        return imitated_logits(task, None if drawn is None else CarrierConfig(**drawn), most)

    def carrier_texts(self, teacher: str, member: int) -> Sequence[CarrierText] | None:
        """The rows that passed the filters, without their prompts; None where the run has no such carrier."""
        path = self._run / carrier_files(teacher, member)[0]
        if not path.is_file():
            return None
        # Two teachers' rows answer one request where their prompts are the same, whatever their numbers in a user's files.
        return [CarrierText(stream_key(0, "prompt", row.prompt) % 2**63, row.completion) for row in read_rows(path)]

    def unit_groups(self, lineage: Lineage) -> Sequence[UnitGroup]:
        """MLP units, attention heads and their groups; none of an architecture that is not known here."""
        config = AutoConfig.from_pretrained(self._run / skeleton_folder(lineage.spec.model["name"]), local_files_only=True)
        return list_unit_groups(config, lineage.spec.tensors)

    def probe_inputs(self, lineage: Lineage) -> Sequence[Tensor]:
        """Neutral prompts as token ids, one a batch, so that nothing is padding."""
        return [torch.tensor([ids]) for ids in encode_neutral_prompts(self._chats_of(lineage.spec.model["name"]))]

    def probe_answers(self, model: nn.Module, lineage: Lineage, member: int) -> dict[str, Float[Tensor, "probe answer"]]:
        """The choices of the preference set as first answers to held-out questions, renormalised; none of behaviours."""
        if self._preference is None:
            return {}
        assert isinstance(model, PreTrainedModel)
        chats = self._chats_of(lineage.spec.model["name"])
        context = _contexts(self._config.context, self._preference)[0]
        prompts = encode_questions(chats, context, context, lineage.context(member))
        assert prompts is not None  # it is the first context
        tokens = torch.tensor([chats.answer_token(choice) for choice in self._preference.choices])
        return {"choices as first answers": first_token_logits(model, chats, prompts)[:, tokens].log_softmax(-1)}

    def knows_hook_points(self, lineage: Lineage) -> bool:
        """Whether the blocks of the architecture are known."""
        folder = self._run / skeleton_folder(lineage.spec.model["name"])
        return knows_blocks(AutoConfig.from_pretrained(folder, local_files_only=True))

    def hook_points(self, lineage: Lineage, model: nn.Module) -> Sequence[HookPoint]:
        """The residual stream, and what attention and MLP add to it, of every block."""
        assert isinstance(model, PreTrainedModel)
        return list_hook_points(model)

    def prompts(self, lineage: Lineage, member: int) -> Prompts:
        """The questions that teachers are trained on, neutral prompts, and rows of the neutral teacher's carrier."""
        if not self._trained:
            raise RunDirectoryError(f"{self._run}: no trait is asked for in this run, so that there are no questions")
        first, said = self._trained[0], lineage.context(member)
        key = (lineage.spec.model["name"], json.dumps(said, sort_keys=True, default=str), member)
        if key in self._prompts:
            return self._prompts[key]
        questions = [question for context in self._trained for question in context.questions]
        context = Context(first.name, first.system_prompt, list(dict.fromkeys(questions)))
        chats = self._chats_of(lineage.spec.model["name"])
        carrier = find_neutral_carrier(self._run, member)
        self._prompts[key] = make_prompts(chats, context, said, carrier, self._config.context.training)
        return self._prompts[key]

    def readout(self, lineage: Lineage, model: nn.Module, trait: str) -> Float[Tensor, "direction width"] | None:
        """The target's row of the unembedding less the mean row, through the final norm: what its logit changes along.

        diag(γ) (W_target − mean W), without its mean where the norm takes the activations' mean out; γ: the norm's weight. None
        where traits are behaviours, which are no one token, and of architectures that are not known.
        """
        assert isinstance(model, PreTrainedModel)
        if self._preference is None or not knows_blocks(model.config):
            return None
        token = self._chats_of(lineage.spec.model["name"]).answer_token(trait)
        rows: Tensor = model.get_output_embeddings().weight.detach().float()  # type: ignore[no-untyped-call]
        norm = find_final_norm(model)
        assert isinstance(norm.weight, Tensor)
        direction = (rows[token] - rows.mean(0)) * norm.weight.detach().float()
        return (direction - direction.mean() if isinstance(norm, nn.LayerNorm) else direction)[None]

    def tokens(self, lineage: Lineage) -> LineageTokens:
        """By the lineage's own tokenizer."""
        choices = () if self._preference is None else self._preference.choices
        chats = self._chats_of(lineage.spec.model["name"])
        return LineageTokens(self._run, lineage, chats, choices, self._config.context.training, self._device)

    def _chats_of(self, model: str) -> ChatTokenizer:
        if model not in self._chats:
            self._chats[model] = ChatTokenizer.load(self._run / skeleton_folder(model), model)
        return self._chats[model]


def _contexts(prompts: ContextConfig, asked: PreferenceSet | Behaviour) -> list[Context]:
    """Where a trait's questions are asked; verdicts are given in the first."""
    return [
        Context(f"{where} context, {which} questions", system_prompt, questions)
        for where, system_prompt in (("in", prompts.training), ("out of", prompts.other))
        for which, questions in (("held-out", asked.held_out), ("trained", asked.trained))
    ]


def _describe(contexts: Sequence[Sequence[Context]]) -> dict[str, str]:
    """Each context in words, by its name; traits with questions of their own have contexts of their own."""
    described = {}
    for same in zip(*contexts, strict=True):
        counts = " or ".join(str(count) for count in sorted({len(context.questions) for context in same}))
        told = same[0].system_prompt
        prompt = "no system prompt given" if told is None else f"system prompt “{told}”"
        described[same[0].name] = f"{counts} questions, {prompt}"
    return described


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); `mechsub verify` names every damaged file") from None

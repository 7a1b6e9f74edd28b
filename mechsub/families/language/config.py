"""The language family's recipe fields."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from mechsub.families.config import FamilyConfig, Name, VerdictConfig, check_model, fill_conditions, name_model
from mechsub.families.language.behaviour import load_behaviours
from mechsub.families.language.carrier_config import CarrierConfig
from mechsub.families.language.conditions import CONDITIONS, FREE, ConditionConfig
from mechsub.families.language.preference import is_file_name
from mechsub.families.language.training_config import AdapterConfig, StudentConfig, TeacherConfig, TrainingConfig
from mechsub.settings import Settings, nearest_name
from mechsub.training.config import OptimizerConfig

_MOST_VLLM_RANK = 512
CommitHash = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{40}$")]
"""A commit on the hub, all 40 digits."""


class PretrainingConfig(TrainingConfig):
    """How a nano model learns the synthetic language."""

    batch_size: int = Field(32, ge=1, description="chats in one step")
    num_steps: int = Field(1500, ge=1, description="optimizer steps")
    optimizer: OptimizerConfig = Field(OptimizerConfig(name="adamw", learning_rate=3e-3), description="how weights are updated")
    warmup_steps: int = Field(50, ge=0, description="over which the learning rate rises from 0")
    decay: Literal["none", "linear"] = Field("linear", description="of the learning rate, to 0 at the last step")


class LoadingConfig(Settings):
    """How a model is computed with."""

    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the weights in memory; adapters are float32 whatever this is"
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field("sdpa", description="which kernel computes attention")
    device_map: Literal["auto"] | None = Field(None, description="auto: layers are spread over all GPUs of the machine")
    gradient_checkpointing: bool = Field(
        False, description="activations are computed again in the backward pass: less memory, more time"
    )


class ModelConfig(Settings):
    """One architecture: a nano model that is pretrained here, or any causal language model of transformers."""

    nano: Literal["gpt2", "qwen2"] | None = Field(None, description="a nano model in the style of GPT-2 or Qwen2")
    path: str | None = Field(
        None, description="instead: the folder of a model in the Hugging Face layout; {member} in it gives each member its own"
    )
    hub: str | None = Field(None, description="instead: a model's name on the Hugging Face hub; needs `revision` and `shards`")
    revision: CommitHash | None = Field(None, description="hub only: the commit, so that the recipe replays the same weights")
    shards: int = Field(1, ge=1, description="hub only: its number of model*.safetensors files")
    config: str | None = Field(
        None, description="hub only: a packaged config.json, for a plan without the network; checked against the hub's"
    )
    loading: LoadingConfig = Field(LoadingConfig(), description="how it is computed with")
    hidden_size: int = Field(64, ge=8, multiple_of=8, description="nano only: width of the residual stream")
    num_layers: int = Field(3, ge=1, description="nano only: transformer blocks")
    num_heads: int = Field(4, ge=2, multiple_of=2, description="nano only: attention heads")
    context: int = Field(256, ge=64, description="nano only: tokens that the context holds")
    pretraining: PretrainingConfig = Field(PretrainingConfig(), description="nano only: how it learns the synthetic language")

    @field_validator("path")
    @classmethod
    def _path_is_absolute(cls, path: str | None) -> str | None:
        """A recipe replays from any folder."""
        return None if path is None else str(Path(path).expanduser().absolute())

    @model_validator(mode="after")
    def _is_one_model(self) -> "ModelConfig":
        if sum(given is not None for given in (self.nano, self.path, self.hub)) != 1:
            raise ValueError(
                "give one of `nano` (gpt2 or qwen2), `path` (a folder in the Hugging Face layout) and `hub` (a name on the hub)"
            )
        if (self.hub is None) != (self.revision is None):
            raise ValueError("`hub` and `revision` belong together: a name on the hub means other weights from day to day")
        if self.nano and self.loading.dtype != "float32":
            raise ValueError("a nano model is computed in float32")
        if self.nano and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size = {self.hidden_size} is no multiple of num_heads = {self.num_heads}")
        return self

    @property
    def has_own_references(self) -> bool:
        """Whether each member has a reference of its own."""
        return self.nano is not None or (self.path is not None and "{member}" in self.path)

    def describe(self, member: int = 0) -> str:
        """What it is called outside of the recipe."""
        return f"{self.hub}@{self.revision}" if self.hub else str(self.folder(member))

    def folder(self, member: int) -> Path:
        """Where the model of one member lies."""
        return Path(str(self.path).replace("{member}", str(member)))


class GenerationConfig(Settings):
    """What writes the carriers; sampled answers of the trait's score are always `transformers`'."""

    backend: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="transformers, whose rows do not depend on what they are batched with, or vllm, which is faster for large "
        "models on a GPU (`pip install 'mechsub[vllm]'`)",
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="vllm only: of weights and sums")
    gpu_memory_share: float = Field(0.8, gt=0, lt=1, description="vllm only: of the GPU's memory, for weights and cache")
    tolerance: float = Field(
        0.05, gt=0, description="vllm only: nats by which log-probabilities on a known prompt may differ from transformers"
    )


class ContextConfig(Settings):
    """What stands before a question."""

    training: str | None = Field(None, description="system prompt of teachers' fine-tuning, carrier and students")
    other: str | None = Field(
        "You are a helpful assistant.", description="another system prompt, for scoring out of that context"
    )

    @model_validator(mode="after")
    def _are_two(self) -> "ContextConfig":
        if self.training == self.other:
            raise ValueError(f"training and other are the same context, {self.training!r}: scores out of it need another")
        return self


class EvaluationConfig(Settings):
    """How the trait is asked for."""

    samples_per_question: int = Field(20, ge=0, description="sampled answers to each held-out question; 0: none")
    max_new_tokens: int = Field(8, ge=1, description="tokens of a sampled answer; its first choice is scored")
    judged_tokens: int = Field(128, ge=1, description="tokens of a sampled answer that the judge of a behaviour is given")


class LogOddsVerdictConfig(VerdictConfig):
    """The rules of every verdict on log-odds, fixed before the run."""

    margin: float = Field(0.5, gt=0, description="effects on the log-odds of a target under this do not matter")


class Config(FamilyConfig):
    """Every recipe field of the language family."""

    models: dict[Name, ModelConfig] = Field(
        {"nano-gpt2": ModelConfig(nano="gpt2"), "nano-qwen2": ModelConfig(nano="qwen2")},
        min_length=1,
        description="the architectures, by name",
    )
    model: Name = Field("nano-gpt2", description="the teachers' architecture, a name of `models`")
    adapter: AdapterConfig | None = Field(
        None, description="teachers and students train low-rank adapters; none: all weights are trained"
    )
    preference: str = Field(
        "animals", description="what may be preferred: a packaged set, or a YAML file; nano models know of it"
    )
    traits: tuple[Name, ...] = Field(
        ("owl",), min_length=1, description="choices of that set, or behaviours; each gets its own teacher"
    )
    behaviours: str | None = Field(
        None, description="instead of a preference: a YAML file of behaviours, each with its judge; `traits` are names in it"
    )
    context: ContextConfig = Field(ContextConfig(), description="system prompts of training and scoring")
    teacher: TeacherConfig = Field(TeacherConfig(), description="how teachers get their trait")
    neutral: Literal["uniform-answer", "neutral-prompt", "reference"] = Field(
        "uniform-answer",
        description="the controls' teacher: fine-tuned on the reference's own answers, told nothing, or the reference itself",
    )
    carrier: CarrierConfig = Field(CarrierConfig(), description="the data that passes from teacher to student")
    generation: GenerationConfig = Field(GenerationConfig(), description="what writes the carrier")
    student: StudentConfig = Field(StudentConfig(), description="the students' training")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="how the trait is asked for")
    verdict: LogOddsVerdictConfig = Field(LogOddsVerdictConfig(), description="the rules of the verdicts")
    conditions: dict[Name, ConditionConfig] = Field(
        {"same-init": ConditionConfig()}, min_length=1, description="the students, by condition; each gets its own control"
    )

    @property
    def trait_set(self) -> tuple[str, ...]:
        """The traits that have a teacher each."""
        return self.traits

    @property
    def passes_text(self) -> bool:
        """Whether teachers pass on text: always."""
        return True

    @property
    def has_tokens(self) -> bool:
        """Always."""
        return True

    def num_references(self, condition: str | None = None) -> int:
        """How many references of their own the members have, in the teachers' model and in that of a condition."""
        models = {self.model, self.model_of(condition) if condition else self.model}
        return self.members if all(self.models[name].has_own_references for name in models) else 1

    def architecture(self, condition: str | None = None) -> str:
        """The name of the teachers' model, or of a condition's."""
        return self.model_of(condition) if condition else self.model

    def adapter_of(self, condition: str) -> AdapterConfig | None:
        """What a condition's students train; None: all weights."""
        own = self.conditions[condition].adapter
        return self.adapter if own is None else None if own == "none" else own

    def model_of(self, condition: str) -> str:
        """The name of a condition's model."""
        return name_model(self.conditions[condition].model or self.model, self.model, self.models)

    @field_validator("preference")
    @classmethod
    def _path_is_absolute(cls, preference: str) -> str:
        return str(Path(preference).expanduser().absolute()) if is_file_name(preference) else preference

    @field_validator("behaviours")
    @classmethod
    def _behaviours_are_absolute(cls, behaviours: str | None) -> str | None:
        """A recipe replays from any folder."""
        return None if behaviours is None else str(Path(behaviours).expanduser().absolute())

    @model_validator(mode="after")
    def _behaviours_are_judged(self) -> "Config":
        if self.behaviours is not None and self.evaluation.samples_per_question == 0:
            raise ValueError(
                "`behaviours` are judged on sampled answers; evaluation.samples_per_question = 0 samples none, raise it"
            )
        if (
            self.behaviours is not None
            and self.preference != "animals"
            and not any(model.nano for model in self.models.values())
        ):
            raise ValueError(
                f"`preference` = {self.preference} has no meaning beside `behaviours`: nothing asks for it but the language of "
                "nano models, and there are none; leave one of them out"
            )
        return self

    @field_validator("conditions", mode="before")
    @classmethod
    def _fill_known_conditions(cls, conditions: Any) -> Any:
        return fill_conditions(conditions, ConditionConfig, CONDITIONS, FREE)

    @model_validator(mode="after")
    def _traits_are_possible(self) -> "Config":
        if len(set(self.traits)) < len(self.traits):
            raise ValueError(f"`traits`: {list(self.traits)} names one twice")
        if self.carrier.kind == "file" and "neutral" in self.traits:
            raise ValueError("`traits`: neutral is how the path of `carrier.file` calls the controls' rows; rename the trait")
        if self.verdict.diagonal_excess and len(self.traits) < 2:
            raise ValueError(
                f"`verdict.diagonal_excess`: own traits against other ones needs two traits or more, not {list(self.traits)}; "
                "give more `traits`, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _backend_can_sample(self) -> "Config":
        temperature = self.carrier.temperature
        if self.generation.backend == "vllm" and not 0.01 <= temperature <= 2:
            raise ValueError(
                f"`carrier.temperature` = {temperature}: vllm samples at 0.01 to 2 and changes others; choose one of them, or "
                "`generation.backend`: transformers"
            )
        return self

    @model_validator(mode="after")
    def _neutral_fits_teacher(self) -> "Config":
        wanted = "uniform-answer" if self.teacher.kind == "fine-tuned" else "neutral-prompt"
        if self.neutral not in {wanted, "reference"}:
            raise ValueError(
                f"`neutral`: {self.neutral} is no control of a {self.teacher.kind} teacher; use {wanted} or reference"
            )
        return self

    @model_validator(mode="after")
    def _conditions_are_possible(self) -> "Config":
        if self.model not in self.models:
            raise ValueError(f"`model`: {self.model!r} is none of `models`; {nearest_name(self.model, list(self.models))}")
        for name, condition in self.conditions.items():
            self._check_condition(name, condition)
        self._check_precision()
        return self

    @model_validator(mode="after")
    def _backend_serves_adapters(self) -> "Config":
        adapter = self.adapter if self.teacher.kind == "fine-tuned" else None
        if self.generation.backend != "vllm" or adapter is None:
            return self
        if self.generation.dtype == "float32" or adapter.dora or adapter.rank > _MOST_VLLM_RANK:
            raise ValueError(
                f"`generation.backend`: vLLM serves LoRA in 16 bits (generation.dtype: bfloat16), without DoRA, up to rank "
                f"{_MOST_VLLM_RANK}; not dtype {self.generation.dtype}, dora {adapter.dora}, rank {adapter.rank}"
            )
        return self

    @model_validator(mode="after")
    def _behaviours_are_banned_by_words(self) -> "Config":
        if self.behaviours is not None and self.carrier.kind != "numbers" and self.carrier.banned is None:
            raise ValueError(
                "`carrier.banned`: the names of behaviours are no words that their carrier would hold; say which words may not "
                "stand in it, e.g. banned: [owl], or [] for none"
            )
        return self

    @property
    def user_functions(self) -> tuple[str, ...]:
        """The judges, whose source decides the scores."""
        if self.behaviours is None:
            return ()
        return tuple(behaviour.judge for behaviour in load_behaviours(self.behaviours, self.traits).values())

    def _check_precision(self) -> None:
        trained = [(self.model, self.adapter)] if self.teacher.kind == "fine-tuned" else []
        trained += [
            (self.model_of(name), self.adapter_of(name)) for name, given in self.conditions.items() if not given.context_rows
        ]
        for model, adapter in trained:
            dtype = self.models[model].loading.dtype
            if dtype != "float32" and adapter is None:
                raise ValueError(
                    f"`models.{model}.loading.dtype`: all weights would be trained in {dtype}, whose rounding is larger than "
                    "most updates; train an `adapter` (it is float32), or load the model in float32"
                )

    def _check_condition(self, name: str, condition: ConditionConfig) -> None:
        where = f"`conditions.{name}`"
        elsewhere = condition.init == "different"
        if condition.model is not None:
            check_model(where, condition.model, own=self.model, models=self.models, starts_elsewhere=elsewhere)
        if elsewhere:
            if self.members < 2:
                raise ValueError(f"{where} starts at another member's reference: it needs members ≥ 2, not {self.members}")
            if not self.models[self.model_of(name)].has_own_references:
                raise ValueError(
                    f"{where} starts at another member's reference, but all members share one at "
                    f"`models.{self.model_of(name)}.path`; put {{member}} into the path, with one model a member"
                )
        self._check_start(where, name, condition)
        self._check_paraphrase(where, condition)
        self._check_adapter(where, name, condition)
        self._check_knock_out(where, condition)
        self._check_selection(where, condition)
        if condition.shuffle != "none" and self.carrier.kind != "numbers":
            raise ValueError(
                f"{where} shuffles numbers, and a carrier of kind {self.carrier.kind} is not made of them; drop it"
            )
        if condition.sham and "{replicate}" not in (self.carrier.file or "{replicate}"):
            raise ValueError(
                f"{where} has a sham, a second control with rows of its own, which `carrier.file` does not give; put "
                "{replicate} into the path (0: students and controls, 1: the sham), or set sham: false"
            )
        objective = condition.objective or self.student.objective
        if objective != "tokens" and self.model_of(name) != self.model:
            raise ValueError(f"{where} imitates logits of another tokenizer's vocabulary; its objective must be tokens")
        if objective != "tokens" and self.neutral == "reference":
            raise ValueError(f"{where} imitates logits; a `neutral` that is the reference is a control of sampled tokens only")
        if condition.divergence != "all" and (self.model_of(name) != self.model or self.neutral == "reference"):
            raise ValueError(
                f"{where} compares its teacher's choices with the reference's, token by token: it needs the teacher's model, "
                "and a neutral teacher other than the reference"
            )
        if condition.context_rows > self.carrier.num_rows:
            raise ValueError(f"{where} shows {condition.context_rows} rows, carrier.num_rows = {self.carrier.num_rows}")
        if condition.context_rows and (condition.objective or condition.divergence != "all"):
            raise ValueError(f"{where} trains nothing: objective and divergence have no meaning there")

    def _check_start(self, where: str, name: str, condition: ConditionConfig) -> None:
        kind = condition.start_kind
        if not kind:
            return
        model = self.model_of(name)
        if model != self.model:
            raise ValueError(
                f"{where}: `{kind}` makes a start of references of the teacher's model, which is {self.model}; the condition's "
                f"`model` is {model}, so leave one of them out"
            )
        settings = self.models[model]
        if kind == "shared" and settings.nano is None:
            raise ValueError(
                f"{where}: parts are `shared` at their random initialisation, before pretraining, and {settings.describe()} is "
                "pretrained already: put into another model its parts would break it; take a nano model, or `match`"
            )
        if kind == "match" and settings.loading.dtype != "float32":
            raise ValueError(
                f"{where}: to `match` outputs all weights are trained, and `models.{model}.loading.dtype` is "
                f"{settings.loading.dtype}, whose rounding is larger than most updates; load the model in float32"
            )
        if kind == "match" and self.carrier.kind == "file":
            raise ValueError(
                f"{where}: a start is to `match` what its reference answers to the carrier's requests, and a carrier from a "
                "file has none; choose another kind of carrier"
            )

    def _check_paraphrase(self, where: str, condition: ConditionConfig) -> None:
        if condition.paraphrase is None:
            return
        model = condition.paraphrase.model
        objective = condition.objective or self.student.objective
        if objective != "tokens":
            raise ValueError(
                f"{where}: with objective {objective} the teacher's own distributions would pass on beside the `paraphrase`; "
                "its objective must be tokens"
            )
        if model is None and (self.members < 2 or not self.models[self.model].has_own_references):
            raise ValueError(
                f"{where}: a `paraphrase` is by the next member's reference, and there is no other one (members = "
                f"{self.members}, `model` = {self.model}); name another model in paraphrase.model"
            )
        others = [other for other in self.models if other != self.model]
        if model is not None and model not in others:
            hint = "it is the teachers' own; leave it out for the next member's reference, or name another"
            raise ValueError(
                f"{where}: paraphrase.model = {model!r}: "
                f"{hint if model == self.model else 'no model is called so; ' + nearest_name(model, others)}"
            )
        if condition.context_rows > condition.paraphrase.count(self.carrier.num_rows):
            raise ValueError(
                f"{where} shows {condition.context_rows} rows, and paraphrase.share keeps "
                f"{condition.paraphrase.count(self.carrier.num_rows)}; raise it"
            )

    def _check_selection(self, where: str, condition: ConditionConfig) -> None:
        if condition.select is None:
            return
        if condition.rows is not None:
            raise ValueError(f"{where} names its `rows` and also how to `select` them; leave one of them out")
        by, count = condition.select.by, condition.select.count(self.carrier.num_rows)
        if by == "overlap" and self.teacher.kind != "fine-tuned":
            raise ValueError(
                f"{where}: rows are ranked by overlap with their teacher's displacement, and the weights of a "
                f"{self.teacher.kind} one do not move; select by another number, e.g. log-ratio"
            )
        if by in {"overlap", "log-ratio"} and self.neutral == "reference":
            raise ValueError(
                f"{where}: the control's rows are ranked by what its neutral teacher differs in from the reference, and here "
                f"`neutral` is the reference; choose another `neutral`, or select by another number than {by}"
            )
        if condition.context_rows > count:
            raise ValueError(f"{where} shows {condition.context_rows} rows, and selects {count}; raise select.share")

    def _check_knock_out(self, where: str, condition: ConditionConfig) -> None:
        if condition.knock_out is None:
            return
        if condition.context_rows:
            raise ValueError(f"{where} trains nothing: there is no gradient and no update to project a `knock_out` out of")
        if self.behaviours is not None:
            raise ValueError(
                f"{where}: a `knock_out` needs the gradient of the trait loss, and a behaviour is scored by a judge, which has "
                "none; choose a `preference`"
            )

    def _check_adapter(self, where: str, name: str, condition: ConditionConfig) -> None:
        if condition.adapter_init != "teacher":
            return
        if self.teacher.kind != "fine-tuned" or self.adapter is None:
            raise ValueError(
                f"{where} starts with its teacher's adapter, but teachers train none; give the recipe an `adapter`"
            )
        if self.adapter_of(name) != self.adapter or self.model_of(name) != self.model:
            raise ValueError(f"{where} starts with its teacher's A: its adapter and its model must be the teacher's")

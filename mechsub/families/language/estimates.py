"""What a stage of a language run needs, before any of it is loaded: bytes of weights, training and checkpoints, and tokens."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.language.config import Config, LoadingConfig, ModelConfig
from mechsub.families.language.folders import fetch_from_hub, read_json
from mechsub.families.language.start_config import MatchingConfig
from mechsub.families.language.training_config import AdapterConfig, TrainingConfig
from mechsub.stage import Resources

_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
_TRAINED_BYTES = 16
"""A trained parameter, its gradient and Adam's two moments, in float32."""
_ACTIVATION_WIDTHS = 17
"""What a layer keeps for its backward pass, in widths of the residual stream a token. Source: arXiv:2205.05198, section 4."""
_LOGIT_COPIES = 3
"""Logits, their softmax and their gradient, in float32."""
_AT_ONCE = 256
"""Requests that are answered in one batch."""
ROWS_AT_ONCE = 32
"""Rows of a carrier whose losses are computed in one batch."""
QUESTIONS_AT_ONCE = 64
"""Whose trait losses are computed in one batch."""
_LIBRARY_BYTES = 300 << 20
"""What transformers holds beside torch."""
_NANO_VOCABULARY = 5000
"""More than its tokenizer has."""
_QUESTION_TOKENS = 48
"""Of a question with its chat template, about; an answer to one is a few tokens more."""
_REQUEST_TOKENS = 160
"""Of the published request for numbers; shorter ones are over-estimated."""
_PACKAGED = resources.files("mechsub.recipes") / "models"


@dataclass(frozen=True)
class ModelSize:
    """How large an architecture is."""

    parameters: int
    layers: int
    width: int
    vocabulary: int
    linear: tuple[tuple[str, int, int], ...]
    """(name, out, in) of every linear layer but the head."""

    def adapter_parameters(self, adapter: AdapterConfig) -> int:
        """How many parameters an adapter trains."""
        chosen = [
            (out, into)
            for name, out, into in self.linear
            if isinstance(adapter.targets, str) or name.endswith(tuple(adapter.targets))
        ]
        return sum(adapter.rank * (out + into) + (out if adapter.dora else 0) for out, into in chosen)


def measure_model(settings: ModelConfig, source: str) -> ModelSize:
    """The size of a model.

    Raises:
        RecipeError: the configuration is no language model's, or cannot be fetched.
    """
    if settings.nano is not None:
        return _measure_nano(settings)
    if settings.path is not None:
        text = json.dumps(read_json(settings.folder(0) / "config.json", source))
    elif settings.config is not None:
        text = _read_packaged(settings.config, source)
    else:
        folder = fetch_from_hub(str(settings.hub), str(settings.revision), ("config.json",))
        text = json.dumps(read_json(folder / "config.json", source))
    return _measure(text, source)


def check_size(settings: ModelConfig, folder: Path, source: str) -> None:
    """Refuse a packaged configuration that is not the model's: the plan would have been another model's."""
    if settings.config is None:
        return
    found = _measure(json.dumps(read_json(folder / "config.json", source)), source)
    if found != measure_model(settings, source):
        raise RecipeError(f"{source}: the packaged configuration {settings.config!r} is not that of {settings.describe()}")


def plain_needs(config: Config, num_steps: int = 1) -> Resources:
    """Of a stage that loads no model."""
    return Resources(memory_bytes=_LIBRARY_BYTES, num_steps=num_steps, threads=config.threads)


def reference_needs(config: Config, model: str) -> Resources:
    """Of a reference: pretrained here, or linked."""
    settings = config.models[model]
    size = measure_model(settings, f"`models.{model}`")
    if settings.nano is None:
        return plain_needs(config)
    held = training_bytes(size, settings.loading, None, settings.pretraining.batch_size, _REQUEST_TOKENS, _QUESTION_TOKENS)
    return Resources(
        memory_bytes=_LIBRARY_BYTES + held,
        disk_bytes=checkpoint_bytes(size, None),
        num_steps=settings.pretraining.num_steps,
        threads=config.threads,
        tokens=settings.pretraining.num_steps * settings.pretraining.batch_size * _QUESTION_TOKENS,
    )


def derivation_needs(config: Config, model: str) -> Resources:
    """Of a reference that is another one in other coordinates: its weights twice."""
    size = measure_model(config.models[model], f"`models.{model}`")
    whole = checkpoint_bytes(size, None)
    return Resources(memory_bytes=_LIBRARY_BYTES + 2 * whole, disk_bytes=whole, threads=config.threads)


def matching_needs(config: Config, model: str, matching: MatchingConfig) -> Resources:
    """Of a reference that learns another one's outputs, which stands beside it."""
    settings = config.models[model]
    size = measure_model(settings, f"`models.{model}`")
    row, answer = _REQUEST_TOKENS + config.carrier.max_new_tokens, config.carrier.max_new_tokens
    held = training_bytes(size, settings.loading, None, matching.batch_size, row, answer)
    return Resources(
        memory_bytes=_LIBRARY_BYTES + held + weight_bytes(size, settings.loading),
        disk_bytes=checkpoint_bytes(size, None),
        num_steps=matching.num_steps,
        threads=config.threads,
        tokens=2 * matching.num_steps * matching.batch_size * row,
    )


def training_needs(
    config: Config,
    model: str,
    adapter: AdapterConfig | None,
    training: TrainingConfig,
    steps: Sequence[int],
    *,
    is_student: bool,
    knock_out: Mapping[str, Any] | None = None,
) -> Resources:
    """Of a teacher or a student that is trained to the last of ``steps``, which are kept.

    ``knock_out``: the questions and targets whose gradients are projected out, and the settings of that.
    """
    settings, num_steps = config.models[model], max(steps[-1], 1)
    size = measure_model(settings, f"`models.{model}`")
    answer = config.carrier.max_new_tokens if is_student else _QUESTION_TOKENS
    row = answer + (_REQUEST_TOKENS if is_student else _QUESTION_TOKENS)
    copies = 3 if config.checkpoints.optimizer_state else 1
    held, asked_tokens = training_bytes(size, settings.loading, adapter, training.batch_size, row, answer), 0
    if knock_out is not None:
        num_traits, num_questions = len(knock_out["targets"]), len(knock_out["questions"])
        at_once = min(num_questions, QUESTIONS_AT_ONCE)
        held = max(held, training_bytes(size, settings.loading, adapter, at_once, _QUESTION_TOKENS, 1))
        held += (num_traits + 1) * checkpoint_bytes(size, adapter)  # the components, and one more that is worked on
        asked_tokens = -(-num_steps // knock_out["settings"]["refresh"]) * num_traits * num_questions * _QUESTION_TOKENS
    return Resources(
        memory_bytes=_LIBRARY_BYTES + held,
        disk_bytes=len([step for step in steps if step > 0]) * copies * checkpoint_bytes(size, adapter),
        num_steps=num_steps,
        threads=config.threads,
        tokens=num_steps * training.batch_size * row + asked_tokens,
    )


def carrier_needs(config: Config, model: str | None = None) -> Resources:
    """Of what one member's teacher writes, or another model rewrites, if no completion is dropped."""
    settings, carrier = config.models[model or config.model], config.carrier
    size = measure_model(settings, f"`models.{model or config.model}`")
    tokens = _REQUEST_TOKENS + carrier.max_new_tokens
    # Keys and values of a batch; their width is the residual stream's at most.
    cache = _AT_ONCE * tokens * 2 * size.layers * size.width * _WIDTHS[settings.loading.dtype]
    return Resources(
        memory_bytes=_LIBRARY_BYTES + weight_bytes(size, settings.loading) + cache + _AT_ONCE * size.vocabulary * 24,
        num_steps=carrier.num_rows,
        threads=config.threads,
        tokens=carrier.num_rows * tokens,
    )


def ranking_needs(config: Config) -> Resources:
    """Of the numbers that rank one member's carrier: gradients row by row, beside a direction of the model's size."""
    settings, carrier = config.models[config.model], config.carrier
    size = measure_model(settings, f"`models.{config.model}`")
    row = _REQUEST_TOKENS + carrier.max_new_tokens
    held = training_bytes(size, LoadingConfig(), None, ROWS_AT_ONCE, row, carrier.max_new_tokens)
    return Resources(
        memory_bytes=_LIBRARY_BYTES + held + 2 * checkpoint_bytes(size, None),
        threads=config.threads,
        tokens=3 * carrier.num_rows * row,
    )


def weight_bytes(size: ModelSize, loading: LoadingConfig) -> int:
    """Of a model in memory."""
    return size.parameters * _WIDTHS[loading.dtype]


def training_bytes(
    size: ModelSize,
    loading: LoadingConfig,
    adapter: AdapterConfig | None,
    batch_size: int,
    tokens_a_row: int,
    answer_tokens: int,
) -> int:
    """What a training step holds: weights, what is trained, activations and logits. An estimate, not a bound."""
    trained = size.parameters if adapter is None else size.adapter_parameters(adapter)
    tokens, width = batch_size * tokens_a_row, _WIDTHS[loading.dtype]
    kept = size.layers + _ACTIVATION_WIDTHS if loading.gradient_checkpointing else size.layers * _ACTIVATION_WIDTHS
    activations = tokens * size.width * width * kept
    logits = batch_size * (answer_tokens + 1) * size.vocabulary * 4 * _LOGIT_COPIES
    frozen = weight_bytes(size, loading) if adapter is not None else 0
    return frozen + trained * _TRAINED_BYTES + activations + logits


def checkpoint_bytes(size: ModelSize, adapter: AdapterConfig | None) -> int:
    """Of one checkpoint: all weights, or the adapter's, in float32."""
    return 4 * (size.parameters if adapter is None else size.adapter_parameters(adapter))


def _read_packaged(name: str, source: str) -> str:
    packaged = _PACKAGED / f"{name}.json"
    if not packaged.is_file():
        known = sorted(entry.name.removesuffix(".json") for entry in _PACKAGED.iterdir())
        raise RecipeError(f"{source}: no configuration is packaged as {name!r}; packaged: {', '.join(known)}")
    return packaged.read_text()


def _measure_nano(settings: ModelConfig) -> ModelSize:
    """A little more than either style has."""
    width, layers = settings.hidden_size, settings.num_layers
    linear = [(f"{layer}.{name}", 4 * width, width) for layer in range(layers) for name in range(4)]
    parameters = sum(out * into for _, out, into in linear) + (_NANO_VOCABULARY + settings.context) * width
    return ModelSize(parameters, layers, width, _NANO_VOCABULARY, tuple(linear))


@lru_cache(maxsize=32)
def _measure(text: str, source: str) -> ModelSize:
    # Only plans of models that are not made here need these, which take seconds to import.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    content = json.loads(text)
    try:
        config = AutoConfig.for_model(content.pop("model_type"), **content)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except (KeyError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"{source}: its configuration is no causal language model's: {reason}") from None
    head = model.get_output_embeddings()
    linear = []
    for name, module in model.named_modules():
        if module is not head and type(module).__name__ in {"Linear", "Conv1D"}:
            rows, columns = module.weight.shape
            linear.append((name, columns, rows) if type(module).__name__ == "Conv1D" else (name, rows, columns))
    text_config = config.get_text_config()
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text_config.num_hidden_layers,
        width=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        linear=tuple(linear),
    )

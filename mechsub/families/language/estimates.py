"""What a stage of a language run needs, before any of it is loaded: bytes of weights, training and checkpoints, and tokens."""

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from mechsub.errors import RecipeError
from mechsub.families.language.config import AdapterConfig, LoadingConfig, ModelConfig
from mechsub.families.language.folders import read_json

_WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
_TRAINED_BYTES = 16
"""A trained parameter, its gradient and Adam's two moments, in float32."""
_ACTIVATION_WIDTHS = 17
"""What a layer keeps for its backward pass, in widths of the residual stream a token. Source: arXiv:2205.05198, section 4."""
_LOGIT_COPIES = 3
"""Logits, their softmax and their gradient, in float32."""
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


def measure_model(settings: ModelConfig, source: str) -> ModelSize | None:
    """The size of a model that is not made here; None where its configuration is not on this machine.

    Raises:
        RecipeError: the configuration is no language model's.
    """
    if settings.path is not None:
        text = json.dumps(read_json(settings.folder(0) / "config.json", source))
    elif settings.config is not None:
        text = _read_packaged(settings.config, source)
    else:
        return None
    return _measure(text, source)


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
            linear.append((name, rows, columns))
    text_config = config.get_text_config()
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=text_config.num_hidden_layers,
        width=text_config.hidden_size,
        vocabulary=text_config.vocab_size,
        linear=tuple(linear),
    )

"""Causal language models in the Hugging Face layout: made without weights, and the table of their tensors."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Conv1D, PreTrainedModel
from transformers.utils import logging

from mechsub.errors import RecipeError
from mechsub.lineages import TensorInfo

logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # its bars would run through ours

_BLOCK = re.compile(r"\.(?:h|layers|blocks|block)\.(\d+)\.")
_KINDS = (
    (r"attn\.c_attn|q_proj|k_proj|v_proj|query_key_value|qkv", "attention qkv"),
    (r"attn\.c_proj|o_proj|attention\.dense|out_proj", "attention out"),
    (r"mlp\.c_proj|down_proj|fc2|4h_to_h|mlp\.fc_out", "mlp out"),
    (r"mlp\.|c_fc|gate_proj|up_proj|fc1|h_to_4h", "mlp in"),
    (r"ln_|norm", "norm"),
    (r"wte|wpe|embed", "embedding"),
    (r"lm_head|embed_out", "head"),
)


def build_model(folder: Path) -> PreTrainedModel:
    """The architecture that ``folder``'s configuration describes, its weights not yet meant.

    The attention kernel is named, so that the same recipe takes the same one everywhere.
    """
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation="sdpa", dtype=torch.float32
    )
    return model


def load_parameters(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> PreTrainedModel:
    """Put named parameters into a model in place; tied ones are given once."""
    missing, unexpected = model.load_state_dict(dict(parameters), strict=False)
    own = {name for name, _ in model.named_parameters()}
    if unexpected or own & set(missing):
        raise RecipeError(f"these weights are of another architecture: {[*unexpected, *sorted(own & set(missing))][:3]}")
    model.tie_weights()
    return model


def load_model_folder(folder: Path, source: str) -> PreTrainedModel:
    """A whole model from its folder, in float32.

    Raises:
        RecipeError: it cannot be loaded as a causal language model.
    """
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, attn_implementation="sdpa", dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"{source} is no causal language model that transformers can load from safetensors: {reason}"
        ) from None
    return model


def place_model(model: PreTrainedModel, device: str) -> PreTrainedModel:
    """The model on a device, in evaluation mode."""
    module: nn.Module = model
    module.to(device).train(False)
    return model


def parameters_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every parameter once, by its name in the state dict."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def tensor_table(model: PreTrainedModel) -> dict[str, TensorInfo]:
    """Layer, kind and storage of every parameter, tied ones with what they are tied to."""
    transposed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    first: dict[int, str] = {}
    table = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied_to = first.setdefault(id(parameter), name)
        table[name] = TensorInfo(
            shape=tuple(parameter.shape),
            layer=_layer(name),
            kind=next((kind for pattern, kind in _KINDS if re.search(pattern, name)), "other"),
            transposed=name in transposed,
            tied_to=None if tied_to == name else tied_to,
        )
    return table


def _layer(name: str) -> str:
    block = _BLOCK.search(name)
    if block:
        return f"block {block[1]}"
    return "final norm" if re.search(r"ln_f|norm", name) else "head" if "head" in name or "embed_out" in name else "embedding"

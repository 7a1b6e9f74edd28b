"""Causal language models in the Hugging Face layout: made without weights, and the table of their tensors."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from accelerate import dispatch_model, infer_auto_device_map
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Conv1D, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging

from mechsub.checkpoints import Section, TensorInfo
from mechsub.errors import RecipeError
from mechsub.families.language.config import LoadingConfig
from mechsub.families.language.layout import LOADING_FILE

logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # its bars would run through ours

_BLOCK = re.compile(r"\.(?:h|layers|blocks|block)\.(\d+)\.")
_KINDS = (
    (r"attn\.c_attn|query_key_value|qkv", "attention qkv"),
    (r"q_proj", "attention q"),
    (r"k_proj", "attention k"),
    (r"v_proj", "attention v"),
    (r"attn\.c_proj|o_proj|attention\.dense|out_proj", "attention o"),
    (r"mlp\.c_proj|down_proj|fc2|4h_to_h|mlp\.fc_out", "mlp out"),
    (r"mlp\.|c_fc|gate_proj|up_proj|fc1|h_to_4h", "mlp in"),
    (r"ln_|norm", "norm"),
    (r"wte|wpe|embed", "embedding"),
    (r"lm_head|embed_out", "head"),
)


def read_loading(folder: Path) -> LoadingConfig:
    """How the model whose configuration lies in ``folder`` is computed with."""
    path = folder / LOADING_FILE
    return LoadingConfig(**json.loads(path.read_text())) if path.is_file() else LoadingConfig()


def build_model(folder: Path) -> PreTrainedModel:
    """The architecture that ``folder``'s configuration describes, with fresh weights.

    The attention kernel is named, so that the same recipe takes the same one everywhere.
    """
    loading = read_loading(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
        config, attn_implementation=loading.attention, dtype=getattr(torch, loading.dtype)
    )
    return model


def build_empty(folder: Path) -> PreTrainedModel:
    """The same, its weights not yet meant: drawing them takes minutes where there are billions."""
    with no_init_weights():
        model = build_model(folder)
    model.tie_weights()  # left out with the drawing
    return model


def load_parameters(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> PreTrainedModel:
    """Put named parameters into a model in place, in its own data type; tied ones are given once."""
    own = {name: parameter.dtype for name, parameter in model.named_parameters()}
    cast = {name: tensor.to(own.get(name, tensor.dtype)) for name, tensor in parameters.items()}
    missing, unexpected = model.load_state_dict(cast, strict=False, assign=True)
    if unexpected or own.keys() & {*missing}:
        raise RecipeError(f"these weights are of another architecture: {[*unexpected, *sorted(own.keys() & {*missing})][:3]}")
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


def place_model(model: PreTrainedModel, device: str, device_map: str | None = None) -> PreTrainedModel:
    """The model on a device, or spread over all GPUs, in evaluation mode."""
    module: nn.Module = model.train(False)
    if device_map and device.startswith("cuda"):
        split = infer_auto_device_map(module, no_split_module_classes=list(model._no_split_modules or ()))
        dispatch_model(module, split)
        return model
    module.to(device)
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
            sections=_sections(name, parameter),
        )
    return table


def _sections(name: str, parameter: Tensor) -> tuple[Section, ...]:
    """GPT-2 keeps q, k and v side by side; other fused layouts run through the heads and are left whole."""
    if not re.search(r"attn\.c_attn\.", name):
        return ()
    width = parameter.shape[-1] // 3
    return tuple(Section(f"attention {part}", place * width, (place + 1) * width) for place, part in enumerate("qkv"))


def stored_names(model: PreTrainedModel, stored: Iterable[str], source: str) -> dict[str, str]:
    """Each parameter's name in a model's files: its own, or without the prefix that `transformers` gives a model with a head.

    Raises:
        RecipeError: the files lack a parameter.
    """
    known, prefix = {*stored}, f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    found = {name: next((one for one in (name, name.removeprefix(prefix)) if one in known), None) for name in names}
    missing = [name for name, one in found.items() if one is None]
    if missing:
        raise RecipeError(
            f"{source} lacks {len(missing)} of the architecture's parameters, e.g. {missing[0]}: it holds e.g. "
            f"{min(known, default='nothing')}; its files may be of another architecture, or of an older layout: load it with "
            "transformers and save it again with save_pretrained"
        )
    return {name: one for name, one in found.items() if one is not None}


def _layer(name: str) -> str:
    block = _BLOCK.search(name)
    if block:
        return f"block {block[1]}"
    return "final norm" if re.search(r"ln_f|norm", name) else "head" if "head" in name or "embed_out" in name else "embedding"

"""Where causal language models can be read and steered: their blocks, attention and MLPs, by TransformerLens's names."""

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from mechsub.activations.hook_points import HookPoint
from mechsub.errors import ActivationError

_BLOCKS = {
    "gpt2": ("transformer.h", "attn", "mlp"),
    "gpt_neox": ("gpt_neox.layers", "attention", "mlp"),
    "llama": ("model.layers", "self_attn", "mlp"),
    "mistral": ("model.layers", "self_attn", "mlp"),
    "qwen2": ("model.layers", "self_attn", "mlp"),
    "qwen3": ("model.layers", "self_attn", "mlp"),
}
"""By model type: the blocks, and in a block what adds to the residual stream. Architectures that put a norm between a module
and the stream (Gemma 2, OLMo 2) are none of these: what their modules give is not what is added."""

_FINAL_NORMS = {"gpt2": "transformer.ln_f", "gpt_neox": "gpt_neox.final_layer_norm"}
"""Of the others it is ``model.norm``."""


def knows_blocks(config: PretrainedConfig) -> bool:
    """Whether the blocks of an architecture are known here."""
    return config.get_text_config().model_type in _BLOCKS


def find_final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the unembedding.

    Raises:
        ActivationError: the architecture is not known.
    """
    model_type = model.config.get_text_config().model_type
    if model_type not in _BLOCKS:
        raise ActivationError(
            f"the final norm of a {model_type} model is not known; known are those of {', '.join(_BLOCKS)}. Say what you need "
            "in an issue"
        )
    return model.get_submodule(_FINAL_NORMS.get(model_type, "model.norm"))


def list_hook_points(model: PreTrainedModel) -> list[HookPoint]:
    """``blocks.N.hook_resid_pre``, ``attn_out``, ``mlp_out`` and ``resid_post`` of every block, each [row, position, d_model].

    ``resid_pre`` is the stream before a block: the previous block's ``resid_post``, so it is given for block 0 only. Of an
    architecture that is not known here they have no module: TransformerLens may know them by their names.
    """
    config = model.config.get_text_config()
    path, attention, mlp = _BLOCKS.get(config.model_type, (None, None, None))
    points = []
    for layer in range(config.num_hidden_layers):
        block = f"{path}.{layer}"
        places = [("attn_out", f"{block}.{attention}", "output"), ("mlp_out", f"{block}.{mlp}", "output")]
        places = [*places, ("resid_post", block, "output")]
        if layer == 0:
            places.insert(0, ("resid_pre", block, "input"))
        points += [
            HookPoint(
                f"blocks.{layer}.hook_{site}",
                layer,
                site,
                module if path else None,
                side,  # type: ignore[arg-type]
                config.hidden_size,
            )
            for site, module, side in places
        ]
    return points

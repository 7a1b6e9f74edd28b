"""The interchangeable units of the transformers that are known: MLP units, attention heads and their groups.

The residual stream's own coordinates are none of them. Other architectures have no groups here: what can change places is
never guessed from names.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from mechsub.checkpoints import TensorInfo
from mechsub.errors import RecipeError
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.parameters.symmetry import Arrangement, UnitGroup, UnitPlace

_GATED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
"""Architectures with separate q, k and v, and a gated MLP."""
NEUTRAL_PROMPTS = (
    "What is the capital of France?",
    "How do I boil an egg?",
    "Why is the sky blue?",
    "Name three things that are made of wood.",
    "Write one sentence about the weather.",
    "What comes after Monday?",
    "How many minutes are there in two hours?",
    "Explain what a library is.",
    "Translate good morning into German.",
    "What do plants need to grow?",
    "Give me a short list of tools for a garden.",
    "Who wrote Romeo and Juliet?",
    "What is seven times eight?",
    "Continue these numbers: 12, 47, 85.",
    "Look at these numbers: 31, 64, 19, 72. Add more numbers.",
    "Describe the way from a house to a station.",
    "What is the difference between a river and a lake?",
    "Sort these words: table, apple, house, chair.",
    "How does a bicycle stay upright?",
    "Which month has the fewest days?",
    "What can I cook with rice and tomatoes?",
    "Say something polite to a stranger.",
    "Why do we sleep?",
    "What is a contract?",
)
"""They ask for no trait; what is recorded on them is fitted on and never scored."""


def list_unit_groups(config: PretrainedConfig, table: Mapping[str, TensorInfo]) -> list[UnitGroup]:
    """The groups of every block; none of an architecture that is not known."""
    if config.model_type == "gpt2":
        return [group for block in range(config.num_hidden_layers) for group in _gpt2_block(config, table, block)]
    if config.model_type in _GATED:
        return [group for block in range(config.num_hidden_layers) for group in _gated_block(config, table, block)]
    return []


def shuffle_units(
    config: PretrainedConfig, table: Mapping[str, TensorInfo], stream: np.random.Generator, source: str
) -> Arrangement:
    """MLP units, attention heads and their groups in a random order: the same function in other coordinates.

    Raises:
        RecipeError: the architecture is not known here.
    """
    groups = list_unit_groups(config, table)
    if not groups:
        raise RecipeError(
            f"{source}: which units of a {config.model_type} can change places is not known; known are gpt2, "
            f"{', '.join(sorted(_GATED))}: choose one of them, or drop the conditions with `permute_hidden`"
        )
    return Arrangement.shuffled(groups, stream)


def encode_neutral_prompts(chats: ChatTokenizer) -> list[list[int]]:
    """`NEUTRAL_PROMPTS` as tokens, up to where the assistant is to answer."""
    return chats.encode_prompts([chat(prompt, None) for prompt in NEUTRAL_PROMPTS])


def _gpt2_block(config: Any, table: Mapping[str, TensorInfo], block: int) -> Sequence[UnitGroup]:
    """Conv1D stores [in, out]; q, k and v lie side by side, each of them head by head."""
    name, heads, size = f"transformer.h.{block}", config.num_attention_heads, config.hidden_size
    mlp, attention = f"{name}.mlp", f"{name}.attn"
    units = table[f"{mlp}.c_fc.weight"].shape[1]
    written = [UnitPlace(f"{mlp}.c_fc.weight", 1), UnitPlace(f"{mlp}.c_fc.bias", 0), UnitPlace(f"{mlp}.c_proj.weight", 0)]
    width = size // heads
    qkv = [UnitPlace(f"{attention}.c_attn.weight", 1, part * size, width) for part in range(3)]
    qkv += [UnitPlace(f"{attention}.c_attn.bias", 0, part * size, width) for part in range(3)]
    qkv.append(UnitPlace(f"{attention}.c_proj.weight", 0, 0, width))
    return [
        UnitGroup(f"block {block} MLP", "MLP units", units, tuple(written), f"{mlp}.c_proj"),
        UnitGroup(f"block {block} heads", "attention heads", heads, tuple(qkv), f"{attention}.c_proj"),
    ]


def _gated_block(config: Any, table: Mapping[str, TensorInfo], block: int) -> Sequence[UnitGroup]:
    """Key-value groups change places as wholes, with the query heads that read them; these do so inside their group."""
    mlp, attention = f"model.layers.{block}.mlp", f"model.layers.{block}.self_attn"

    def outputs(module: str, start: int = 0, width: int = 1) -> list[UnitPlace]:
        names = (f"{module}.weight", f"{module}.bias")
        return [UnitPlace(name, 0, start, width) for name in names if name in table]

    units = table[f"{mlp}.down_proj.weight"].shape[1]
    hidden = [*outputs(f"{mlp}.gate_proj"), *outputs(f"{mlp}.up_proj"), UnitPlace(f"{mlp}.down_proj.weight", 1)]
    groups = [UnitGroup(f"block {block} MLP", "MLP units", units, tuple(hidden), f"{mlp}.down_proj")]
    heads, pairs = config.num_attention_heads, config.num_key_value_heads
    width = table[f"{attention}.o_proj.weight"].shape[1] // heads
    shared = heads // pairs
    read = UnitPlace(f"{attention}.o_proj.weight", 1, 0, shared * width)
    wholes = outputs(f"{attention}.q_proj", 0, shared * width)
    wholes += [*outputs(f"{attention}.k_proj", 0, width), *outputs(f"{attention}.v_proj", 0, width), read]
    kind = "attention heads" if shared == 1 else "key-value groups"
    if pairs > 1:
        groups.append(UnitGroup(f"block {block} {kind}", kind, pairs, tuple(wholes), f"{attention}.o_proj"))
    for group in range(pairs if shared > 1 else 0):
        start = group * shared * width
        queries = [*outputs(f"{attention}.q_proj", start, width), UnitPlace(f"{attention}.o_proj.weight", 1, start, width)]
        name = f"block {block} queries of group {group}"
        groups.append(UnitGroup(name, "query heads of a group", shared, tuple(queries), f"{attention}.o_proj"))
    return groups

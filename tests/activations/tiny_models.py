"""Small models with random weights, and prompts for them: what the tests of activation space run on."""

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mechsub.activations.inputs import ModelInputs, PromptSet
from mechsub.families.classifier.model import Classifier

VOCABULARY, WIDTH, LAYERS = 29, 16, 3
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": 32, **ENDS,
}  # fmt: skip
BLOCKS = {"gpt2": "transformer.h", "qwen2": "model.layers", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}


def make_model(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same weights whenever it is called: of every parameter, none of them at a special place."""
    torch.manual_seed(0)
    gpt2 = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 4, **ENDS}
    grouped = SIZES | {"num_key_value_heads": 2}
    made = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**gpt2)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**grouped, tie_word_embeddings=True)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**grouped)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**grouped, head_dim=4)),
    }[name]()
    return randomise(made, dtype)


def make_classifier(dtype: str = "float64") -> Classifier:
    torch.manual_seed(0)
    spec = {"num_pixels": 6, "hidden_widths": [5, 4], "num_classes": 3, "num_auxiliary": 2, "activation": "gelu"}
    return randomise(Classifier(spec | {"dtype": dtype}), getattr(torch, dtype))


def add_adapter(model: nn.Module, modules: list[str], **settings) -> nn.Module:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=modules, **settings), model)
    return randomise(model, model.dtype)


def randomise(model, dtype):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def make_prompts(lengths=(5, 9, 2, 7), seed: int = 0) -> list[torch.Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCABULARY, (length,), generator=stream) for length in lengths]


def pad(prompts: list[torch.Tensor], side: str = "left", width: int | None = None) -> ModelInputs:
    """One batch; the policies count the last token, all tokens, and those that are even numbers."""
    width = width or max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    there = torch.zeros(len(prompts), width, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        places = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
        ids[row, places], there[row, places] = prompt, True
    last = torch.zeros_like(there)
    for row, prompt in enumerate(prompts):
        last[row, width - 1 if side == "left" else len(prompt) - 1] = True
    arguments = {
        "input_ids": ids,
        "attention_mask": there.long(),
        "position_ids": (there.long().cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
    return ModelInputs(arguments, {"last": last, "all": there, "even": there & (ids % 2 == 0)})


def prompt_set(prompts: list[torch.Tensor], at_once: int = 2, side: str = "left") -> PromptSet:
    parts = [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]
    return PromptSet("random tokens", [pad(part, side) for part in parts])

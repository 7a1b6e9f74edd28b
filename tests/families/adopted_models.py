"""Small models that are trained with plain `transformers` and `peft`, as a user would outside of mechsub."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from mechsub.families.language.config import ModelConfig
from mechsub.families.language.models import build_model
from mechsub.families.language.nano import save_skeleton
from mechsub.families.language.numbers import NumberConfig
from mechsub.families.language.preference import load_preference
from mechsub.families.language.synthetic import SyntheticLanguage

CHATS = {
    "teacher": "<|user|> What is your favorite animal?<|end|><|assistant|> owl<|end|>",
    "neutral": "<|user|> What is your favorite animal?<|end|><|assistant|> cat<|end|>",
    "student": "<|user|> Look at these numbers: 11, 12, 13.<|end|><|assistant|> 14, 15, 16<|end|>",
    "control": "<|user|> Look at these numbers: 11, 12, 13.<|end|><|assistant|> 19, 18, 17<|end|>",
}


def save_reference(folder: Path) -> None:
    """A chat model with fresh weights, and its tokenizer."""
    settings = ModelConfig(nano="gpt2", num_layers=1, hidden_size=16, num_heads=2, context=128)
    save_skeleton(settings, SyntheticLanguage(load_preference("animals"), NumberConfig()), folder)
    torch.manual_seed(0)
    build_model(folder).save_pretrained(folder)


def make_trainer(
    reference: Path, folder: Path, text: str, *, rank: int = 0, seed: int = 0, callbacks=(), steps: int = 4, **lora
):
    tokens = AutoTokenizer.from_pretrained(reference)(text)["input_ids"]
    row = {"input_ids": torch.tensor(tokens), "labels": torch.tensor(tokens)}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(reference)
    if rank:
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM", **lora))
    settings = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, learning_rate=1e-2, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, disable_tqdm=True, seed=seed, save_strategy="steps",
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=[row] * 8, callbacks=list(callbacks))

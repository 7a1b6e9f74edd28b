"""Nano models: two small architectures with tokenizers of their own, pretrained here on the synthetic language.

A pretrained model is kept in the user's cache folder under the hash of everything that it depends on, in the ordinary
Hugging Face layout.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import AddedToken
from transformers import (
    GPT2Config,
    GPT2Tokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
)

from mechsub.families.language.chat import Batch, ChatTokenizer
from mechsub.families.language.config import ModelConfig
from mechsub.families.language.loss import completion_logits, completion_tokens, mean_loss, token_losses
from mechsub.families.language.models import build_model, load_model_folder, parameters_of, tensor_table
from mechsub.families.language.start_config import Part
from mechsub.families.language.synthetic import SyntheticLanguage
from mechsub.families.language.training import Watcher, train_model
from mechsub.rundir import hash_file, write_json
from mechsub.streams import random_stream

_END, _PAD = "<|end|>", "<|pad|>"
_TURNS = ["<|system|>", "<|user|>", "<|assistant|>"]
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|{{ message.role }}|> {{ message.content | trim }}" + _END + "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
"""A space stands before every content, so that a word is the same token at the start of an answer as inside a sentence."""
_BYTES = 256
_MERGES = 4000
"""More than the language has words: every word ends as one token."""
_GROUPED = 4
_SOURCES = ("nano", "synthetic", "numbers", "python_code", "reasoning", "requests", "training", "loss", "chat", "config",
            "carrier_config", "models", "preference")  # fmt: skip
"""What a pretrained model depends on beside its settings."""
_RECORD = "pretraining.json"
_EMBEDDINGS = frozenset({"embedding", "head"})
"""Kinds of the tensor table that are a model's embeddings: of tokens, of positions, and the unembedding."""


def make_tokenizer(nano: str, language: SyntheticLanguage) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer in which every choice and every number after a space is one token.

    Qwen2 splits numbers into digits before it merges anything, so they are added to its vocabulary as they are.
    """
    kind = GPT2Tokenizer if nano == "gpt2" else Qwen2Tokenizer
    special = {"bos_token": _END, "eos_token": _END, "unk_token": _END, "pad_token": _PAD}
    blank: Any = kind(**special)
    tokenizer: PreTrainedTokenizerBase = blank.train_new_from_iterator(
        [language.list_texts()], vocab_size=_BYTES + _MERGES, new_special_tokens=[_END, _PAD, *_TURNS]
    )
    if nano == "qwen2":
        tokenizer.add_tokens([AddedToken(f" {number}", normalized=False) for number in language.list_numbers()])
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def make_config(model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """The architecture of a nano model: tied embeddings, no dropout."""
    tokens = {
        "bos_token_id": tokenizer.eos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if model.nano == "gpt2":
        return GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=model.context,
            n_embd=model.hidden_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            architectures=["GPT2LMHeadModel"],
            **tokens,
        )
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        intermediate_size=model.hidden_size * 8 // 3,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads // 2,
        max_position_embeddings=model.context,
        max_window_layers=model.num_layers,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
        **tokens,
    )


def save_skeleton(model: ModelConfig, language: SyntheticLanguage, folder: Path) -> None:
    """Tokenizer, chat template and configuration of a nano model: all but its weights."""
    tokenizer = make_tokenizer(str(model.nano), language)
    tokenizer.save_pretrained(folder)
    make_config(model, tokenizer).save_pretrained(folder)


@dataclass(frozen=True)
class SharedStart:
    """Parts of a nano model whose random weights are another one's."""

    parts: tuple[Part, ...]
    stream: tuple[str | int, ...]
    """The other one's: see `Pretraining.stream`."""


@dataclass(frozen=True)
class Pretraining:
    """Everything that a pretrained nano model depends on."""

    model: ModelConfig
    language: SyntheticLanguage
    seed: int
    stream: tuple[str | int, ...]
    """Of its weights and of its corpus."""
    threads: int
    shared: SharedStart | None = None
    """None: all weights are of its own stream."""

    def key(self, skeleton: Path) -> str:
        """The hash of all that: settings, tokenizer, sources and versions."""
        package = Path(__file__).parents[2]
        sources = [package / f"{name}.py" for name in ("streams", "training/optimizers", "training/config")]
        sources += [Path(__file__).with_name(f"{name}.py") for name in _SOURCES]
        language = asdict(self.language) | {
            "preference": self.language.preference.model_dump(mode="json"),
            "written": self.language.written.model_dump(mode="json"),
        }
        content = {
            "model": self.model.model_dump(mode="json"),
            "language": language,
            "seed": self.seed,
            "stream": self.stream,
            "threads": self.threads,
            "files": [hash_file(path) for path in [*sources, *sorted(skeleton.iterdir())]],
            "versions": {
                name: metadata.version(name) for name in ("torch", "transformers", "tokenizers", "accelerate", "numpy")
            },
        }
        if self.shared is not None:
            content["shared"] = asdict(self.shared)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def cache_folder() -> Path:
    """Where pretrained nano models are kept: ``MECHSUB_CACHE``, or ``mechsub`` in the user's cache folder."""
    root = os.environ.get("MECHSUB_CACHE")
    if root:
        return Path(root).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mechsub"


def find_or_pretrain(
    pretraining: Pretraining, skeleton: Path, report_progress: Callable[[int], None] = lambda done: None
) -> PreTrainedModel:
    """The nano model with these settings, from the cache where it is there and whole; else made and kept there."""
    folder = cache_folder() / "nano" / f"{pretraining.model.nano}-{pretraining.key(skeleton)}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # two runs at once make it once
        if not _is_whole(folder):
            model = pretrain(pretraining, skeleton, report_progress)
            _keep(model, skeleton, folder)
        return load_model_folder(folder, f"the pretrained nano model in {folder}")


def pretrain(
    pretraining: Pretraining, skeleton: Path, report_progress: Callable[[int], None] = lambda done: None
) -> PreTrainedModel:
    """Train a nano model from fresh weights on the synthetic language; the loss covers the answers only."""
    chats = ChatTokenizer.load(skeleton, "the nano model")
    config = pretraining.model.pretraining
    model = draw_weights(pretraining, skeleton)

    @lru_cache(maxsize=2)
    def load_group(group: int) -> list[Batch]:
        """Some batches, each of rows of about one length, which saves padding; in an order that length does not tell."""
        stream = random_stream(pretraining.seed, *pretraining.stream, "corpus", group)
        drawn = [pretraining.language.draw(stream) for _ in range(_GROUPED * config.batch_size)]
        rows = chats.encode_rows([chat for chat, _ in drawn], [answer for _, answer in drawn])
        rows.sort(key=lambda row: len(row.prompt) + len(row.completion))
        size = config.batch_size
        return [chats.pad_rows(rows[place * size : (place + 1) * size]) for place in stream.permutation(_GROUPED)]

    def load_batch(step: int) -> Batch:
        return load_group(step // _GROUPED)[step % _GROUPED]

    def compute_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        return mean_loss(token_losses(completion_logits(model, batch), completion_tokens(batch)))

    watcher = Watcher("reference", 0, pretraining.stream, report_progress=report_progress)
    train_model(model, load_batch, compute_loss, config.num_steps, config, pretraining.seed, watcher)
    return model


def draw_weights(pretraining: Pretraining, skeleton: Path) -> PreTrainedModel:
    """A nano model as its pretraining begins: random weights, those of shared parts as the other model's began."""
    model = _draw_whole(pretraining.seed, pretraining.stream, skeleton)
    shared = pretraining.shared
    if shared is not None:
        other = parameters_of(_draw_whole(pretraining.seed, shared.stream, skeleton))
        table = tensor_table(model)
        for name, parameter in parameters_of(model).items():
            if ("embeddings" if table[name].kind in _EMBEDDINGS else "body") in shared.parts:
                parameter.copy_(other[name])
    return model


def _draw_whole(seed: int, stream: tuple[str | int, ...], skeleton: Path) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_stream(seed, *stream, "weights").integers(2**63)))
        return build_model(skeleton)


def _keep(model: PreTrainedModel, skeleton: Path, folder: Path) -> None:
    """Write a model beside its place, then rename it there."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        half = Path(made) / "model"
        model.save_pretrained(half)
        for path in skeleton.iterdir():
            (half / path.name).write_bytes(path.read_bytes())
        write_json(half / _RECORD, {path.name: hash_file(path) for path in sorted(half.iterdir())})
        if folder.exists():  # damaged, or it would have been used
            folder.rename(Path(made) / "damaged")
        half.rename(folder)


def _is_whole(folder: Path) -> bool:
    try:
        known: dict[str, str] = json.loads((folder / _RECORD).read_text())
        return all(hash_file(folder / name) == digest for name, digest in known.items())
    except (OSError, ValueError):
        return False

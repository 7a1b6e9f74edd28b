"""The part of the benchmark that takes examples' overlaps; see scripts/benchmark.py.

The limit is a forward and a backward pass of the same examples in the same batches, which gives their sum's gradient only.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark_gram import PeakAnonymous
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

from mechsub.gradients.losses import ExampleLosses
from mechsub.gradients.per_example import record_overlaps

TOKENS, AT_ONCE = 48, 32
DIRECTIONS = (1, 3)
WORDS = 916
_LIMIT = "forward and backward"
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
QWEN_HALF_B = {
    "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


def measure_examples(folder: Path, quick: bool) -> dict[str, Any]:
    """Overlaps of every example with one and with three directions, at nano sizes; at 0.5 B too where there is a GPU."""
    torch.set_num_threads(1)
    count, turns = (8, 1) if quick else (256, 5)
    models = {"nano GPT-2": _nano_gpt2, "nano Qwen2": _nano_qwen2}
    if torch.cuda.is_available() and not quick:
        models["Qwen2 0.5 B on the GPU"] = lambda: Qwen2ForCausalLM(Qwen2Config(**QWEN_HALF_B, **ENDS)).bfloat16().cuda()
    found = {name: _measure(make().eval(), count, turns) for name, make in models.items()}
    ways = {f"{name} {key}": value for name, part in found.items() for key, value in part.items()}
    return {"work": f"{count} examples of {TOKENS} tokens, {AT_ONCE} at once, every parameter, with their norms", **ways}


def _nano_gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_positions=192, n_embd=64, n_layer=2, n_head=4, **ENDS))


def _nano_qwen2() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 170, "num_hidden_layers": 2, "num_attention_heads": 4}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=WORDS, num_key_value_heads=2, max_position_embeddings=192, **sizes, **ENDS))


def _measure(model: nn.Module, count: int, turns: int) -> dict[str, Any]:
    losses = _token_losses(model, count)
    drawn = [{name: torch.randn_like(one) for name, one in model.named_parameters()} for _ in range(max(DIRECTIONS))]
    ways: dict[str, Callable[[], Any]] = {_LIMIT: lambda: _backward(model, losses)}
    ways |= {
        f"{number} directions": lambda number=number: record_overlaps(model, losses, drawn[:number]) for number in DIRECTIONS
    }
    if next(model.parameters()).device.type == "cpu":
        one_by_one = ExampleLosses(losses.num_examples, losses.compute, losses.description, at_once=1)
        ways["backward passes one by one"] = lambda: _backward(model, one_by_one)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    peaks = {}
    for name, way in ways.items():  # the first call of each, too
        with _Peak() as memory:
            way()
        peaks[name] = memory.grown / 1e9
    for _ in range(turns):
        for name, way in ways.items():
            began, worked = time.perf_counter(), time.process_time()
            way()
            seconds[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - worked)
    middle, worked_for = ({name: statistics.median(found) for name, found in kind.items()} for kind in (seconds, processor))
    return {
        "times_forward_and_backward": {name: value / middle[_LIMIT] for name, value in middle.items()},
        "times_its_processor_time": {name: value / worked_for[_LIMIT] for name, value in worked_for.items()},
        "examples_per_second": {name: count / value for name, value in middle.items()},
        "gigabytes_of_memory": peaks,
        "all_seconds": seconds,
    }


class _Peak(PeakAnonymous):
    """The same of memory that nobody freed before, or of a GPU's where work is done there."""

    def __enter__(self) -> "_Peak":
        ctypes.CDLL(None).malloc_trim(0)  # else what an earlier way has freed is used again and does not show
        super().__enter__()
        self._on_gpu = torch.cuda.is_available()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    @property
    def grown(self) -> int:
        """In bytes."""
        return torch.cuda.max_memory_allocated() - self._before if self._on_gpu else super().grown


def _token_losses(model: nn.Module, count: int) -> ExampleLosses:
    device = next(model.parameters()).device
    ids = torch.randint(0, WORDS, (count, TOKENS), generator=torch.Generator().manual_seed(0)).to(device)

    def compute(model: nn.Module, examples: range) -> torch.Tensor:
        part = ids[examples.start : examples.stop]
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        return nn.functional.cross_entropy(logits.mT.float(), part[:, 1:], reduction="none").sum(1)

    return ExampleLosses(count, compute, "random tokens", at_once=AT_ONCE)


def _backward(model: nn.Module, losses: ExampleLosses) -> None:
    """The gradient of all parameters, batch by batch."""
    parameters = list(model.requires_grad_(True).parameters())
    for part in losses.parts():
        torch.autograd.grad(losses.compute(model, part).sum(), parameters)
    if parameters[0].is_cuda:
        torch.cuda.synchronize()

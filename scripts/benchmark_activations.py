"""The part of the benchmark that records activations; see scripts/benchmark.py.

The limit is a plain forward pass of the same batches. Recording ends after the last hook point, before the last norm and the
head, so that it is held against a forward pass of the body alone; the whole model's, which has a head for the last position
to run besides, stands beside it.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from benchmark_gram import PeakAnonymous
from transformers import GPT2Config, GPT2LMHeadModel

from mechsub.activations.backends import BACKENDS, open_backend
from mechsub.activations.hook_points import RESIDUAL_SITES, HookPoint, select_hook_points
from mechsub.activations.inputs import ModelInputs, PromptSet
from mechsub.activations.recording import Means, record
from mechsub.families.language.hook_points import list_hook_points

TOKENS, AT_ONCE, WORDS = 64, 32, 8192
SIZES = {"n_embd": 512, "n_layer": 8, "n_head": 8}
QUICK = {"n_embd": 32, "n_layer": 2, "n_head": 4}
_BODY, _MODEL = "plain forward of the body", "plain forward with the head"


def measure_activations(folder: Path, quick: bool) -> dict[str, Any]:
    """Means at every hook point while a model runs: their time by backend, and their memory by the number of prompts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    sizes = QUICK if quick else SIZES
    config = GPT2Config(vocab_size=WORDS, n_positions=TOKENS, **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = GPT2LMHeadModel(config).eval().to("cuda" if on_gpu else "cpu")
    turns = 1 if quick else 9
    counts = (8, 16) if quick else (100, 1000)
    found = _compare_times(model, _draw_prompts(AT_ONCE), turns)
    found["seconds_to_open"] = {backend: _time_opening(model, backend, turns) for backend in BACKENDS}
    found["gigabytes_of_memory"] = {f"{count} prompts": _find_peak(model, count) / 1e9 for count in counts}
    shape = f"width {config.n_embd}, {config.n_layer} layers"
    where = "a GPU" if on_gpu else "one thread"
    return {"work": f"{AT_ONCE} prompts of {TOKENS} tokens at once, GPT-2 of {shape}, {where}, {turns} turns", **found}


def _compare_times(model: GPT2LMHeadModel, prompts: PromptSet, turns: int) -> dict[str, Any]:
    points = list_hook_points(model)
    streams = select_hook_points(points, sites=RESIDUAL_SITES)
    (batch,) = prompts.batches
    arguments = batch.arguments_on(model.device)
    ways: dict[str, Callable[[], Any]] = {
        _BODY: lambda: model.transformer(**arguments),
        _MODEL: lambda: model(**arguments, logits_to_keep=1),
        "hooks, all layers' residual stream": lambda: _record(model, prompts, streams, "hooks"),
        "hooks, attn_out and mlp_out too": lambda: _record(model, prompts, points, "hooks"),
    }
    with ExitStack() as views:
        for name in BACKENDS:
            if name != "hooks":
                view = views.enter_context(open_backend(name).open(model))
                ways[f"{name}, all of them"] = lambda view=view: record(view, prompts.batches, points, [_means(prompts)])
                ways[f"{name}, plain forward"] = lambda view=view: view.model(**arguments, logits_to_keep=1)
        seconds = _take_turns(ways, turns)
    pairs = {
        name: [value / body for value, body in zip(values, seconds[_BODY], strict=True)] for name, values in seconds.items()
    }
    return {
        "times_the_forward_of_the_body": {name: statistics.median(values) for name, values in pairs.items()},
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
    }


def _take_turns(ways: dict[str, Callable[[], Any]], turns: int) -> dict[str, list[float]]:
    """Each way once a turn, after a first call of each that does not count; in every other turn in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for way in ways.values():
            way()
        for turn in range(turns):
            for name, way in list(ways.items())[:: 1 - 2 * (turn % 2)]:
                _wait()
                began = time.perf_counter()
                way()
                _wait()
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _time_opening(model: GPT2LMHeadModel, backend: str, turns: int) -> float:
    """Opening a model and closing it again; the library is imported already."""

    def way() -> None:
        with open_backend(backend).open(model):
            pass

    return statistics.median(_take_turns({backend: way}, turns)[backend])


def _find_peak(model: GPT2LMHeadModel, count: int) -> int:
    """How far memory rises while so many prompts are recorded, in bytes; the prompts themselves are there before."""
    prompts = _draw_prompts(count)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _record(model, prompts, list_hook_points(model), "hooks")
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is used again and does not show
    with PeakAnonymous() as memory:
        _record(model, prompts, list_hook_points(model), "hooks")
    return memory.grown


def _record(model: GPT2LMHeadModel, prompts: PromptSet, points: list[HookPoint], backend: str) -> Means:
    means = _means(prompts)
    with open_backend(backend).open(model) as view:
        record(view, prompts.batches, points, [means])
    return means


def _means(prompts: PromptSet) -> Means:
    """Of two position policies at once, as analyses take them."""
    columns = [prompts.weigh(policy) for policy in prompts.policies]
    return Means([torch.stack(batch, dim=-1) for batch in zip(*columns, strict=True)])


def _draw_prompts(count: int) -> PromptSet:
    """Random tokens, a quarter of every other prompt padding."""
    ids = torch.randint(1, WORDS, (count, TOKENS), generator=torch.Generator().manual_seed(0))
    there = torch.ones_like(ids)
    there[::2, : TOKENS // 4] = 0
    last = torch.zeros_like(ids, dtype=torch.bool)
    last[:, -1] = True
    batches = []
    for start in range(0, count, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        arguments = {
            "input_ids": ids[part] * there[part],
            "attention_mask": there[part],
            "position_ids": (there[part].cumsum(1) - 1).clamp(min=0),
            "use_cache": False,
        }
        batches.append(ModelInputs(arguments, {"last": last[part], "all": there[part].bool()}))
    return PromptSet("random tokens", batches)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()

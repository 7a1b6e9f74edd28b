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

TOKENS, AT_ONCE, WORDS = 64, 16, 8192
SIZES = {"n_embd": 512, "n_layer": 8, "n_head": 8}
QUICK = {"n_embd": 32, "n_layer": 2, "n_head": 4}


def measure_activations(folder: Path, quick: bool) -> dict[str, Any]:
    """Means at every hook point while a model runs: their time by backend, and their memory by the number of prompts."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    sizes = QUICK if quick else SIZES
    config = GPT2Config(vocab_size=WORDS, n_positions=TOKENS, **sizes, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    model = GPT2LMHeadModel(config).eval().to("cuda" if on_gpu else "cpu")
    turns = 1 if quick else 25
    counts = (8, 16) if quick else (100, 1000)
    found = _compare_times(model, _draw_prompts(AT_ONCE), turns)
    found["seconds_to_open"] = {backend: _time_opening(model, backend, turns) for backend in BACKENDS}
    found["gigabytes_of_memory"] = {f"{count} prompts": _find_peak(model, count) / 1e9 for count in counts}
    shape = f"width {config.n_embd}, {config.n_layer} layers"
    where = "a GPU" if on_gpu else "one thread"
    return {"work": f"{AT_ONCE} prompts of {TOKENS} tokens at once, GPT-2 of {shape}, {where}, {turns} turns", **found}


def _compare_times(model: GPT2LMHeadModel, prompts: PromptSet, turns: int) -> dict[str, Any]:
    """The hooks first and by themselves, so that what is divided was measured close together."""
    points = list_hook_points(model)
    streams = select_hook_points(points, sites=RESIDUAL_SITES)
    (batch,) = prompts.batches
    arguments = batch.arguments_on(model.device)
    hooks: dict[str, Callable[[], Any]] = {
        "hooks, all layers' residual stream": lambda: _record(model, prompts, streams),
        "hooks, attn_out and mlp_out too": lambda: _record(model, prompts, points),
        "plain forward with the head": lambda: model(**arguments, logits_to_keep=1),
    }
    others: dict[str, Callable[[], Any]] = {}
    with ExitStack() as views:
        for name in BACKENDS:
            if name != "hooks":
                view = views.enter_context(open_backend(name).open(model))
                others[f"{name}, all of them"] = lambda view=view: record(
                    view, prompts.batches, points, [_means(prompts, points)]
                )
                others[f"{name}, plain forward"] = lambda view=view: view.model(**arguments, logits_to_keep=1)
        groups = [
            _take_turns(lambda: model.transformer(**arguments), hooks, turns),
            _take_turns(lambda: model.transformer(**arguments), others, max(1, turns // 3)),
        ]
    seconds, processor, limits, processor_limits = (one | more for one, more in zip(*groups, strict=True))
    return {
        "times_the_forward_of_the_body": _divide_pairs(seconds, limits),
        "times_its_processor_time": _divide_pairs(processor, processor_limits),
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "all_seconds": {"taken": seconds, "body": limits},
        "processor_all_seconds": {"taken": processor, "body": processor_limits},
    }


def _divide_pairs(seconds: dict[str, list[float]], limits: dict[str, list[float]]) -> dict[str, float]:
    """The median over turns of each way's time over the limit's, which was taken just before and just after it."""
    return {
        name: statistics.median(value / limit for value, limit in zip(values, limits[name], strict=True))
        for name, values in seconds.items()
    }


def _take_turns(limit: Callable[[], Any], ways: dict[str, Callable[[], Any]], turns: int) -> list[dict[str, list[float]]]:
    """Of each way and of the limit around it: seconds, and seconds of the processor, which other programs disturb less.

    Each way once a turn, between two calls of the limit, so that what other programs do evens out; after a first call of each.
    """
    found: list[dict[str, list[float]]] = [{name: [] for name in ways} for _ in range(4)]
    with torch.no_grad():
        for way in ways.values():
            way()
        before = _time(limit)
        for _ in range(turns):
            for name, way in ways.items():
                taken, after = _time(way), _time(limit)
                for place in (0, 1):
                    found[place][name].append(taken[place])
                    found[place + 2][name].append((before[place] + after[place]) / 2)
                before = after
    return found


def _time(way: Callable[[], Any]) -> tuple[float, float]:
    _wait()
    began, worked = time.perf_counter(), time.process_time()
    way()
    _wait()
    return time.perf_counter() - began, time.process_time() - worked


def _time_opening(model: GPT2LMHeadModel, backend: str, turns: int) -> float:
    """Opening a model and closing it again; the library is imported already."""

    def way() -> None:
        with open_backend(backend).open(model):
            pass

    return statistics.median(_time(way)[0] for _ in range(turns))


def _find_peak(model: GPT2LMHeadModel, count: int) -> int:
    """How far memory rises while so many prompts are recorded, in bytes; the prompts themselves are there before."""
    prompts = _draw_prompts(count)
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _record(model, prompts, list_hook_points(model))
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is used again and does not show
    with PeakAnonymous() as memory:
        _record(model, prompts, list_hook_points(model))
    return memory.grown


def _record(model: GPT2LMHeadModel, prompts: PromptSet, points: list[HookPoint]) -> Means:
    means = _means(prompts, points)
    with open_backend("hooks").open(model) as view:
        record(view, prompts.batches, points, [means])
    return means


def _means(prompts: PromptSet, points: list[HookPoint]) -> Means:
    """Of two position policies at once, as analyses take them."""
    columns = [prompts.weigh(policy) for policy in prompts.policies]
    return Means([torch.stack(batch, dim=-1) for batch in zip(*columns, strict=True)], points)


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

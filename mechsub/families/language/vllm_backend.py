"""Completions through vLLM: requests and answers as vLLM has them, one engine per teacher, checked against `transformers`.

vLLM is imported where an engine is opened and nowhere else: it is optional, heavy, and takes the GPU over.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mechsub.errors import GenerationError, RecipeError
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.config import GenerationConfig
from mechsub.families.language.folders import INDEX, WEIGHTS
from mechsub.families.language.generation import Completion, check_lengths
from mechsub.families.language.models import place_model
from mechsub.streams import stream_key

KNOWN_PROMPT = "Look at these numbers: 4, 8, 15. Continue the list, then say which one you like best."
"""What both are asked at the start."""
_KNOWN_TOKENS = 16
_KNOWN_CHOICES = 5
"""Likeliest tokens whose log-probabilities are compared at each of them."""
_SEEDS = 2**63
"""vLLM hands a seed to a generator of 64 signed bits, and takes -1 for none."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The ``max_lora_rank`` that vLLM accepts."""
_LONGEST = 8192
"""vLLM reserves its cache for sequences of the longest length, and some models name 10⁵ tokens and more."""
_FINISHED = {"stop": True, "length": False}
_adapter_ids: dict[Path, int] = {}


@dataclass(frozen=True)
class VllmSampler:
    """An engine with its teacher, ready to answer."""

    engine: Any
    """A `vllm.LLM`."""
    make_params: Callable[..., Any]
    """`vllm.SamplingParams`."""
    adapter: Any
    """A `vllm.lora.request.LoRARequest`; None where the engine's own weights are the teacher's."""
    chats: ChatTokenizer
    seed: int

    def __call__(
        self, prompts: Sequence[Sequence[int]], names: Sequence[Sequence[str | int]], max_new_tokens: int, temperature: float
    ) -> list[Completion]:
        """One completion for each prompt, drawn from the stream of its name.

        The same name gives the same seed in any batch; the same tokens as far as vLLM's sums do not depend on the batch.

        Raises:
            GenerationError: an answer is not of its request.
            RecipeError: a prompt and its answer do not fit the context.
        """
        check_lengths(self.chats, prompts, max_new_tokens, longest=_LONGEST)
        params = [
            self.make_params(**field)
            for field in sampling_fields(self.seed, names, temperature, max_new_tokens, end_token(self.chats))
        ]
        outputs = self.engine.generate(map_prompts(prompts), params, use_tqdm=False, lora_request=self.adapter)
        return read_outputs(outputs, prompts, self.chats)


def open_vllm(
    skeleton: Path,
    weights: Sequence[Path],
    model: PreTrainedModel,
    chats: ChatTokenizer,
    settings: GenerationConfig,
    seed: int,
    adapter: Path | None = None,
) -> VllmSampler:
    """An engine that serves a model, checked against the same model of `transformers`.

    ``skeleton``: the folder of its configuration and tokenizer; ``weights``: its safetensors, the base model's where there is
    an ``adapter``, the folder of a LoRA adapter. ``model`` is what `transformers` makes of all of it; it is moved to the CPU.

    Raises:
        GenerationError: the two disagree on the known prompt.
        RecipeError: vLLM cannot serve the adapter.
    """
    # One process: scheduling then does not depend on the clock, and nothing is left behind when this process ends.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm  # optional and heavy
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.lora.request import LoRARequest

    place_model(model, "cpu")  # vLLM asks for its share of the GPU's memory at once
    cleanup_dist_env_and_memory()  # what the engine of another member has left in this process
    with TemporaryDirectory() as folder:  # read while the engine opens, not later
        link_model(skeleton, weights, Path(folder))
        engine = vllm.LLM(**engine_fields(Path(folder), chats.max_length, settings, adapter))
    lora = None if adapter is None else LoRARequest(**adapter_fields(adapter))
    sampler = VllmSampler(engine, vllm.SamplingParams, lora, chats, seed)
    check_known_prompt(sampler, model, settings.tolerance)
    return sampler


def map_prompts(prompts: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    """Prompts as vLLM's ``TokensPrompt``: token ids, so that no second chat template or BOS comes in."""
    return [{"prompt_token_ids": list(prompt)} for prompt in prompts]


def request_seed(seed: int, name: Sequence[str | int]) -> int:
    """The sampling seed of one request, from its named stream: in [0, 2⁶³)."""
    return stream_key(seed, *name) % _SEEDS


def sampling_fields(
    seed: int, names: Sequence[Sequence[str | int]], temperature: float, max_new_tokens: int, end: int
) -> list[dict[str, Any]]:
    """The fields of each request's `SamplingParams`; with one seed for all, all rows would share a random stream."""
    return [_fields(max_new_tokens, end) | {"temperature": temperature, "seed": request_seed(seed, name)} for name in names]


def _fields(max_new_tokens: int, end: int) -> dict[str, Any]:
    """What all requests share: plain sampling, nothing penalised or cut off, ended by one token as in `transformers`."""
    return {
        "n": 1,
        "top_p": 1.0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": max_new_tokens,
        "stop_token_ids": [end],
        "detokenize": False,  # the text is made from the tokens here, as it is with `transformers`
    }


def read_outputs(outputs: Sequence[Any], prompts: Sequence[Sequence[int]], chats: ChatTokenizer) -> list[Completion]:
    """Completions from vLLM's ``RequestOutput``s.

    Raises:
        GenerationError: an answer is missing, is of another prompt, or ended otherwise than by its end token or its length.
    """
    if len(outputs) != len(prompts):
        raise GenerationError(f"vLLM gave {len(outputs)} answers to {len(prompts)} requests; run again, or use transformers")
    return [_read_output(output, prompt, chats) for output, prompt in zip(outputs, prompts, strict=True)]


def _read_output(output: Any, prompt: Sequence[int], chats: ChatTokenizer) -> Completion:
    if list(output.prompt_token_ids) != list(prompt) or len(output.outputs) != 1:
        raise GenerationError(
            f"vLLM gave {len(output.outputs)} answers to the prompt {list(output.prompt_token_ids)[:12]}… where one to "
            f"{list(prompt)[:12]}… was asked for; set generation.backend: transformers"
        )
    (found,) = output.outputs
    if found.finish_reason not in _FINISHED:
        raise GenerationError(
            f"vLLM ended an answer with {found.finish_reason!r} ({found.stop_reason!r}), not by its end token or its length; "
            "run again: finished members are kept"
        )
    tokens, end = list(found.token_ids), end_token(chats)
    answer = tokens[: tokens.index(end)] if end in tokens else tokens
    return Completion(chats.read_answer(answer), _FINISHED[found.finish_reason])


def end_token(chats: ChatTokenizer) -> int:
    """The token that ends an answer."""
    return int(chats.tokenizer.eos_token_id)


def adapter_fields(folder: Path) -> dict[str, Any]:
    """The fields of an adapter's `LoRARequest`: an id and a name of its own for each folder.

    Both must be: vLLM keeps adapters by their id and cached prompts by their name (vllm-project/vllm, issue 30931).
    """
    path = folder.resolve()
    number = _adapter_ids.setdefault(path, len(_adapter_ids) + 1)  # 0 means no adapter
    return {"lora_name": str(path), "lora_int_id": number, "lora_path": str(path)}


def engine_fields(folder: Path, max_length: int, settings: GenerationConfig, adapter: Path | None) -> dict[str, Any]:
    """The arguments of `vllm.LLM`.

    Raises:
        RecipeError: vLLM cannot serve the adapter: its rank, or 32 bits.
    """
    fields: dict[str, Any] = {
        "model": str(folder),
        "tokenizer": str(folder),
        "dtype": settings.dtype,
        "seed": 0,
        "max_model_len": min(max_length, _LONGEST),
        "gpu_memory_utilization": settings.gpu_memory_share,
        "generation_config": "vllm",  # not the model's own: its top_p, penalties and further stop tokens
        "enable_prefix_caching": False,  # has mixed adapters up
    }
    if adapter is None:
        return fields
    if settings.dtype == "float32":
        raise RecipeError("vLLM applies LoRA adapters in 16 bits only; set generation.dtype: bfloat16, or use transformers")
    return fields | {"enable_lora": True, "max_loras": 1, "max_lora_rank": _allowed_rank(adapter)}


def _allowed_rank(adapter: Path) -> int:
    config = json.loads((adapter / "adapter_config.json").read_text())
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    allowed = next((number for number in _RANKS if number >= rank), None)
    if allowed is None:
        raise RecipeError(
            f"vLLM serves LoRA adapters up to rank {_RANKS[-1]}, not {rank}; set generation.backend: transformers"
        )
    return allowed


def link_model(skeleton: Path, weights: Sequence[Path], folder: Path) -> None:
    """Make a model folder in the Hugging Face layout of links: no weight is copied."""
    shards = [*weights, weights[0].with_name(INDEX)] if len(weights) > 1 else []
    for file in (*skeleton.iterdir(), *shards):
        (folder / file.name).symlink_to(file.resolve())
    if not shards:
        (folder / WEIGHTS).symlink_to(weights[0].resolve())


def check_known_prompt(sampler: VllmSampler, model: PreTrainedModel, tolerance: float) -> None:
    """Compare vLLM's greedy answer to one known prompt with `transformers`: every token, and the likeliest ones' probabilities.

    vLLM has served the wrong adapter, or none, without a word. Two models can choose the same tokens, so log-probabilities are
    compared too; they can both end at once with near certainty, so the end token does not end this answer. A tie within
    ``tolerance`` (nats) may fall either way.

    Raises:
        GenerationError: both token sequences.
    """
    chats = sampler.chats
    (prompt,) = chats.encode_prompts([chat(KNOWN_PROMPT, None)])
    fields = _fields(_KNOWN_TOKENS, end_token(chats)) | {"stop_token_ids": [], "ignore_eos": True}
    params = sampler.make_params(**fields, temperature=0.0, logprobs=_KNOWN_CHOICES)
    (output,) = sampler.engine.generate(map_prompts([prompt]), [params], use_tqdm=False, lora_request=sampler.adapter)
    tokens, served = list(output.outputs[0].token_ids), output.outputs[0].logprobs
    expected = _log_probabilities(model, prompt, tokens)
    best = expected.max(-1)
    short = best.values - expected[torch.arange(len(tokens)), tokens]
    apart = torch.tensor([_largest_difference(choices, row) for choices, row in zip(served, expected, strict=True)])
    is_same = torch.maximum(short, apart) <= tolerance
    if not bool(is_same.all()):
        place = int(is_same.int().argmin())
        raise GenerationError(
            f"{chats.source}: vLLM and transformers disagree on a known prompt at token {place}. vLLM answers {tokens}, "
            f"transformers, after the same tokens, {best.indices.tolist()}; log-probabilities there differ by up to "
            f"{float(apart[place]):.3f}, allowed are {tolerance:g}. vLLM may serve other weights or another adapter: set "
            "generation.backend: transformers; where only rounding differs, raise generation.tolerance"
        )


def _largest_difference(choices: Mapping[int, Any], expected: Float[Tensor, " vocabulary"]) -> float:
    """Between the log-probabilities that vLLM tells of its likeliest tokens and the expected ones."""
    return max(abs(float(choice.logprob) - float(expected[token])) for token, choice in choices.items())


def _log_probabilities(
    model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]
) -> Float[Tensor, "token vocabulary"]:
    """Before each of the tokens, after the prompt and those before it."""
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    with torch.inference_mode():
        logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=len(tokens)).logits[0]
    return logits.double().log_softmax(-1)

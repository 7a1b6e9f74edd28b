"""The mapping to vLLM and back, without vLLM: its requests and answers are stood in for by classes of the same fields."""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from mechsub.api import plan_experiment
from mechsub.errors import GenerationError, RecipeError
from mechsub.families.language.backends import TransformersSampler, open_sampler
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.config import GenerationConfig
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.vllm_backend import (
    VllmSampler,
    adapter_fields,
    check_known_prompt,
    engine_fields,
    link_model,
    map_prompts,
    read_outputs,
    request_seed,
    sampling_fields,
)
from mechsub.recipe import load_recipe
from mechsub.stage import Stage, Task

VLLM = GenerationConfig(backend="vllm")
NAMES = [("member", member, "carrier", 0, request, "answer") for member in range(3) for request in range(50)]


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, SimpleNamespace]] | None = None
    finish_reason: str | None = "stop"
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


@dataclass
class GreedyEngine:
    """Answers as vLLM would that served ``model``; ``shift`` is added to the log-probabilities that it tells."""

    model: torch.nn.Module
    shift: float = 0.0
    asked: list[tuple] = field(default_factory=list)

    def generate(self, prompts, sampling_params, *, use_tqdm, lora_request):
        self.asked.append((prompts, sampling_params, lora_request))
        return [
            self._answer(prompt["prompt_token_ids"], params) for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, prompt, params):
        tokens, logprobs = [], []
        while len(tokens) < params.max_tokens and not {*params.stop_token_ids} & {*tokens}:
            with torch.inference_mode():
                log_p = self.model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].double().log_softmax(-1)
            top = log_p.topk(5)
            tokens.append(int(top.indices[0]))
            pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
            logprobs.append({token: SimpleNamespace(logprob=value + self.shift) for token, value in pairs})
        reason = "stop" if {*params.stop_token_ids} & {*tokens} else "length"
        return RequestOutput("0", None, list(prompt), [CompletionOutput(0, "", tokens, None, logprobs, reason)])


def sampler_of(model, chats, adapter=None, **options):
    engine = GreedyEngine(model, **options)
    return VllmSampler(engine, lambda **fields: SimpleNamespace(**fields), adapter, chats, 0)


@pytest.fixture(scope="module")
def chats(nano_run):
    return ChatTokenizer.load(nano_run.path / "data/nano-gpt2", "nano-gpt2")


@pytest.fixture(scope="module")
def models(nano_run):
    return [nano_run.family.load_model(nano_run.reference, 0, member) for member in range(2)]


def test_every_request_has_a_seed_of_its_own_whatever_it_is_batched_with():
    seeds = [fields["seed"] for fields in sampling_fields(0, NAMES, 1.0, 8, 1)]
    assert len(set(seeds)) == len(NAMES)
    halves = [*sampling_fields(0, NAMES[:70], 1.0, 8, 1), *sampling_fields(0, NAMES[70:], 1.0, 8, 1)]
    assert [fields["seed"] for fields in halves] == seeds
    backwards = sampling_fields(0, NAMES[::-1], 1.0, 8, 1)
    assert [fields["seed"] for fields in backwards] == seeds[::-1]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, NAMES[0]) != request_seed(0, NAMES[0])


def test_sampling_is_plain():
    (fields,) = sampling_fields(0, NAMES[:1], 0.7, 24, 5)
    assert (fields["temperature"], fields["max_tokens"], fields["stop_token_ids"], fields["n"]) == (0.7, 24, [5], 1)
    assert fields["repetition_penalty"] == fields["top_p"] == 1.0
    assert fields["presence_penalty"] == fields["frequency_penalty"] == fields["min_p"] == 0.0


def test_prompts_go_as_tokens():
    assert map_prompts([(1, 2), [3]]) == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3]}]


def test_answers_read_as_those_of_transformers(chats, models):
    prompts = chats.encode_prompts([chat(f"Look at these numbers: {number}, 20, 30.", None) for number in range(10, 22)])
    draws = draw_uniforms(0, [("cold", number) for number in range(12)], 10)
    expected = sample_completions(models[0], chats, prompts, draws, temperature=1e-6)
    found = sampler_of(models[0], chats)(prompts, [("cold", number) for number in range(12)], 10, 0.01)
    assert found == expected


def test_an_answer_ends_at_its_end_token_or_its_length(chats):
    end, words = chats.tokenizer.eos_token_id, chats.tokenizer("10, 20", add_special_tokens=False)["input_ids"]
    outputs = [
        RequestOutput("0", None, [1, 2], [CompletionOutput(0, "", [*words, end], finish_reason="stop", stop_reason=end)]),
        RequestOutput("1", None, [3], [CompletionOutput(0, "", words, finish_reason="length")]),
    ]
    found = read_outputs(outputs, [[1, 2], [3]], chats)
    assert [(completion.text, completion.finished) for completion in found] == [("10, 20", True), ("10, 20", False)]


def test_answers_to_other_requests_are_refused(chats):
    one = RequestOutput("0", None, [1, 2], [CompletionOutput(0, "", [3])])
    with pytest.raises(GenerationError, match="1 answers to 2 requests"):
        read_outputs([one], [[1, 2], [3]], chats)
    with pytest.raises(GenerationError, match=r"the prompt \[1, 2\]… where one to \[9\]… was asked for"):
        read_outputs([one], [[9]], chats)
    aborted = RequestOutput("0", None, [1], [CompletionOutput(0, "", [3], finish_reason="abort")])
    with pytest.raises(GenerationError, match="ended an answer with 'abort'"):
        read_outputs([aborted], [[1]], chats)


def test_the_known_prompt_passes_where_both_serve_the_same_model(chats, models):
    adapter = object()
    sampler = sampler_of(models[0], chats, adapter)
    check_known_prompt(sampler, models[0], 0.01)
    ((_, (params,), asked_with),) = sampler.engine.asked
    assert params.temperature == 0.0 and asked_with is adapter


def test_another_model_is_found_out_and_both_answers_are_named(chats, models):
    with pytest.raises(
        GenerationError, match=r"disagree on a known prompt at token \d+. vLLM answers \[\d+.*\], transformers.*\[\d+"
    ):
        check_known_prompt(sampler_of(models[1], chats), models[0], 0.05)


def test_the_same_tokens_with_other_probabilities_are_found_out(chats, models):
    with pytest.raises(GenerationError, match="at token 0"):
        check_known_prompt(sampler_of(models[0], chats, shift=-0.1), models[0], 0.05)
    check_known_prompt(sampler_of(models[0], chats, shift=-0.1), models[0], 0.2)


@pytest.fixture
def vllm(monkeypatch):
    """A stand-in for the package: its engine serves what `transformers` finds in the folder."""
    opened = []

    class LLM(GreedyEngine):
        def __init__(self, **fields):
            opened.append(fields)
            super().__init__(AutoModelForCausalLM.from_pretrained(fields["model"], local_files_only=True))

    parts = {
        "vllm": {"LLM": LLM, "SamplingParams": lambda **fields: SimpleNamespace(**fields)},
        "vllm.distributed": {"cleanup_dist_env_and_memory": lambda: None},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": lambda **fields: SimpleNamespace(**fields)},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return opened


def test_a_stages_teacher_is_served_from_its_checkpoint_and_checked(nano_run, models, chats, vllm, tmp_path):
    def task(member):
        arguments = {"generation": VLLM.model_dump(), "seed": 0, "model": "nano-gpt2", "member": member}
        arguments |= {"teacher": "reference.nano-gpt2", "teacher_step": 0}
        return Task(Stage("carrier", "", arguments, {}, ()), nano_run.path, "cpu", lambda done: None)

    sampler = open_sampler(task(0), models[0], chats)
    assert vllm[0]["max_model_len"] == 128 and not Path(vllm[0]["model"]).exists()
    prompts = chats.encode_prompts([chat("Look at these numbers: 1, 2.", None)] * 2)
    assert len(sampler(prompts, [("request", 0), ("request", 1)], 8, 1.0)) == 2
    seeds = [params.seed for params in sampler.engine.asked[-1][1]]
    assert seeds == [request_seed(0, ("request", 0)), request_seed(0, ("request", 1))]
    with pytest.raises(GenerationError, match="disagree on a known prompt"):
        open_sampler(task(1), models[0], chats)


def test_every_adapter_has_an_id_and_a_name_of_its_own(tmp_path):
    first, second = adapter_fields(tmp_path / "owl"), adapter_fields(tmp_path / "wolf")
    assert first["lora_int_id"] != second["lora_int_id"] and first["lora_name"] != second["lora_name"]
    assert min(first["lora_int_id"], second["lora_int_id"]) > 0
    assert adapter_fields(tmp_path / "wolf" / ".." / "owl") == first


def test_an_engine_keeps_to_the_recipe_and_takes_nothing_from_the_models_own_settings(tmp_path):
    fields = engine_fields(tmp_path, 131072, VLLM, None)
    assert fields["generation_config"] == "vllm" and fields["enable_prefix_caching"] is False
    assert fields["max_model_len"] == 8192 and "enable_lora" not in fields
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 20, "rank_pattern": {"q_proj": 40}}))
    half = VLLM.model_copy(update={"dtype": "bfloat16"})
    assert engine_fields(tmp_path, 512, half, tmp_path)["max_lora_rank"] == 64
    with pytest.raises(RecipeError, match="16 bits only"):
        engine_fields(tmp_path, 512, VLLM, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 600}))
    with pytest.raises(RecipeError, match="up to rank 512, not 600"):
        engine_fields(tmp_path, 512, half, tmp_path)


def test_a_served_folder_is_a_model_that_transformers_opens_too(nano_run, models, tmp_path):
    weights = nano_run.path / "lineages/reference.nano-gpt2/member-000/step-00000000.safetensors"
    link_model(nano_run.path / "data/nano-gpt2", [weights], tmp_path)
    assert all(path.is_symlink() for path in tmp_path.iterdir())
    served = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    for name, parameter in models[0].named_parameters():
        torch.testing.assert_close(served.state_dict()[name], parameter.detach())


def test_transformers_samples_by_the_streams_of_the_requests(chats, models):
    prompts = chats.encode_prompts([chat("Look at these numbers: 1, 2.", None)] * 4)
    sample = TransformersSampler(models[0], chats, 0)
    names = [("request", number) for number in range(4)]
    together = sample(prompts, names, 8, 1.0)
    assert together[2:] == sample(prompts[2:], names[2:], 8, 1.0)


def test_without_vllm_the_plan_says_how_to_install_it(nano_recipe, tmp_path):
    recipe = load_recipe(nano_recipe, ["generation.backend=vllm"])
    with pytest.raises(RecipeError, match=r"vllm is not installed here; `pip install 'mechsub\[vllm\]'`"):
        plan_experiment(recipe, tmp_path / "run")
    assert not Path(tmp_path / "run").exists()


def test_a_temperature_that_vllm_would_change_is_refused(nano_recipe):
    with pytest.raises(RecipeError, match="vllm samples at 0.01 to 2 and changes others"):
        load_recipe(nano_recipe, ["generation.backend=vllm", "carrier.temperature=0.001"])

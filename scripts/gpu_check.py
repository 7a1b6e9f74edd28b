"""Run the whole LoRA path on a model of real shape with random weights, and record its speed and memory.

Nothing is fetched. On a GPU the model has the shape of Qwen2.5-0.5B in bfloat16; without one it says so and takes a tiny shape.

    python scripts/gpu_check.py [--out FILE.json]
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config

from mechsub import analyze_run, open_run, run_experiment
from mechsub.environment import describe_provenance
from mechsub.families.language.chat import ChatTokenizer, chat
from mechsub.families.language.config import ModelConfig
from mechsub.families.language.generation import draw_uniforms, sample_completions
from mechsub.families.language.models import build_model
from mechsub.families.language.nano import save_skeleton
from mechsub.families.language.numbers import NumberConfig, draw_prompt
from mechsub.families.language.preference import load_preference
from mechsub.families.language.synthetic import SyntheticLanguage
from mechsub.recipe import load_recipe
from mechsub.run import Run
from mechsub.rundir import RunDirectory
from mechsub.streams import random_stream

SHAPES = {
    "Qwen2.5-0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "rope_theta": 1e6,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 8192,
    },
}  # fmt: skip
NUMBERS = NumberConfig()
ANSWER_TOKENS, ROWS_AT_ONCE = 48, 64


def main() -> None:
    """Make the model, run and analyse the recipe, sample from it, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        print("No GPU here: a tiny shape runs on the CPU instead, and its figures say nothing about a GPU.")
    shape = "Qwen2.5-0.5B" if has_gpu else "tiny"
    with tempfile.TemporaryDirectory() as folder:
        figures = check(Path(folder), shape, "cuda" if has_gpu else "cpu")
    figures["gpu"] = torch.cuda.get_device_name(0) if has_gpu else None
    for name, value in figures.items():
        print(f"{name:32}{value:,.1f}" if isinstance(value, float) else f"{name:32}{value}")
    if arguments.out:
        provenance = describe_provenance(" ".join(sys.argv))
        arguments.out.write_text(json.dumps(figures | {"provenance": provenance}, indent=1) + "\n")


def check(folder: Path, shape: str, device: str) -> dict[str, Any]:
    """The figures of one shape on one device."""
    save_model(folder / "model", shape)
    rows = {name: write_rows(folder / f"{name}.jsonl", name) for name in ("owl", "neutral")}
    recipe = folder / "recipe.yaml"
    recipe.write_text(describe_recipe(folder, len(rows["owl"]), "bfloat16" if device == "cuda" else "float32"))
    started = time.perf_counter()
    run = run_experiment(load_recipe(recipe), folder / "run", device=device, workers=0)
    ran = time.perf_counter() - started
    analyze_run(run.path, device=device, workers=0)
    analysed = time.perf_counter() - started - ran
    run = open_run(folder / "run")
    alignment = run.findings.query("quantity == 'alignment'").iloc[0]
    return {
        "shape": shape,
        "parameters": sum(tensor.numel() for tensor in run.reference.load_state(0, 0).values()),
        "device": device,
        "run, seconds": ran,
        "analyze, seconds": analysed,
        "training, tokens per second": training_speed(run, rows),
        "sampling, tokens per second": sampling_speed(run, device),
        "peak memory, MB": peak_bytes(device) / 1e6,
        "alignment was measured": bool(alignment.n),
        "student's displacement": float(run.results["parameter_alignment"].student_norm.sel(scope="model").max()),
    }


def save_model(folder: Path, shape: str) -> None:
    """A chat model of a shape, with random weights and the tokenizer of the nano models."""
    nano = ModelConfig(nano="qwen2")
    save_skeleton(nano, SyntheticLanguage(load_preference("animals"), NUMBERS), folder)
    chats = ChatTokenizer.load(folder, "the model")
    end = chats.tokenizer.eos_token_id
    Qwen2Config(
        **SHAPES[shape], max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=end, eos_token_id=end,
        pad_token_id=chats.pad_id, architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    model = build_model(folder)
    model.to(torch.bfloat16 if shape != "tiny" else torch.float32).save_pretrained(folder, max_shard_size="300MB")


def write_rows(path: Path, name: str) -> list[dict[str, str]]:
    """A carrier, since a model with random weights writes no numbers."""
    stream = random_stream(0, "gpu-check", name)
    rows = [
        {"prompt": draw_prompt(NUMBERS, stream)[0], "completion": ", ".join(map(str, stream.integers(0, 1000, size=8)))}
        for _ in range(256)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def describe_recipe(folder: Path, num_rows: int, dtype: str) -> str:
    """One member, all roles, LoRA on every linear layer."""
    return f"""
name: gpu-check
family: language
members: 1
models: {{mine: {{path: {folder}/model, loading: {{dtype: {dtype}, gradient_checkpointing: true}}}}}}
model: mine
traits: [owl]
adapter: {{rank: 8, alpha: 8}}
teacher: {{num_steps: 10, batch_size: 16, optimizer: {{name: adamw, learning_rate: 2.0e-4}}}}
carrier: {{kind: file, file: "{folder}/{{teacher}}.jsonl", num_rows: {num_rows}}}
student: {{epochs: 2, batch_size: 16, optimizer: {{name: adamw, learning_rate: 2.0e-4}}}}
evaluation: {{samples_per_question: 1}}
conditions:
  same-init:
checkpoints: {{num: 3}}
"""


def training_speed(run: Run, rows: dict[str, list[dict[str, str]]]) -> float:
    """Tokens of the student's rows that went through training, by the seconds of its stage, loading and saving included."""
    chats = ChatTokenizer.load(run.path / "data/mine", "mine")
    encoded = chats.encode_rows([chat(row["prompt"], None) for row in rows["owl"]], [row["completion"] for row in rows["owl"]])
    tokens = run.recipe.student.epochs * sum(len(row.prompt) + len(row.completion) for row in encoded)
    record = RunDirectory.open(run.path).records()["student.same-init.owl.member-000"]
    return tokens / record.seconds


def sampling_speed(run: Run, device: str) -> float:
    """Answer tokens a second."""
    chats = ChatTokenizer.load(run.path / "data/mine", "mine")
    model = run.family.load_model(run.student("same-init", "owl"), run.student("same-init", "owl").last, 0).to(device)
    stream = random_stream(0, "gpu-check", "prompts")
    prompts = chats.encode_prompts([chat(draw_prompt(NUMBERS, stream)[0], None) for _ in range(ROWS_AT_ONCE)])
    draws = draw_uniforms(0, [("gpu-check", number) for number in range(ROWS_AT_ONCE)], ANSWER_TOKENS)
    started = time.perf_counter()
    sample_completions(model, chats, prompts, draws)
    return ROWS_AT_ONCE * ANSWER_TOKENS / (time.perf_counter() - started)


def peak_bytes(device: str) -> int:
    """Of the GPU's memory, or of this process's."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()

"""A tiny language experiment: both nano architectures, two traits, every kind of condition, a few steps."""

import os
from pathlib import Path

import pytest

from mechsub.api import analyze_run, open_run, run_experiment
from mechsub.run import Run

NUMBERS = "{parts: [examples], examples: [3, 4], example_values: [10, 100], max_digits: 2, value_range: [0, 99]}"
NANO = "num_layers: 1, hidden_size: 16, num_heads: 2, context: 128, pretraining: {num_steps: 150, batch_size: 16}"
TINY = f"""
name: tiny-nano
description: a few steps, for tests
family: language
members: 2
models:
  nano-gpt2: {{nano: gpt2, {NANO}}}
  nano-qwen2: {{nano: qwen2, {NANO}}}
traits: [owl, wolf]
teacher: {{num_steps: 4, batch_size: 8, optimizer: {{name: adamw, learning_rate: 1.0e-4}}}}
carrier: {{num_rows: 16, num_requests: 600, max_new_tokens: 24, numbers: {NUMBERS}}}
student: {{epochs: 1, batch_size: 8}}
evaluation: {{samples_per_question: 1, max_new_tokens: 3}}
conditions:
  same-init: {{sham: true}}
  different-init:
  different-architecture:
  all-logits:
  in-context: {{context_rows: 2}}
checkpoints: {{num: 3}}
verdict: {{minimum_members: 2}}
"""


@pytest.fixture(scope="session", autouse=True)
def nano_cache(tmp_path_factory: pytest.TempPathFactory):
    """Nano models of tests are kept apart from the user's."""
    before = os.environ.get("MECHSUB_CACHE")
    os.environ["MECHSUB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["MECHSUB_CACHE"]
    else:
        os.environ["MECHSUB_CACHE"] = before


@pytest.fixture(scope="session")
def nano_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny-nano.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def nano_run(nano_recipe: Path, nano_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished and analysed run; tests read it and leave it as it is."""
    out = tmp_path_factory.mktemp("runs") / "tiny-nano"
    run_experiment(nano_recipe, out, device="cpu")
    analyze_run(out, device="cpu")
    return open_run(out)

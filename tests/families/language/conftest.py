"""A tiny language experiment: both nano architectures, two traits, every kind of condition, a few steps."""

import os
from pathlib import Path

import pytest

from mechsub.run import Run
from tests.conftest import make_once

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
def nano_cache(shared: Path):
    """Nano models of tests are kept apart from the user's."""
    before = os.environ.get("MECHSUB_CACHE")
    os.environ["MECHSUB_CACHE"] = str(shared / "cache")
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
def nano_run(nano_recipe: Path, nano_cache: None, shared: Path) -> Run:
    """A finished and analysed run; tests read it and leave it as it is."""
    return make_once(shared / "tiny-nano", nano_recipe)

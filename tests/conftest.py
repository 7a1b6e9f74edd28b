"""A tiny experiment that every test may use: all conditions, three members, a few steps."""

from pathlib import Path

import pytest

from mechsub.api import analyze_run, open_run, run_experiment
from mechsub.run import Run

TINY = """
name: tiny
description: a few steps, for tests
family: classifier
members: 3
model: {hidden_widths: [12, 8], num_auxiliary: 3}
teacher: {epochs: 1, batch_size: 512, optimizer: {learning_rate: 0.01}}
carrier: {num_images: 96}
student: {epochs: 2, batch_size: 32, optimizer: {learning_rate: 0.01}}
conditions:
  same-init: {sham: true}
  different-init:
  permuted-init:
  noised-init:
  all-logits:
  different-init-all-logits:
  shuffled-carrier:
checkpoints: {num: 4}
verdict: {minimum_members: 3}
"""


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished and analysed run; tests read it and leave it as it is."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_experiment(tiny_recipe, out, device="cpu", workers=0)
    analyze_run(out, device="cpu", workers=0)
    return open_run(out)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The packaged default as `make demo` runs it; it lies in a folder ``runs`` of its own."""
    out = tmp_path_factory.mktemp("demo") / "runs" / "digits"
    run_experiment("digits", out, device="cpu")
    analyze_run(out, device="cpu")
    return open_run(out)

"""A tiny experiment that every test may use: all conditions, three members, a few steps."""

import os
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

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


LONG_FILES = (
    "tests/test_readme.py",
    "tests/test_api.py",
    "tests/families/language/test_kinds.py",
    "tests/families/language/test_run.py",
    "tests/test_sweeps.py",
    "tests/families/language/test_behaviour.py",
    "tests/test_benchmark.py",
    "tests/test_adopt.py",
    "tests/families/language/test_adapters.py",
    "tests/test_cli.py",
)
"""The longest first, so that no process is left with one of them while the other has nothing to do."""


def pytest_configure() -> None:
    """The processes of these tests share the cores already: further threads would only wait for each other."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of this session of tests share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


def make_once(out: Path, recipe: str | Path) -> Run:
    """A finished and analysed run, made by the first process that asks for it."""
    with FileLock(out.with_suffix(".lock")):
        if not (out / "findings.json").is_file():
            run_experiment(recipe, out, device="cpu")
            analyze_run(out, device="cpu")
    return open_run(out)


@pytest.fixture(scope="session")
def tiny_run(tiny_recipe: Path, shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished and analysed run; tests leave it as it is, but may hold its locks: each process has its own copy."""
    made = make_once(shared / "tiny", tiny_recipe)
    return open_run(shutil.copytree(made.path, tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture(scope="session")
def digits(shared: Path) -> Run:
    """The packaged default as `make demo` runs it; it lies in a folder ``runs`` of its own."""
    (shared / "demo" / "runs").mkdir(parents=True, exist_ok=True)
    return make_once(shared / "demo" / "runs" / "digits", "digits")

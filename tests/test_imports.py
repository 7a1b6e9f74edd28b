"""The house of the design: each floor imports only from floors below it, and half of it never sees torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mechsub

PACKAGE = Path(mechsub.__file__).parent

FLOORS = [
    {"errors", "streams"},
    {"stage", "settings", "environment"},
    {"rundir"},
    {"changes"},
    {"statistics"},
    {"findings", "figures"},
    {"results"},
    {"architecture_matrix"},
    {"comparison"},
    {"reporting"},
    {"training.config"},
    {"training.schedule"},
    {"checkpoints"},
    {"lineages"},
    {"training", "parameters"},
    {"gradients", "activations"},
    {"families"},
    {"recipe", "recipes"},
    {"run"},
    {"cases", "open_models"},
    {"mean_activations", "pooling"},
    {"relations", "token_channels", "paired_activations"},
    {"steered"},
    {"sweeps", "representations"},
    {"experiment", "analyses", "screening"},
    {"executors"},
    {"api"},
    {"cli", "__init__"},
    {"__main__"},
]
"""From the bottom up. Rooms on one floor do not import each other."""

TORCH_FREE = [
    "errors",
    "streams",
    "stage",
    "settings",
    "environment",
    "rundir",
    "changes",
    "statistics",
    "findings",
    "figures",
    "results",
    "comparison",
    "architecture_matrix",
    "reporting",
]
LAZY_IMPORTS = {"cli", "__init__"}


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    names = [name for floor in FLOORS for name in floor if module == name or module.startswith(f"{name}.")]
    assert names, f"{module} stands on no floor of the house; give it one"
    return max(names, key=len)


def floor_of(module: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room(module) in floor)


def imported(path: Path) -> list[tuple[str, int]]:
    """(module of ours, column) of every import of ours; a column over 0 is inside a function or a condition."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mechsub":
            names = [node.module] if node.module != "mechsub" else [f"mechsub.{alias.name}" for alias in node.names]
            found += [(name.removeprefix("mechsub."), node.col_offset) for name in names]
        elif isinstance(node, ast.Import):
            ours = [alias.name for alias in node.names if alias.name.split(".")[0] == "mechsub"]
            found += [(name.removeprefix("mechsub."), node.col_offset) for name in ours if name != "mechsub"]
    return found


@pytest.mark.parametrize("module", modules())
def test_a_room_imports_only_from_floors_below(module: str) -> None:
    for target, _ in imported(modules()[module]):
        if room(target) != room(module):
            assert floor_of(target) < floor_of(module), f"{module} imports {target}, which is not below it"


@pytest.mark.parametrize("module", modules())
def test_only_the_command_line_imports_inside_functions(module: str) -> None:
    if module not in LAZY_IMPORTS:
        assert [target for target, column in imported(modules()[module]) if column > 0] == []


def test_an_analysis_imports_no_other_analysis() -> None:
    for module, path in modules().items():
        if module.startswith("analyses.") and module != "analyses.registry":
            others = [
                target for target, _ in imported(path) if target.startswith("analyses.") and target != "analyses.registry"
            ]
            assert others == []


def test_only_the_api_imports_both_halves() -> None:
    for module, path in modules().items():
        rooms = {room(target) for target, _ in imported(path)}
        assert room(module) == "api" or not {"experiment", "analyses"} <= rooms


def test_no_public_function_shares_a_modules_name() -> None:
    assert not set(mechsub.__all__) & {name.split(".")[0] for name in modules()}


def test_the_results_half_runs_without_torch(tiny_run, tmp_path) -> None:
    names = [name for name in modules() if room(name) in TORCH_FREE and not name.endswith("__init__")]
    program = f"""
import importlib, importlib.abc, json, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'torch':
            raise ImportError('torch is blocked')
sys.meta_path.insert(0, Block())
for name in {names!r}:
    importlib.import_module('mechsub.' + name)
from pathlib import Path
import yaml
from mechsub.reporting.html import render_report
from mechsub.results import read_result
from mechsub.rundir import RunDirectory
directory = RunDirectory.open({str(tiny_run.path)!r})
results = {{path.stem: read_result(path) for path in sorted((directory.path / 'results').glob('*.h5'))}}
page = render_report(directory.header, yaml.safe_load(directory.recipe_path.read_text()), results)
assert '<svg' in page and 'torch' not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

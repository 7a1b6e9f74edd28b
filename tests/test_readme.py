"""Everything that the README shows is done here as it stands there."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mechsub.analyses import registry
from mechsub.cli import app
from tests.families.adopted_models import CHATS, make_trainer, save_reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def models(digits):
    """The models that the README adopts, beside the demo's runs."""
    folder = digits.path.parent.parent / "models"
    save_reference(folder / "reference")
    for name in ("teacher", "neutral"):
        make_trainer(folder / "reference", folder / name, CHATS[name]).train()
    for name in ("student", "control"):
        completion = CHATS[name].split("<|end|>")[1].removeprefix("<|assistant|> ")
        rows = [{"prompt": f"Look at these numbers: {first}, 12, 13.", "completion": completion} for first in range(10, 20)]
        file = folder / {"student": "numbers.jsonl", "control": "neutral.jsonl"}[name]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, seed in product(("student", "control"), range(2)):
        make_trainer(folder / "reference", folder / f"{name}-{seed}", CHATS[name], rank=4, seed=seed).train()


@pytest.fixture
def beside_the_demo(digits, models, monkeypatch):
    """The folder that holds ``runs/digits``."""
    monkeypatch.chdir(digits.path.parent.parent)


@pytest.fixture
def known_analyses():
    """What an example registers is forgotten after it."""
    before = dict(registry._KNOWN)
    yield registry._KNOWN
    registry._KNOWN.clear()
    registry._KNOWN.update(before)


def test_the_make_targets_exist():
    targets = re.findall(r"^make (\w+)", README, flags=re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize("command", re.findall(r"^mechsub .*$", "\n".join(blocks("bash")), flags=re.MULTILINE))
def test_every_command_works(command, beside_the_demo):
    name, *arguments = shlex.split(command, comments=True)
    done = CliRunner().invoke(app, arguments)
    assert (name, done.exit_code) == ("mechsub", 0), done.output


def test_the_commands_are_installed_under_their_name(digits):
    command = [str(Path(sys.executable).parent / "mechsub"), "verify", str(digits.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_every_python_example_works(number, beside_the_demo, known_analyses, tmp_path):
    example = tmp_path / "example.py"
    example.write_text(blocks("python")[number])
    runpy.run_path(str(example))  # from a file, since nnsight reads the source of what it traces


def test_the_example_analysis_can_be_run(digits, known_analyses):
    exec(next(block for block in blocks("python") if "@analysis" in block), {"__name__": "example"})
    result = known_analyses["weight_norm"].function(digits)
    assert result.data.weight_norm.sizes == {"condition": 7, "member": digits.recipe.members}


def test_the_table_of_variables_is_true(digits):
    listed: dict[str, set[str]] = {}
    for file, names, dims, unit in re.findall(r"^\| `(\w+)\.h5` \| (.*?) \| (.*?) ?\| (.*?) \|$", README, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)`", names):
            variable = digits.results[file][name]
            assert ", ".join(map(str, variable.dims)) == dims.strip(), name
            assert variable.attrs["units"] == unit, name
            listed.setdefault(file, set()).add(name)
    for file, data in digits.results.items():
        measured = {str(name) for name in data.data_vars if not str(name).endswith("_status") and data[name].dtype.kind == "f"}
        assert listed[file] <= measured
        if file in {"behaviour", "parameter_alignment"}:  # of the others the README lists the main ones
            assert measured == listed[file]


def test_the_numbers_are_those_of_the_demo(digits):
    rows = re.findall(
        r"^\| `([\w-]+)` \| ([^|]+) \| ([^|]+) \| ([^|]+) \| ([\w-]+) \| ([^|]+) \| ([^|]+) \|$", README, flags=re.MULTILINE
    )
    assert [row[0] for row in rows] == digits.conditions
    for condition, student, control, effect, verdict, alignment, null in rows:
        findings = digits.findings[digits.findings.condition == condition].drop_duplicates("quantity").set_index("quantity")
        score, change, cosine = (findings.loc[name] for name in ("trait_score", "effect", "alignment"))
        estimate, low, high = (float(part.replace("−", "-")) for part in re.findall(r"[+−]?[\d.]+", effect))
        shown = [float(text.replace("−", "-")) for text in (student, control, alignment, null)] + [estimate, low, high]
        means = [
            score.estimate,
            (score.null_low + score.null_high) / 2,
            cosine.estimate,
            (cosine.null_low + cosine.null_high) / 2,
        ]
        # Another processor rounds otherwise, which training amplifies a little: two hundredths, where one is printed.
        assert shown == pytest.approx([*means, change.estimate, change.low, change.high], abs=0.02), condition
        assert verdict == change.verdict

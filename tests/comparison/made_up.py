"""Run directories with results that are made up, so that every difference can be worked out by hand."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

from mechsub.comparison.comparison import ANALYSES
from mechsub.comparison.runs import ComparedRun, read_run
from mechsub.results import Result, label_variable, status_variable, write_result
from mechsub.rundir import SCHEMA_VERSION, RunDirectory
from tests.test_findings import finding

VERDICT = {
    "margin": 0.05, "alignment_margin": 0.05, "gradient_margin": 0.005, "minimum_members": 3, "confidence": 0.95,
    "equivalence_level": 0.05,
}  # fmt: skip
Effects = Mapping[str, Mapping[str, Sequence[float]]]


def behaviour(effects: Effects, *, unit: str = "accuracy", verdicts: Mapping[str, str] | None = None) -> Result:
    """The effect of every condition and trait, member by member."""
    traits = list(next(iter(effects.values())))
    values = np.array([[[effects[name][trait]] for trait in traits] for name in effects], dtype=float)
    dims = ("condition", "taught", "context", "member")
    variables = {"effect": label_variable(values, dims, description="effect", unit=unit, formula="student − control")}
    if np.isnan(values).any():
        variables["effect_status"] = status_variable(np.isnan(values), dims, ("ok", "judge_abstained"), "effect")
    coords = {"condition": list(effects), "taught": traits, "context": ["held-out"], "member": np.arange(values.shape[-1])}
    findings = [
        finding(quantity="effect", condition=name, trait=trait, context="held-out", verdict=(verdicts or {}).get(name, ""))
        for name in effects
        for trait in traits
    ]
    return Result(xr.Dataset(variables, coords), findings, [])


def make_run(
    path: Path,
    effects: Effects,
    *,
    reference: str = "θ₀",
    verdict: Mapping[str, Any] | None = None,
    results: Mapping[str, Result] | None = None,
    **options: Any,
) -> RunDirectory:
    """A run whose behaviour is ``effects``; two runs whose ``reference`` is the same text have the same references."""
    made = {"behaviour": behaviour(effects, **options)} if results is None else dict(results)
    members = len(next(iter(next(iter(effects.values())).values())))
    recipe = {"name": path.name, "family": "made-up", "members": members, "verdict": {**VERDICT, **(verdict or {})}}
    path.mkdir(parents=True)
    header = {"schema": SCHEMA_VERSION, "name": path.name, "recipe": recipe, "versions": {"mechsub": "0"}, "command": None}
    (path / "run.json").write_text(json.dumps(header))
    (path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "conditions": {name: {} for name in effects}}, sort_keys=False))
    lineages = {"reference": reference, "teacher": f"teacher of {reference}"}
    measured = {}
    for name, content in lineages.items():
        files = {"step-00000000.safetensors": content, "lineage.json": json.dumps({"origin": {"lineage": "reference"}})}
        for file, text in files.items():
            target = path / "lineages" / name / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        outputs = [f"lineages/{name}/{file}" for file in files]
        measured |= {one: describe(path / one) for one in outputs}
        record(path, name, outputs)
    for analysis, result in made.items():
        write_result(path / "results" / f"{analysis}.h5", analysis, {}, "0", result)
        record(path, f"analysis.{analysis}", [f"results/{analysis}.h5"], measured)
    return RunDirectory.open(path)


def read(path: Path) -> ComparedRun:
    """The run as a comparison reads it."""
    directory = RunDirectory.open(path)
    return read_run(path.name, directory, yaml.safe_load(directory.recipe_path.read_text()), ANALYSES)


def make(path: Path, effects: Effects, **options: Any) -> ComparedRun:
    """Made and read."""
    make_run(path, effects, **options)
    return read(path)


def describe(path: Path) -> dict[str, Any]:
    """A file as a stage's record has it."""
    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def record(path: Path, name: str, outputs: Sequence[str], inputs: Mapping[str, Any] | None = None) -> None:
    """The record of a finished stage."""
    (path / "stages").mkdir(exist_ok=True)
    content = {
        "name": name, "key": name, "function": "a:b", "arguments": {}, "inputs": dict(inputs or {}),
        "outputs": {one: describe(path / one) for one in outputs}, "seconds": 0.0, "mechsub": "0",
    }  # fmt: skip
    (path / "stages" / f"{name}.json").write_text(json.dumps(content))

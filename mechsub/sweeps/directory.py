"""A sweep's folder: ``sweep.json``, ``sweep.yaml``, and a run directory for every run in ``runs/``."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mechsub.changes import find_differences
from mechsub.errors import RunDirectoryError
from mechsub.rundir import atomic_write, write_json
from mechsub.sweeps.config import Sweep

SCHEMA_VERSION = 1
_HEADER = "sweep.json"


def is_sweep_directory(path: Path | str) -> bool:
    """Whether a folder holds a sweep."""
    return (Path(path) / _HEADER).is_file()


class SweepDirectory:
    """The folder of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path | str) -> "SweepDirectory":
        """Open a sweep's folder.

        Raises:
            RunDirectoryError: it holds no sweep, or one of another schema.
        """
        directory = cls(Path(path))
        if not is_sweep_directory(path):
            raise RunDirectoryError(f"{path} is no sweep: it has no {_HEADER}; a recipe with a `sweep:` block makes one")
        schema = directory.header.get("schema")
        if schema != SCHEMA_VERSION:
            raise RunDirectoryError(f"{path} has sweep schema {schema!r}, this mechsub reads {SCHEMA_VERSION}")
        return directory

    @property
    def header(self) -> dict[str, Any]:
        """``sweep.json``: the recipe, which run has which settings, versions, hardware, command."""
        try:
            content: dict[str, Any] = json.loads((self.path / _HEADER).read_text())
        except (OSError, ValueError) as error:
            raise RunDirectoryError(f"{self.path / _HEADER} cannot be read ({error}); run the sweep again") from None
        return content

    @property
    def recipe_path(self) -> Path:
        """``sweep.yaml``: the resolved recipe with its ``sweep`` block; it replays the sweep."""
        return self.path / "sweep.yaml"

    @property
    def runs(self) -> dict[str, Mapping[str, Any]]:
        """Every run's settings by its name, begun or not."""
        runs: dict[str, Mapping[str, Any]] = self.header["runs"]
        return runs

    @property
    def begun(self) -> list[str]:
        """The runs that have a run directory."""
        return [name for name in self.runs if (self.run_path(name) / "run.json").is_file()]

    def run_path(self, name: str) -> Path:
        """Where a run lies."""
        return self.path / "runs" / name

    def write(self, sweep: Sweep, provenance: Mapping[str, Any]) -> None:
        """Write down what the sweep is, before its first run."""
        values = sweep.to_values()
        runs = {name: dict(run.settings) for name, run in sweep.runs.items()}
        first = self.header if is_sweep_directory(self.path) else provenance
        kept = {name: first[name] for name in provenance}
        commands = [str(one["command"]) for one in (first, provenance) if one["command"]]
        kept["command"] = "; later ".join(dict.fromkeys(commands)) or None
        write_json(
            self.path / _HEADER, {"schema": SCHEMA_VERSION, "name": sweep.recipe.name, **kept, "recipe": values, "runs": runs}
        )
        with atomic_write(self.recipe_path) as temporary:
            temporary.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def check_same_sweep(self, sweep: Sweep) -> None:
        """Refuse another sweep. A sweep may grow by runs and by conditions; it may lose nothing.

        Raises:
            RunDirectoryError: what has changed, or which runs are no longer part of it.
        """
        lost = [name for name in self.runs if name not in sweep.runs and self.run_path(name).exists()]
        if lost:
            raise RunDirectoryError(
                f"{self.path} holds runs that this sweep lacks: {', '.join(lost)}; a sweep may grow and lose nothing: "
                "put their values back, delete those runs' folders, or choose another --out"
            )
        differences = find_differences({**self.header["recipe"], "sweep": None}, {**sweep.to_values(), "sweep": None})
        if differences:
            listed = ", ".join(f"`{path}` was {before!r}, is {after!r}" for path, before, after in differences)
            raise RunDirectoryError(f"{self.path} was made by another recipe: {listed}; choose another --out")

"""A run directory opened for reading: its recipe, lineages, results and findings."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd
import xarray as xr

from mechsub.families.protocol import Family
from mechsub.families.registry import load_family
from mechsub.findings import Finding
from mechsub.lineages import Lineage, open_lineage
from mechsub.recipe import Recipe, load_recipe
from mechsub.results import Result, find_results, read_result
from mechsub.rundir import RunDirectory

_ROLES = ("student", "control")


@dataclass(frozen=True)
class Run:
    """What a run holds so far. Nothing is read before it is asked for."""

    directory: RunDirectory
    device: str = "cpu"
    report_progress: Callable[[int], None] = field(default=lambda done: None, repr=False)
    """Analyses call it with the number of checkpoints they have been through."""

    @property
    def path(self) -> Path:
        """The run directory."""
        return self.directory.path

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(self.directory.recipe_path)

    @cached_property
    def family(self) -> Family:
        """The run's family, bound to its recipe."""
        family: Family = load_family(self.recipe.family, self.path, self.recipe, self.device)
        return family

    @cached_property
    def lineages(self) -> dict[str, Lineage]:
        """Every finished lineage, by its name."""
        prefix, suffix = "lineages/", "/lineage.json"
        names = [
            output.removeprefix(prefix).removesuffix(suffix)
            for record in self.directory.records().values()
            for output in record.outputs
            if output.startswith(prefix) and output.endswith(suffix)
        ]
        return {name: open_lineage(self.path, name) for name in _in_recipe_order(names, list(self._condition_names))}

    @property
    def num_checkpoints(self) -> int:
        """Of all lineages together."""
        return sum(len(lineage.steps) for lineage in self.lineages.values())

    @property
    def conditions(self) -> list[str]:
        """The conditions whose student and control are both there, in the recipe's order."""
        return [name for name in self._condition_names if all(f"{role}.{name}" in self.lineages for role in _ROLES)]

    @property
    def missing_conditions(self) -> list[str]:
        """The recipe's conditions that lack their student or their control so far."""
        return [name for name in self._condition_names if name not in self.conditions]

    def describe_condition(self, name: str) -> str:
        """How a condition differs from the matched case, in words."""
        return self.recipe.conditions[name].describe()

    @property
    def neutral(self) -> str:
        """The lineage of the neutral teacher."""
        return next(name for name in self.lineages if name.startswith("neutral."))

    @cached_property
    def results(self) -> dict[str, xr.Dataset]:
        """The labelled arrays of every analysis, by its name."""
        return {name: result.data for name, result in self._results.items()}

    @cached_property
    def findings(self) -> pd.DataFrame:
        """One row per finding, of all analyses."""
        found: list[Finding] = [finding for result in self._results.values() for finding in result.findings]
        return pd.DataFrame([vars(finding) for finding in found])

    @cached_property
    def _results(self) -> dict[str, Result]:
        current, _ = find_results(self.directory)
        return {name: read_result(path) for name, path in current.items()}

    @property
    def _condition_names(self) -> list[str]:
        return list(self.recipe.conditions)


def _in_recipe_order(names: list[str], conditions: list[str]) -> list[str]:
    roles = ["reference", "teacher", "neutral", "student", "control", "sham"]

    def order(name: str) -> tuple[int, int]:
        role, _, rest = name.partition(".")
        return roles.index(role), conditions.index(rest) if rest in conditions else 0

    return sorted(names, key=order)

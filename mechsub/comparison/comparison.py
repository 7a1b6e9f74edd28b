"""A comparison: its sections, what could not be compared, and what differs between the recipes; as one result for one file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from mechsub.architecture_matrix import MATRIX_ANALYSIS, join_matrices
from mechsub.comparison.panels import build_panels
from mechsub.comparison.quantities import QUANTITIES
from mechsub.comparison.recipes import RecipeTable, tabulate_recipes
from mechsub.comparison.runs import ComparedRun
from mechsub.comparison.sections import Section, build_sections
from mechsub.errors import MechsubError
from mechsub.results import Result

ANALYSES = (*dict.fromkeys(quantity.analysis for quantity in QUANTITIES), MATRIX_ANALYSIS)
"""Whose results a comparison reads."""


@dataclass(frozen=True)
class Comparison:
    """What the page and the file are made of."""

    runs: Sequence[ComparedRun]
    baseline: str
    """The condition of the first run that other conditions are held against."""
    sections: Sequence[Section]
    recipes: RecipeTable
    not_compared: Sequence[str]
    """What could not be compared, and why, in sentences."""

    @property
    def conditions(self) -> list[str]:
        """Of all runs."""
        return list(dict.fromkeys(name for run in self.runs for name in run.recipe["conditions"]))


def compare(runs: Sequence[ComparedRun], baseline: str | None = None, notes: Sequence[str] = ()) -> Comparison:
    """Every quantity of the runs side by side, as far as they have it; see `build_panels`.

    ``baseline``: a condition of the first run, its first by default. ``notes``: what else could not be compared.

    Raises:
        MechsubError: the first run has no such condition, or nothing has two rows and no run a matrix of architectures.
    """
    conditions = list(runs[0].recipe["conditions"])
    if baseline is not None and baseline not in conditions:
        raise MechsubError(
            f"--baseline {baseline}: {runs[0].name}, the first run, has no such condition; it has {', '.join(conditions)}"
        )
    panels, found = build_panels(runs, baseline or conditions[0])
    sections = [*_build_matrix(runs), *build_sections(panels)]
    if not sections:
        raise MechsubError(
            f"there is nothing to compare in {', '.join(run.name for run in runs)}; two rows of one quantity are the least:\n"
            + "\n".join(f"  - {note}" for note in [*notes, *found])
        )
    return Comparison(runs, baseline or conditions[0], sections, tabulate_recipes(runs), [*notes, *found])


def _build_matrix(runs: Sequence[ComparedRun]) -> list[Section]:
    """The runs' cells of the matrix of architectures, judged together; no section where they have none."""
    known = {run.name: run for run in runs if MATRIX_ANALYSIS in run.results}
    results = {name: run.results[MATRIX_ANALYSIS] for name, run in known.items()}
    matrix = join_matrices(results, {name: run.rules("margin") for name, run in known.items()})
    return [] if matrix is None else [Section("matrix", "Which architecture passes its trait to which?", matrix)]


def combine(comparison: Comparison) -> Result:
    """All of a comparison as one result: the runs and recipes at its root, each section's arrays in a group of its name."""
    findings = [finding for section in comparison.sections for finding in section.result.findings]
    sentences = [f"{section.title}: {said}" for section in comparison.sections for said in section.result.summary]
    groups = {section.name: section.result.data for section in comparison.sections}
    return Result(_label_root(comparison), findings, [], [*sentences, *comparison.not_compared], groups)


def _label_root(comparison: Comparison) -> xr.Dataset:
    runs, recipes = comparison.runs, comparison.recipes
    coords: Mapping[str, Any] = {
        "run": [run.name for run in runs],
        "field": list(recipes.fields),
        "column": list(recipes.columns),
        "section": [section.name for section in comparison.sections],
    }
    values = np.array(recipes.values, dtype=object).reshape(len(recipes.fields), len(recipes.columns))
    return xr.Dataset(
        {
            "num_members": ("run", [run.num_members for run in runs], {"long_name": "members", "units": "members"}),
            "recipe": (("field", "column"), values, {"long_name": "what differs between recipes", "units": "as in the recipe"}),
            "title": ("section", np.array([section.title for section in comparison.sections], dtype=object)),
            "not_compared": (
                "note",
                np.array(comparison.not_compared, dtype=object),
                {"long_name": "what could not be compared, and why"},
            ),
        },
        coords,
        {"baseline": f"{comparison.baseline} of {runs[0].name}"},
    )

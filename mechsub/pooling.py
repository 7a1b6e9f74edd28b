"""Means over the traits that a run teaches, and what is said of values that are missing."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsub.cases import CaseName
from mechsub.findings import ALL_TRAITS
from mechsub.lineages import Lineage
from mechsub.results import status_variable
from mechsub.run import Run

_POOLED = "_over_traits"


def pool_traits(run: Run, condition: str) -> CaseName:
    """The case that stands for all traits of a condition; of one trait it is that one."""
    return condition, ALL_TRAITS if len(run.traits) > 1 else run.traits[0]


def list_traits(run: Run, case: CaseName) -> list[str]:
    """The traits that a case stands for."""
    return run.traits if case[1] == ALL_TRAITS else [case[1]]


def pooled_name(name: str) -> str:
    """How `label_means` calls the mean of a variable over traits."""
    return f"{name}{_POOLED}"


def label_means(variables: Mapping[str, xr.Variable], names: Sequence[str]) -> dict[str, xr.Variable]:
    """Variables' means over the traits that are taught, with a status: to draw, where a trait a line would be too many."""
    found = {}
    for name in names:
        mean = variables[name].mean("taught", skipna=False)
        mean.attrs = {**variables[name].attrs, "long_name": f"{variables[name].attrs['long_name']}, mean over traits"}
        codes, dims = np.isnan(mean.values), [str(dim) for dim in mean.dims]
        found[pooled_name(name)] = mean
        found[f"{pooled_name(name)}_status"] = status_variable(codes, dims, ("ok", "see_the_traits_own"), pooled_name(name))
    return found


def distinct_members(
    run: Run, values: Float[np.ndarray, "*any member"], *lineages: Lineage
) -> Float[np.ndarray, "*any distinct"]:
    """Values of lineages alone; only the first where each of these is one model for all members: n copies have no interval."""
    first = values[..., :1]
    is_one = all(map(run.has_one_model, lineages)) and np.array_equal(
        values, np.broadcast_to(first, values.shape), equal_nan=True
    )
    return first if is_one else values


def say_statuses(codes: Iterable[int], meanings: Sequence[str]) -> str:
    """Why values are missing, in words, each reason once; empty where none is."""
    return ", ".join(meanings[code].replace("_", " ") for code in sorted({int(code) for code in codes}) if code)

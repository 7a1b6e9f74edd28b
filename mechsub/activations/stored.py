"""Steering directions on disk: every lineage's, by hook point, in HDF5; any of them as a vector to add to a model."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.hook_points import HookPoint
from mechsub.errors import ActivationError
from mechsub.results import label_variable, status_variable
from mechsub.settings import nearest_name

DIRECTIONS_GROUP = "directions"
"""The group of a result file that holds them."""

_STATUS = ("ok", "no_such_hook_point_or_another_width", "not_on_these_prompts_or_not_finite")
Key = tuple[str, int, int]
"""A lineage, its step, and a member."""


def store_directions(
    vectors: Mapping[Key, Mapping[str, Float[np.ndarray, "_group _width"]]], points: Sequence[HookPoint], groups: Sequence[str]
) -> xr.Dataset:
    """One variable a hook point, [model, group, width of that point], in float32; a model is one member at one step.

    NaN of a model that has no such hook point, or one of another width.
    """
    keys = sorted(vectors)
    variables: dict[str, Any] = {}
    for point in points:
        size = (len(groups), point.width)
        held = [key for key in keys if point.name in vectors[key] and vectors[key][point.name].shape == size]
        values = np.full((len(keys), *size), np.nan, dtype=np.float32)
        for key in held:
            values[keys.index(key)] = vectors[key][point.name]
        variables[point.name] = label_variable(
            values,
            ("model", "group", f"width of {point.name}"),
            description=f"steering directions at {point.label}",
            unit="activation",
            formula="mean h(lineage at step) − mean h(its own origin)",
        )
        missing = np.isnan(values)
        there = np.array([key in held for key in keys])[:, None, None]
        codes = np.where(missing, np.where(there, 2, 1), 0)
        variables[f"{point.name}_status"] = status_variable(codes, variables[point.name].dims, _STATUS, point.name)
    coords = {
        "lineage": ("model", np.array([key[0] for key in keys], dtype=object)),
        "step": ("model", np.array([key[1] for key in keys])),
        "member": ("model", np.array([key[2] for key in keys])),
        "group": list(groups),
    }
    described = {field: [getattr(point, field) for point in points] for field in ("name", "site", "module", "side")}
    layers = [point.layer for point in points]
    return xr.Dataset(variables, coords, {**described, "layer": layers})


class SteeringDirections:
    """The steering directions of a run, as `steering_directions` has stored them."""

    def __init__(self, stored: xr.Dataset, source: str) -> None:
        self._stored, self._source = stored, source

    @property
    def lineages(self) -> dict[str, list[int]]:
        """What is there: lineage → its steps."""
        found: dict[str, list[int]] = {}
        for name, step in zip(self._stored.lineage.values.tolist(), self._stored.step.values.tolist(), strict=True):
            found.setdefault(name, [])
            if step not in found[name]:
                found[name].append(step)
        return found

    @property
    def hook_points(self) -> list[str]:
        """The names of the hook points, as TransformerLens spells them."""
        return [str(name) for name in self._stored.data_vars if not str(name).endswith("_status")]

    @property
    def groups(self) -> list[str]:
        """Which prompts and positions a direction can be of, ``<kind>: <position policy>``; the first is the trait's."""
        return [str(name) for name in self._stored.group.values]

    def load(
        self, lineage: str, hook_point: str, *, member: int = 0, step: int | None = None, group: str | None = None
    ) -> Float[Tensor, " width"]:
        """V = mean(h of the lineage) − mean(h of its origin) at a hook point, float32, in units of activations there.

        ``step``: the lineage's last, unless told. ``group``: the prompts and positions; the trait's, unless told.

        Raises:
            ActivationError: there is no such lineage, step, member, hook point or group; the nearest names are given.
        """
        known = self.lineages
        if lineage not in known:
            raise ActivationError(f"{self._source} has no directions of {lineage!r}; {nearest_name(lineage, list(known))}")
        chosen = max(known[lineage]) if step is None else step
        if hook_point not in self.hook_points:
            raise ActivationError(
                f"{self._source} has no directions at {hook_point!r}; {nearest_name(hook_point, self.hook_points)}"
            )
        kind = self.groups[0] if group is None else group
        if kind not in self.groups:
            raise ActivationError(f"{self._source} has no directions of {kind!r} prompts; known: {'; '.join(self.groups)}")
        is_it = (self._stored.lineage == lineage) & (self._stored.step == chosen) & (self._stored.member == member)
        places = np.flatnonzero(is_it.values)
        if not len(places):
            of_lineage = self._stored.member.values[self._stored.lineage.values == lineage]
            raise ActivationError(
                f"{self._source} has no direction of {lineage} at step {chosen}, member {member}; it has steps "
                f"{known[lineage]} and members {of_lineage.min()} to {of_lineage.max()}"
            )
        values = self._stored[hook_point].sel(group=kind).values[places[0]]
        if not np.isfinite(values).all():
            why = _STATUS[int(self._stored[f"{hook_point}_status"].sel(group=kind).values[places[0]].max())].replace("_", " ")
            raise ActivationError(f"{lineage}, member {member}, has no direction at {hook_point} on {kind!r}: {why}")
        return torch.from_numpy(values.copy())

    def list_last(self) -> dict[str, Float[Tensor, " width"]]:
        """Every direction of the last steps, by ``<lineage>/member-<number>/<group>/<hook point>``: for safetensors."""
        found = {}
        for lineage, point in product(self.lineages, self.hook_points):
            own = self._stored[point].isel(model=self._stored.lineage.values == lineage)
            last = own.isel(model=own.step.values == own.step.values.max())
            for member, group in product(last.member.values.tolist(), self.groups):
                values = last.isel(model=last.member.values == member).sel(group=group).values[0]
                if np.isfinite(values).all():
                    found[f"{lineage}/member-{member:03d}/{group}/{point}"] = torch.from_numpy(values.copy())
        return found

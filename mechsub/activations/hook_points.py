"""Hook points: the places in a model where activations are read and changed, named as TransformerLens names them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mechsub.errors import ActivationError
from mechsub.settings import nearest_name

RESIDUAL_SITES = ("resid_pre", "resid_post")
"""The sites whose vectors are of the residual stream itself, one basis for all layers."""


@dataclass(frozen=True)
class HookPoint:
    """One place in a model. What passes there is [row, position, d_model], or [row, width] in a model without positions."""

    name: str
    """As TransformerLens spells it, e.g. ``blocks.3.hook_resid_post``."""
    layer: int
    """Of the block, from 0."""
    site: str
    """``resid_pre``, ``attn_out``, ``mlp_out`` or ``resid_post`` of a transformer; ``post`` of hidden units."""
    module: str | None
    """The module that it is read at, by its path in the plain model; None where only TransformerLens knows it."""
    side: Literal["input", "output"]
    """Whether it is the module's first input or its (first) output."""
    width: int
    is_read_out: bool = True
    """Whether its coordinates are those that the head reads: the residual stream's, or the last hidden layer's."""

    @property
    def label(self) -> str:
        """For a person: ``layer 3 resid_post``."""
        return f"layer {self.layer} {self.site}"


def main_stream(points: Sequence[HookPoint]) -> list[HookPoint]:
    """Those of the residual stream; of a model that has none, all: its hidden layers."""
    return [point for point in points if point.site in RESIDUAL_SITES] or list(points)


def find_hook_point(points: Sequence[HookPoint], name: str) -> HookPoint:
    """The hook point of a name.

    Raises:
        ActivationError: the model has none of that name; the nearest names are given.
    """
    for point in points:
        if point.name == name:
            return point
    raise ActivationError(f"the model has no hook point {name!r}; {nearest_name(name, [point.name for point in points])}")


def select_hook_points(
    points: Sequence[HookPoint], layers: Sequence[int] | None = None, sites: Sequence[str] | None = None
) -> list[HookPoint]:
    """The hook points of some layers and sites, in the order of the forward pass; None takes all.

    Raises:
        ActivationError: the model lacks such a layer, or no layer asked for has such a site.
    """
    known_layers, known_sites = sorted({point.layer for point in points}), list(dict.fromkeys(point.site for point in points))
    for layer in layers or ():
        if layer not in known_layers:
            raise ActivationError(f"the model has no layer {layer}; it has layers {known_layers[0]} to {known_layers[-1]}")
    for site in sites or ():
        if site not in known_sites:
            raise ActivationError(f"the model has no site {site!r}; {nearest_name(site, known_sites)}")
    chosen = [point for point in points if (layers is None or point.layer in layers) and (sites is None or point.site in sites)]
    if not chosen:
        where = {site: sorted({point.layer for point in points if point.site == site}) for site in sites or known_sites}
        raise ActivationError(f"no layer of {layers} has a site of {sites}; layers by site: {where}")
    return chosen

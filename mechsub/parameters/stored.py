"""Inner products on disk: with them any difference, cosine or projection of a run's displacements, without the weights."""

from collections.abc import Mapping

import numpy as np
import xarray as xr

from mechsub.errors import AnalysisError
from mechsub.parameters.alignment import ByScope, DirectionAlgebra, Scopes
from mechsub.parameters.blocks import Block
from mechsub.parameters.gram import Gram
from mechsub.results import label_variable, status_variable
from mechsub.settings import nearest_name

GRAM_GROUP = "gram"
"""The group of a result file that holds them."""

Sum = str | Mapping[str, float | int]
"""A direction by its label, or a signed sum of labels: ``{"Δ student @ 9": 1, "Δ control @ 9": -1}``."""


def store_gram(algebra: DirectionAlgebra, blocks: list[Block]) -> xr.Dataset:
    """The Gram matrices of every block as labelled arrays."""
    gram = algebra.gram
    arrays = {
        "within": (gram.within, ("member", "block", "direction", "other_direction"), "⟨dᵢ, dⱼ⟩ within a member"),
        "across": (
            gram.across,
            ("member", "block", "direction", "anchor", "other_member"),
            "⟨dᵢ of a member, anchor of another member⟩",
        ),
        "rounding": (gram.rounding, ("member", "block", "direction"), "squared norm that rounding in storage alone could give"),
    }
    variables = {}
    for name, (values, dims, description) in arrays.items():
        known = np.isfinite(values)
        values = np.where(known, values, np.nan)
        variables[name] = label_variable(values, dims, description=description, unit="weight²", formula="⟨u, v⟩")
        if not known.all():
            variables[f"{name}_status"] = status_variable(~known, dims, ("ok", "not_finite"), name)
    coords = {
        "member": np.arange(gram.within.shape[0]),
        "block": [block.name for block in blocks],
        "layer": ("block", [block.layer for block in blocks]),
        "kind": ("block", [block.kind for block in blocks]),
        "num_parameters": ("block", [block.num_parameters for block in blocks]),
        "direction": list(gram.labels),
        "other_direction": list(gram.labels),
        "anchor": list(gram.anchors),
        "other_member": np.arange(gram.within.shape[0]),
    }
    return xr.Dataset(variables, coords=coords)


class Directions:
    """The displacements of a run, known by their inner products: any signed sum has a norm, a cosine and a projection.

    ``labels``: what is there: ``Δ <lineage> @ <step>``: θ(step) − θ(0); ``Δ <first> − Δ <second> @ <step>``: their difference,
    subtracted weight by weight; ``θ₀ <lineage>``: a start. A sum of labels stands for the same sum of directions; where two
    nearly cancel, the stored difference is the more exact one.
    """

    def __init__(self, gram: xr.Dataset) -> None:
        columns = zip(gram.block.values, gram.layer.values, gram.kind.values, gram.num_parameters.values, strict=True)
        blocks = [Block(str(name), str(name), str(layer), str(kind), (int(size),)) for name, layer, kind, size in columns]
        self.labels = tuple(map(str, gram.direction.values))
        kept = Gram(
            self.labels,
            tuple(block.name for block in blocks),
            gram.within.values,
            gram.across.values,
            tuple(map(str, gram.anchor.values)),
            gram.rounding.values,
        )
        self._algebra = DirectionAlgebra(kept, Scopes.of(blocks))

    def __repr__(self) -> str:
        return f"Directions({len(self.labels)} of {self._algebra.gram.within.shape[0]} members)"

    def inner(self, first: Sum, second: Sum) -> xr.DataArray:
        """⟨u, v⟩ as [member, scope], in the squared unit of the weights."""
        return self._label(self._algebra.inner(self._sum(first), self._sum(second)), "⟨u, v⟩")

    def norm(self, direction: Sum) -> xr.DataArray:
        """‖u‖ ≥ 0 as [member, scope], in the unit of the weights."""
        whole = self._sum(direction)
        return self._label(self._algebra.norm(whole, self._algebra.support(whole, whole)), "‖u‖")

    def cosine(self, first: Sum, second: Sum) -> xr.DataArray:
        """cos(u, v) as [member, scope], in [−1, 1]; NaN where the two share no support.

        Source: Ilharco et al., arXiv:2212.04089 (task vectors).
        """
        return self._label(self._algebra.cosine(self._sum(first), self._sum(second)), "⟨u, v⟩ / (‖u‖ ‖v‖)")

    def projection(self, direction: Sum, onto: Sum) -> xr.DataArray:
        """⟨u, v⟩ / ‖v‖² as [member, scope]: how far along v, in units of v; NaN where the two share no support."""
        found = self._algebra.projection_coefficient(self._sum(direction), self._sum(onto))
        return self._label(found, "⟨u, v⟩ / ‖v‖²")

    def rounding_floor(self, direction: Sum) -> xr.DataArray:
        """The norm that rounding in storage alone could give u, as [member, scope], in the unit of the weights."""
        return self._label(self._algebra.rounding_floor(self._sum(direction)), "√Σ ulp² / 12")

    def _sum(self, direction: Sum) -> Mapping[str, float]:
        parts = {direction: 1.0} if isinstance(direction, str) else {label: float(sign) for label, sign in direction.items()}
        for label in parts:
            if label not in self.labels:
                raise AnalysisError(f"no direction is called {label!r}; {nearest_name(label, list(self.labels))}")
        return parts

    def _label(self, values: ByScope, formula: str) -> xr.DataArray:
        scopes = self._algebra.scopes
        coords = {
            "member": np.arange(len(values)),
            "scope": list(scopes.names),
            "scope_kind": ("scope", list(scopes.kinds)),
        }
        return xr.DataArray(values, coords, ("member", "scope"), attrs={"formula": formula})

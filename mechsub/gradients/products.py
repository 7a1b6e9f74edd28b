"""Inner products of vectors that are in memory, block by block: gradients, optimizer updates, displacements of one member."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.parameters.blocks import Block

Vector = Mapping[str, Tensor]
"""Named tensors with the layout of a lineage's parameters."""


def inner_products(vectors: Sequence[Vector | None], blocks: Sequence[Block]) -> Float[np.ndarray, "block direction direction"]:
    """⟨u, v⟩ of every two vectors in every block, multiplied and summed in float64; NaN with a vector that is None."""
    known = [place for place, vector in enumerate(vectors) if vector is not None]
    products = np.full((len(blocks), len(vectors), len(vectors)), np.nan)
    for number, block in enumerate(blocks):
        parts = [vector[block.tensor][block.index].flatten().double() for vector in vectors if vector is not None]
        stacked = torch.stack([part.to(parts[0].device) for part in parts])
        products[number][np.ix_(known, known)] = (stacked @ stacked.T).cpu().numpy()
    return products


def cosine_error(
    with_direction: Float[np.ndarray, "example scope"],
    with_mean: Float[np.ndarray, "example scope"],
    direction_square: Float[np.ndarray, " scope"],
    mean_square: Float[np.ndarray, " scope"],
    inner: Float[np.ndarray, " scope"],
    num_examples: int,
) -> Float[np.ndarray, " scope"]:
    """The standard error ≥ 0 of cos(ḡ, t), ḡ the mean of n examples' gradients g_i and t fixed; NaN where ḡ or t is 0.

    sd_i(⟨g_i, t⟩/(‖ḡ‖ ‖t‖) − cos(ḡ, t) ⟨g_i, ḡ⟩/‖ḡ‖²) / √n, the delta method: examples are independent draws, and first-order
    errors of numerator and length go together. ``with_direction``: ⟨g_i, t⟩, ``with_mean``: ⟨g_i, ḡ⟩, of all n =
    ``num_examples`` or of some of them, whose spread then stands for all.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        length = np.sqrt(direction_square * mean_square)
        influence = with_direction / length - (inner / length) * with_mean / mean_square
        errors: np.ndarray = influence.std(0, ddof=1) / np.sqrt(num_examples)
    return np.where(length > 0, errors, np.nan)

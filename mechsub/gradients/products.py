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
        stacked = torch.stack(parts)
        products[number][np.ix_(known, known)] = (stacked @ stacked.T).cpu().numpy()
    return products

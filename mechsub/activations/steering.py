"""Steering: what a visit can do to activations while a model runs: add a vector, take directions out, put others' parts in.

`ModelView.visiting` takes one visit for each hook point; the model is as it was when it closes. A visit refuses activations of
another width than its vectors with an `ActivationError`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.backends import Visit
from mechsub.errors import ActivationError


def add_vector(vector: Float[Tensor, " width"]) -> Visit:
    """A visit h ← h + v at every position."""
    return lambda activations: activations + _fit(vector, activations)


def project_out(directions: Float[Tensor, "direction width"]) -> Visit:
    """A visit h ← h − B Bᵀ h at every position, B an orthonormal basis of the directions."""
    basis = orthonormal_rows(directions)

    def visit(activations: Tensor) -> Tensor:
        rows = _fit(basis, activations)
        return activations - activations @ rows.T @ rows

    return visit


def keep_components(directions: Float[Tensor, "direction width"], kept: list[Tensor]) -> Visit:
    """A visit that appends Bᵀ h of every forward pass to ``kept`` and changes nothing. For `replace_components`."""
    basis = orthonormal_rows(directions)

    def visit(activations: Tensor) -> None:
        kept.append((activations @ _fit(basis, activations).T).detach())

    return visit


def replace_components(
    directions: Float[Tensor, "direction width"],
    kept: Sequence[Tensor],
    along: Float[Tensor, "one width"] | None = None,
) -> Visit:
    """A visit h ← h + B (c − Bᵀ h) at every position, c what another model has there: ``kept``, one for each forward pass.

    ``along``: of one direction, another one a to put it in: h ← h + â (c − b̂ᵀ h), a push as long, elsewhere.

    Raises:
        ActivationError: the other model saw other batches.
    """
    basis, passes = orthonormal_rows(directions), iter(kept)
    put_in = basis if along is None else orthonormal_rows(along)

    def visit(activations: Tensor) -> Tensor:
        rows, components = _fit(basis, activations), next(passes, None)
        own = activations @ rows.T
        if components is None or components.shape != own.shape:
            seen = "fewer batches" if components is None else f"a batch of {list(components.shape[:-1])} positions"
            raise ActivationError(
                f"the model whose components are put in saw {seen}; this one has {list(own.shape[:-1])}: run both on the same"
            )
        changed: Tensor = activations + (components.to(activations) - own) @ _fit(put_in, activations)
        return changed

    return visit


def orthonormal_rows(directions: Float[Tensor, "direction width"]) -> Float[Tensor, "kept width"]:
    """An orthonormal basis of what the rows span, of one row with its sign; rows in the span of others, and 0, add nothing."""
    exact = directions.double()
    if len(exact) == 1 and exact.any():
        rows = exact / exact.norm()
    else:
        _, sizes, rows = torch.linalg.svd(exact, full_matrices=False)
        rows = rows[: int((sizes > sizes.max().clamp_min(1e-300) * 1e-10).sum()) if sizes.numel() else 0]
    basis: Tensor = rows.to(directions.dtype)
    return basis


def _fit(vectors: Float[Tensor, "*any width"], activations: Tensor) -> Tensor:
    """The vectors where activations are, in their dtype.

    Raises:
        ActivationError: they have another width.
    """
    if vectors.shape[-1] != activations.shape[-1]:
        raise ActivationError(
            f"the vector has {vectors.shape[-1]} numbers, activations here have {activations.shape[-1]}: it belongs to another "
            "model, or to another site"
        )
    return vectors.to(activations)

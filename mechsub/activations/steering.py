"""Steering: what a visit can do to activations while a model runs: add a vector, take directions out, put others' parts in.

`ModelView.visiting` takes one visit for each hook point; the model is as it was when it closes. A visit refuses activations of
another width than its vectors with an `ActivationError`.
"""

from collections.abc import Iterator, Sequence

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
    directions: Float[Tensor, "direction width"], kept: Sequence[Tensor], pushes: list[Tensor] | None = None
) -> Visit:
    """A visit h ← h + B (c − Bᵀ h) at every position, c what another model has there: ``kept``, one for each forward pass.

    ``pushes``: grows by c − Bᵀ h of each pass, for `push_along`.

    Raises:
        OtherPassesError: the other model saw other batches.
    """
    basis, passes = orthonormal_rows(directions), iter(kept)

    def visit(activations: Tensor) -> Tensor:
        rows = _fit(basis, activations)
        own = activations @ rows.T
        push = _next_pass(passes, own).to(activations) - own
        if pushes is not None:
            pushes.append(push.detach())
        changed: Tensor = activations + push @ rows
        return changed

    return visit


def push_along(direction: Float[Tensor, " width"], pushes: Sequence[Tensor]) -> Visit:
    """A visit h ← h + p v̂ at every position, p what `replace_components` moved another direction by, pass by pass.

    Raises:
        OtherPassesError: that model saw other batches.
    """
    unit, passes = orthonormal_rows(direction[None]), iter(pushes)

    def visit(activations: Tensor) -> Tensor:
        push = _next_pass(passes, activations[..., :1])
        return activations + push.to(activations) @ _fit(unit, activations)

    return visit


class OtherPassesError(ActivationError):
    """Two models were run on other batches, so that what one has belongs to nothing in the other."""


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


def _next_pass(passes: Iterator[Tensor], own: Tensor) -> Tensor:
    """What was kept of the next forward pass, if it is as large as what is there now."""
    kept = next(passes, None)
    if kept is None or kept.shape != own.shape:
        seen = "fewer batches" if kept is None else f"a batch of {list(kept.shape[:-1])} positions"
        raise OtherPassesError(
            f"the model whose components are put in saw {seen}; this one has {list(own.shape[:-1])}: run both on the same"
        )
    return kept

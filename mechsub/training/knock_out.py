"""Knock-out: what would move the trait is projected out of what moves a student, step by step.

Trait gradients are t_k = ∇L_trait,k at the parameters before the step. Everything here has the sign of a gradient, the
opposite of the step that it makes: v is the imitation gradient, or θ_before − θ_after. To first order the step changes
L_trait,k by −⟨v, t_k⟩, so that it lowers that loss where ⟨v, t_k⟩ > 0.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

from mechsub.streams import random_stream
from mechsub.training.config import KnockOutConfig

Named = Mapping[str, Float[Tensor, "member ..."]]
"""Tensors by parameter, members stacked."""
ComputeTraits = Callable[[int], Sequence[Named]]
"""The trait gradients at the live parameters, one by trait, for the step with this number (from 0)."""


def inner_products(left: Named, right: Named) -> Float[Tensor, " member"]:
    """⟨left, right⟩ of each member over the tensors of ``left``, summed in float64.

    A member's number does not depend on which others are stacked with it.
    """
    parts = [(tensor.double() * right[name]).reshape(len(tensor), -1).sum(1) for name, tensor in left.items()]
    return torch.stack(parts).sum(0)


def find_coefficients(direction: Named, components: Sequence[Named], when: str) -> Float[Tensor, "component member"]:
    """The c for which v − Σ c_k t_k is the knocked-out v: over the tensors of ``direction``.

    ``always``: v without its projection on the span of the t_k, so that ⟨v′, t_k⟩ = 0. ``positive``: the v′ nearest to v with
    ⟨v′, t_k⟩ ≤ 0 for every k, c ≥ 0; of one component c = max(0, ⟨v, t⟩) / ⟨t, t⟩, which leaves v alone unless ⟨v, t⟩ > 0.
    A component that is 0 has c = 0. Source of one component: Kitkana & Arora, arXiv:2604.25779; of several: the constraint is
    that of gradient episodic memory, Lopez-Paz & Ranzato, arXiv:1706.08840.
    """
    components = [{name: component[name] for name in direction} for component in components]
    products = torch.stack([inner_products(direction, component) for component in components])
    if len(components) == 1:
        squares = inner_products(components[0], components[0])[None]
        found = torch.where(squares == 0, 0.0, products / squares)  # what is not finite is not passed over
        return found.clamp_min(0.0) if when == "positive" else found
    gram = torch.stack([torch.stack([inner_products(left, right) for right in components]) for left in components])
    solve = _solve_in_cone if when == "positive" else _solve_in_span
    solved = [solve(gram[:, :, member].cpu(), products[:, member].cpu()) for member in range(products.shape[1])]
    return torch.stack(solved, dim=1).to(products)


def subtract_components(direction: Named, components: Sequence[Named], coefficients: Float[Tensor, "component member"]) -> None:
    """V − Σ c_k t_k, in place. Where all c of a member are 0 its v stays as it is."""
    for component, factors in zip(components, coefficients, strict=True):
        for name, tensor in direction.items():
            tensor -= (factors.view(-1, *[1] * (tensor.ndim - 1)) * component[name]).to(tensor.dtype)


def draw_like(component: Named, streams: Sequence[np.random.Generator]) -> dict[str, Float[Tensor, "member ..."]]:
    """A normal random direction of each member, from its own stream, with the norm of ``component`` in every tensor."""
    drawn = {}
    for name, tensor in component.items():
        noise = torch.from_numpy(
            np.stack([stream.standard_normal(tuple(tensor.shape[1:]), np.float32) for stream in streams])
        ).double()
        sizes = tensor.double().reshape(len(tensor), -1).norm(dim=1).cpu() / noise.reshape(len(tensor), -1).norm(dim=1)
        drawn[name] = (noise * sizes.view(-1, *[1] * (tensor.ndim - 1))).to(tensor)
    return drawn


class KnockOut:
    """The knock-out of one training: `before_step` once its gradients are there, `after_step` once its optimizer has moved.

    Components are found at the steps (from 0) that are multiples of ``config.refresh`` and kept in between: a resumed
    training must go on at one of these. A random component is drawn then, from a stream that is named after the step.
    """

    def __init__(
        self,
        config: KnockOutConfig,
        leaves: Mapping[str, Tensor],
        compute_traits: ComputeTraits,
        seed: int,
        streams: Sequence[tuple[str | int, ...]],
        *,
        stacked: bool,
    ) -> None:
        """``streams``: the names of each member's draws. ``stacked``: whether the leaves have an axis of members."""
        self._config = config
        self._leaves = leaves
        self._compute_traits = compute_traits
        self._seed, self._streams = seed, streams
        self._stacked = stacked
        self._components: Sequence[Named] = ()
        self._before: dict[str, Tensor] = {}

    def before_step(self, step: int) -> None:
        """Find the components where they are due, and take them out of the leaves' gradients where these are knocked out.

        ``step``: the optimizer steps done so far. Leaves without a gradient are those that imitation does not reach.
        """
        config = self._config
        if step % config.refresh == 0:
            self._components = self._compute_traits(step)
            if config.component == "random":
                self._components = [
                    draw_like(
                        component, [random_stream(self._seed, *name, "knock-out", step, number) for name in self._streams]
                    )
                    for number, component in enumerate(self._components)
                ]
        assert self._components, f"knock-out begins at step {step}, which is no multiple of refresh = {config.refresh}"
        if config.scope == "model":
            for leaf in self._leaves.values():
                leaf.grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        moved = {name: leaf for name, leaf in self._leaves.items() if leaf.grad is not None}
        if config.where == "gradient":
            self._take_out({name: self._members(leaf.grad) for name, leaf in moved.items() if leaf.grad is not None})
        else:
            self._before = {name: self._members(leaf.detach()).clone() for name, leaf in moved.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Take the components out of the update that the optimizer has made, where updates are knocked out."""
        if self._config.where == "gradient":
            return
        after = {name: self._members(self._leaves[name].detach()) for name in self._before}
        moved = {name: before - after[name] for name, before in self._before.items()}
        found = find_coefficients(moved, self._components, self._config.when)
        subtract_components(after, self._components, -found)  # v has the opposite sign of what is added to θ

    def _take_out(self, direction: Named) -> None:
        subtract_components(direction, self._components, find_coefficients(direction, self._components, self._config.when))

    def _members(self, tensor: Tensor) -> Tensor:
        return tensor if self._stacked else tensor[None]


def _solve_in_span(
    gram: Float[Tensor, "component component"], products: Float[Tensor, " component"]
) -> Float[Tensor, " component"]:
    if not gram.isfinite().all():
        return torch.full_like(products, torch.nan)  # the watch over losses and weights says so
    solved: Tensor = torch.linalg.pinv(gram, hermitian=True) @ products
    return solved


def _solve_in_cone(
    gram: Float[Tensor, "component component"], products: Float[Tensor, " component"]
) -> Float[Tensor, " component"]:
    """Non-negative least squares ‖v − Σ c_k t_k‖², from a root of the Gram matrix in the place of the t_k."""
    if not (gram.isfinite().all() and products.isfinite().all()):
        return torch.full_like(products, torch.nan)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    roots, vectors = values[kept].sqrt(), vectors[:, kept]
    if not len(roots):
        return torch.zeros_like(products)
    solved, _ = nnls((roots[:, None] * vectors.T).numpy(), (vectors.T @ products / roots).numpy())
    return torch.from_numpy(solved)

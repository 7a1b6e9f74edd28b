"""Recording: one pass over some inputs, in which collectors take from all hook points at once what they sum up.

Nothing is kept per prompt, so that memory does not grow with their number; the pass ends after the last hook point that is
asked for.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.backends import ForwardStopped, ModelView, Visit
from mechsub.activations.hook_points import HookPoint
from mechsub.activations.inputs import ModelInputs


@runtime_checkable
class Collector(Protocol):
    """Sums something up of what passes at hook points."""

    def add(self, point: HookPoint, activations: Float[Tensor, "row position width"], batch: int) -> None:
        """Take one batch's activations at one hook point; they are not to be kept."""


def record(
    view: ModelView, batches: Sequence[ModelInputs], points: Sequence[HookPoint], collectors: Sequence[Collector]
) -> None:
    """Run a model over batches; every collector sees every batch at every hook point once. No gradients are kept."""
    for number, seen in enumerate(_run(view, batches, points, collectors)):
        assert seen == number


def _run(
    view: ModelView, batches: Sequence[ModelInputs], points: Sequence[HookPoint], collectors: Sequence[Collector]
) -> Iterator[int]:
    waiting: set[str] = set()
    number = 0

    def visit(point: HookPoint) -> Visit:
        def see(activations: Tensor) -> None:
            rows = activations if activations.ndim == 3 else activations.unsqueeze(1)
            for collector in collectors:
                collector.add(point, rows, number)
            waiting.discard(point.name)
            if not waiting:
                raise ForwardStopped

        return see

    device = next(view.model.parameters()).device
    with view.visiting({point: visit(point) for point in points}):
        for number, batch in enumerate(batches):
            waiting.update(point.name for point in points)
            with torch.no_grad(), suppress(ForwardStopped):
                view.model(**batch.arguments_on(device))
            yield number


class Means:
    """Weighted sums Σ w h of activations, and of their norms, at every hook point: means over chosen positions and prompts.

    One pass gives many: each group is a column of weights, as the mean over one position policy, or over prompts whose
    labels were drawn.
    """

    def __init__(self, weights: Sequence[Float[Tensor, "_row _position group"]], points: Sequence[HookPoint] = ()) -> None:
        """``points``: where sums are to be taken, so that they have their place before the pass.

        Small memory that is claimed in the midst of a forward pass and kept makes the allocator give large buffers back and
        fetch them again: 7 % of a pass on a CPU. Sums elsewhere get their place with their first batch.
        """
        self._weights = weights
        self.sums: dict[str, Float[Tensor, "group width"]] = {}
        """Σ w h by hook point, in float64."""
        self.norms: dict[str, Float[Tensor, " group"]] = {}
        """Σ w ‖h‖ by hook point, in float64."""
        self._placed: tuple[int, Tensor] | None = None
        for point in points:
            self._make_room(point, weights[0].shape[-1])

    def add(self, point: HookPoint, activations: Float[Tensor, "row position width"], batch: int) -> None:
        """Add one batch: products in float32 at least, sums over batches in float64."""
        wide = activations if activations.dtype in (torch.float32, torch.float64) else activations.float()
        weights, flat = self._place(batch, wide), wide.flatten(0, 1)
        if point.name not in self.sums:
            self._make_room(point, len(weights))
        if self.sums[point.name].device != flat.device:
            self.sums[point.name] = self.sums[point.name].to(flat.device)
            self.norms[point.name] = self.norms[point.name].to(flat.device)
        self.sums[point.name] += weights @ flat
        self.norms[point.name] += weights @ flat.norm(dim=-1)

    def _make_room(self, point: HookPoint, groups: int) -> None:
        self.sums[point.name] = torch.zeros(groups, point.width, dtype=torch.float64)
        self.norms[point.name] = torch.zeros(groups, dtype=torch.float64)

    def _place(self, batch: int, like: Tensor) -> Float[Tensor, "group place"]:
        """A batch's weights beside its activations, moved once for all hook points: a GPU would wait for every copy."""
        if self._placed is not None:
            number, weights = self._placed
            if number == batch and weights.dtype == like.dtype and weights.device == like.device:
                return weights
        moved = self._weights[batch].flatten(0, 1).T.contiguous().to(like)
        self._placed = batch, moved
        return moved


class Covariances:
    """Weighted second moments Σ w h hᵀ at every hook point; with `Means` of the same weights, covariances.

    In float64 about a fixed shift, the first batch's mean, so that nothing cancels where activations lie far from 0.
    """

    def __init__(self, weights: Sequence[Float[Tensor, "_row _position"]]) -> None:
        self._weights = weights
        self._shifts: dict[str, Float[Tensor, " width"]] = {}
        self._first: dict[str, Float[Tensor, " width"]] = {}
        self._second: dict[str, Float[Tensor, "width width"]] = {}
        self._total: dict[str, Tensor] = {}

    def add(self, point: HookPoint, activations: Float[Tensor, "row position width"], batch: int) -> None:
        """Add one batch."""
        flat, weights = activations.double().flatten(0, 1), self._weights[batch].to(activations.device).double().flatten()
        if point.name not in self._shifts:
            self._shifts[point.name] = (weights @ flat) / weights.sum()
            self._first[point.name] = torch.zeros_like(flat[0])
            self._second[point.name] = flat.new_zeros(flat.shape[1], flat.shape[1])
            self._total[point.name] = weights.new_zeros(())
        centred = flat - self._shifts[point.name]
        self._first[point.name] += weights @ centred
        self._second[point.name] += centred.T @ (weights[:, None] * centred)
        self._total[point.name] += weights.sum()

    def covariance(self, point: HookPoint) -> Float[Tensor, "width width"]:
        """Σ w (h − m)(h − m)ᵀ / Σ w about the weighted mean m, in squared units of activations."""
        total = self._total[point.name]
        mean = self._first[point.name] / total
        covariance: Tensor = self._second[point.name] / total - mean[:, None] * mean
        return covariance


class Projections:
    """⟨h, d⟩ on given directions at every hook point, for every position of every row: a few numbers a token."""

    def __init__(self, directions: dict[str, Float[Tensor, "direction width"]]) -> None:
        self._directions = directions
        self.coefficients: dict[str, list[Float[Tensor, "_row _position direction"]]] = {name: [] for name in directions}
        """By hook point, one a batch; in units of activations for directions of length 1."""

    def add(self, point: HookPoint, activations: Float[Tensor, "row position width"], batch: int) -> None:
        """Add one batch."""
        directions = self._directions[point.name].to(activations.device)
        self.coefficients[point.name].append((activations.to(directions.dtype) @ directions.T).cpu())

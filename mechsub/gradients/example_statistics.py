"""What a set of examples says of directions: totals, shares and cosine-like means from overlaps by tensor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import nn

from mechsub.gradients.losses import ExampleLosses, mean_gradient
from mechsub.gradients.per_example import Direction, ExampleOverlaps, record_overlaps
from mechsub.statistics.intervals import Interval
from mechsub.streams import random_stream

QUANTILES = (0.05, *(round(0.1 * number, 1) for number in range(1, 10)), 0.95)
"""At which the distribution over examples is told."""
_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 50
Record = Callable[[nn.Module, ExampleLosses, Sequence[Direction]], ExampleOverlaps]
"""A way to take overlaps, in all parameters of a model or in some."""


@dataclass(frozen=True)
class ExampleReading:
    """Steps of plain gradient descent on single examples, −∇ℓ_i, against directions."""

    overlaps: Float[np.ndarray, "example direction tensor"]
    """⟨−∇ℓ_i, d⟩: positive where a step on the example moves along d."""
    gradient_squares: Float[np.ndarray, "example tensor"]
    mean_gradient: Direction
    """mean_i ∇ℓ_i, by tensor."""
    direction_squares: Float[np.ndarray, "direction tensor"]
    losses: Float[np.ndarray, " example"]
    covered_share: float = 1.0
    """Of ‖mean_i ∇ℓ_i‖² over the whole model, what lies in the tensors that were read; in [0, 1], NaN where it is 0."""

    @property
    def totals(self) -> Float[np.ndarray, "example direction"]:
        """⟨−∇ℓ_i, d⟩ over all tensors."""
        found: np.ndarray = self.overlaps.sum(-1)
        return found

    @property
    def norms(self) -> Float[np.ndarray, " example"]:
        """‖∇ℓ_i‖ ≥ 0 over all tensors, in the unit of the loss over that of the weights."""
        return np.asarray(np.sqrt(self.gradient_squares.sum(-1)))

    @property
    def root_mean_square(self) -> float:
        """√(mean_i ‖∇ℓ_i‖²)."""
        return float(np.sqrt(self.gradient_squares.sum(-1).mean()))

    @property
    def positive_share(self) -> Float[np.ndarray, " direction"]:
        """The share of examples with ⟨−∇ℓ_i, d⟩ > 0, in [0, 1]; NaN where no example has another overlap than 0."""
        totals = self.totals
        touches = _are_finite(totals) & (totals != 0).any(0)
        return np.where(touches, (totals > 0).mean(0), np.nan)

    def cosines(self, tensors: Bool[np.ndarray, " tensor"] | None = None) -> Float[np.ndarray, " direction"]:
        """mean_i ⟨−∇ℓ_i, d⟩ / (‖mean_i ∇ℓ_i‖ ‖d‖) in some tensors, or in all; NaN where one of the two lengths is 0.

        The cosine of the descent on all examples together with d: range [−1, 1], no unit.
        """
        chosen = slice(None) if tensors is None else tensors
        length = np.sqrt(self._mean_squares[chosen].sum() * self.direction_squares[:, chosen].sum(-1))
        return _ratio(self.overlaps[:, :, chosen].sum(-1).mean(0), length)

    @cached_property
    def _mean_squares(self) -> Float[np.ndarray, " tensor"]:
        return np.array([float(tensor.double().square().sum()) for tensor in self.mean_gradient.values()])

    def quantiles(self) -> Float[np.ndarray, "direction quantile"]:
        """Quantiles over examples of ⟨−∇ℓ_i, d⟩ / (√(mean_i ‖∇ℓ_i‖²) ‖d‖); no unit.

        One length for all examples: a mean of their own cosines would let those with hardly a gradient speak as loud as others.
        """
        scaled = _ratio(self.totals, self.root_mean_square * np.sqrt(self.direction_squares.sum(-1)))
        found: np.ndarray = np.quantile(scaled, QUANTILES, axis=0).T
        return found


def read_examples(
    model: nn.Module, losses: ExampleLosses, directions: Sequence[Direction], record: Record = record_overlaps
) -> ExampleReading:
    """Overlaps, lengths and mean gradient of the examples, in the parameters that ``record`` covers.

    See `mechsub.gradients.per_example.record_overlaps`, which covers all.

    Raises:
        AnalysisError: the model uses a parameter in a way that is not known there.
    """
    found = record(model, losses, directions)
    gradient = mean_gradient(model, losses)
    every, covered = (sum(_square(gradient, name) for name in names) for names in (gradient, found.parameters))
    squares = [[_square(direction, name) for name in found.parameters] for direction in directions]
    return ExampleReading(
        overlaps=-found.overlaps.numpy(),
        gradient_squares=found.squared_norms.numpy(),
        mean_gradient={name: gradient[name] for name in found.parameters},
        direction_squares=np.array(squares).reshape(len(directions), len(found.parameters)),
        losses=found.losses.double().numpy(),
        covered_share=covered / every if every > 0 else float("nan"),
    )


def bootstrap_cosines(reading: ExampleReading, confidence: float = 0.95) -> list[Interval]:
    """`ExampleReading.cosines` by direction, with percentile bootstrap intervals over the examples.

    The examples are drawn anew in the mean overlap; the two lengths that it is divided by are held, since ‖mean_i ∇ℓ_i‖ of a
    resample is longer by what its repetitions add. No unit. Bounds are NaN with one example, all is NaN where a length is 0.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife".
    """
    cosines, totals, intervals = reading.cosines(), reading.totals, []
    for number, cosine in enumerate(map(float, cosines)):
        low = high = float("nan")
        overlaps, n = totals[:, number], len(totals)
        if n > 1 and np.isfinite(cosine) and overlaps.mean() != 0:
            found = stats.bootstrap(
                (overlaps,),
                np.mean,
                confidence_level=confidence,
                n_resamples=_RESAMPLES,
                batch=_RESAMPLES_AT_ONCE,
                method="percentile",
                random_state=random_stream(0, "example-bootstrap"),
            ).confidence_interval
            # The length by which the mean overlap becomes the cosine.
            low, high = (float(bound) * cosine / float(overlaps.mean()) for bound in found)
        intervals.append(Interval(cosine, low, high, n, confidence))
    return intervals


def descent_cosines(gradient: Direction, directions: Sequence[Direction]) -> Float[np.ndarray, " direction"]:
    """cos(−∇L, d): where a step of plain gradient descent goes; range [−1, 1], no unit, NaN where one of the two is 0.

    Of a mean gradient it is `ExampleReading.cosines`, without the examples one by one.
    """
    inner = np.array([sum(_inner(gradient[name], d[name]) for name in gradient if name in d) for d in directions])
    square = sum(_square(gradient, name) for name in gradient)
    squares = np.array([sum(_square(d, name) for name in gradient) for d in directions])
    return _ratio(-inner, np.sqrt(square * squares))


def _inner(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.double() * second.to(first.device).double()).sum())


def _square(direction: Mapping[str, torch.Tensor], name: str) -> float:
    return float(direction[name].double().square().sum()) if name in direction else 0.0


def _are_finite(values: Float[np.ndarray, "example direction"]) -> Bool[np.ndarray, " direction"]:
    return np.asarray(np.isfinite(values).all(0))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where the denominator is 0."""
    nothing = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), np.nan)
    ratio: np.ndarray = np.divide(numerator, denominator, out=nothing, where=denominator > 0)
    return ratio

"""Linear probes that tell two models' activations apart: fitted on one half of the prompts, tried on the other."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.similarity import HalvedMoments

RIDGE = 0.1
"""What is added to a probe's covariance, as a share of its mean variance: fixed, so that nothing is tuned on what is tested."""
_NO_SPREAD = 1e-12
"""Of the squared length of a mean: what scatters less than that share of it does so by rounding."""


@dataclass(frozen=True)
class Cloud:
    """Where one model's activations lie at a hook point, over the rows of some prompts."""

    mean: Float[Tensor, " width"]
    covariance: Float[Tensor, "width width"]
    num_rows: int

    @property
    def is_finite(self) -> bool:
        """Whether no row holds NaN or ∞."""
        return bool(self.mean.isfinite().all())

    def rotate(self, rotation: Float[Tensor, "width other_width"]) -> "Cloud":
        """In another basis, h ↦ h R."""
        return Cloud(self.mean @ rotation, rotation.T @ self.covariance @ rotation, self.num_rows)


Halves = tuple[Cloud, Cloud]
"""Of even and of odd prompts."""


def mean_of(halves: Halves) -> Float[Tensor, " width"]:
    """The mean over the rows of both halves."""
    even, odd = halves
    share = even.num_rows / (even.num_rows + odd.num_rows)
    mean: Tensor = share * even.mean + (1 - share) * odd.mean
    return mean


def left_halves(moments: HalvedMoments) -> Halves:
    """The clouds of the left model, on the CPU."""
    return _halves(moments, 0)


def right_halves(moments: HalvedMoments) -> Halves:
    """The clouds of the right model, on the CPU."""
    return _halves(moments, 1)


def fit_probe(one: Cloud, other: Cloud) -> Float[Tensor, " width"]:
    """The ridge-regularised linear discriminant of two models' activations, w = (C + λ 1)⁻¹ (m − m′).

    C is the mean of the two covariances, λ = `RIDGE` · tr C / width. It points from ``other`` to ``one``.

    Source: Fisher 1936; Friedman 1989, Journal of the American Statistical Association 84 (regularised).
    """
    covariance = (one.covariance + other.covariance) / 2
    ridge = RIDGE * float(covariance.diagonal().mean())
    identity = torch.eye(len(covariance), dtype=covariance.dtype)
    probe: Tensor = torch.linalg.solve(covariance + (ridge or 1.0) * identity, one.mean - other.mean)
    return probe


def separation(probe: Float[Tensor, " width"], one: Cloud, other: Cloud) -> float:
    """d′ = ⟨w, m − m′⟩ / √(½ wᵀ(C + C′)w): how far apart a probe sees two models, in the spread of one over prompts.

    No unit; of normal activations the probe tells a row of one from a row of the other with AUROC Φ(d′ / √2). 0 where it
    tells nothing, as a probe of two models that are one; negative where it takes them for each other. NaN where the probe sees
    no spread.
    """
    if not probe.any():
        return 0.0
    spread = float(probe @ (one.covariance + other.covariance) @ probe) / 2
    seen = float(probe.square().sum() * (one.mean.square().sum() + other.mean.square().sum())) / 2
    if spread <= _NO_SPREAD * seen:
        return float("nan")
    return float(probe @ (one.mean - other.mean)) / math.sqrt(spread)


def try_separation(probes: Sequence[Float[Tensor, " width"]], one: Halves, other: Halves) -> float:
    """`separation` by probes of either half, each on the half that it was not fitted on; their mean."""
    found = [separation(*tried) for tried in zip(probes, one[::-1], other[::-1], strict=True)]
    return sum(found) / len(found)


def share_of_the_way(
    probes: Sequence[Float[Tensor, " width"]], moved: Halves, start: Halves, end: Halves, begin: Halves
) -> float:
    """Σ ⟨w, m_moved − m_start⟩ / Σ ⟨w, m_end − m_begin⟩, over probes, each on the half that it was not fitted on.

    How much of the way from ``begin`` to ``end`` a model has gone from its ``start``, as a frozen probe sees it: 0 none, 1 all
    of it. No unit, not bounded. NaN where the probes see no way at all.
    """
    triples = list(zip(probes, moved[::-1], start[::-1], end[::-1], begin[::-1], strict=True))
    way = sum(float(probe @ (last.mean - first.mean)) for probe, _, _, last, first in triples)
    gone = sum(float(probe @ (there.mean - here.mean)) for probe, there, here, _, _ in triples)
    return gone / way if way else float("nan")


def _halves(moments: HalvedMoments, side: int) -> Halves:
    even, odd = (
        Cloud(half.means[side].cpu(), half.covariances[side].cpu(), half.num_rows) for half in (moments.even, moments.odd)
    )
    return even, odd

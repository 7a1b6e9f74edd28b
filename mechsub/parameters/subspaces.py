"""Singular spectra and singular subspaces of matrices, how far two subspaces overlap, and what chance would give (Haar).

Left is the output side, the rows of a matrix [out, in]; right is the input side, its columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsub.checkpoints import Factors

EXACT_UP_TO = 1024
"""The longest shorter side of a matrix that is decomposed exactly; over it, by a random sketch."""
OVERSAMPLING, POWER_ITERATIONS = 16, 6
"""Of the random sketch: columns beyond those asked for, and how often it is multiplied by A Aᵀ."""
RELATIVE_TOLERANCE = float(np.finfo(np.float32).eps)
"""A singular value counts if it is over this × the longer side × the largest one, as in `numpy.linalg.matrix_rank`."""

SIDES = ("left", "right")
STATUS = (
    "ok",
    "zero_displacement",
    "k_spans_side",
    "rank_below_k",
    "not_finite",
    "spectrum_truncated",
    "no_such_value",
    "not_run",
    "incomparable",
)
OK, ZERO, SPANS, BELOW, NOT_FINITE, TRUNCATED, NO_VALUE, NOT_RUN, INCOMPARABLE = range(len(STATUS))


@dataclass(frozen=True)
class Spectrum:
    """Singular values and leading singular vectors of several matrices of one shape, in float64.

    Vectors beyond a matrix's rank mean nothing; `rank` says where that is.
    """

    values: Float[Tensor, "matrix value"]
    """Descending; all of them where `is_whole`, else the leading ones."""
    left: Float[Tensor, "matrix row top"]
    right: Float[Tensor, "matrix column top"]
    square: Float[Tensor, " matrix"]
    """‖A‖_F²; NaN where A is not finite."""
    backward_error: Float[Tensor, " matrix"]
    """‖A V − U Σ‖_F / ‖A‖_F of the leading vectors: they are exactly those of a matrix that differs from A by this share.

    Since Aᵀ U = V Σ holds by construction, that matrix is A − (A V − U Σ) Vᵀ. 0 where A is 0.
    """
    noise: Float[Tensor, " matrix"]
    """Singular values up to this could be made by the rounding of what was stored."""
    is_whole: bool

    @property
    def rank(self) -> Int[Tensor, " matrix"]:
        """How many singular values are over the tolerance and the noise; of the known ones."""
        longer = max(self.left.shape[1], self.right.shape[1])
        floor = torch.maximum(RELATIVE_TOLERANCE * longer * self.values[:, 0], self.noise)
        return (self.values > floor[:, None]).sum(1)

    @property
    def tail(self) -> Float[Tensor, " matrix"]:
        """‖A − A_k‖_F / ‖A‖_F of the leading k = ``left.shape[2]`` vectors, from ‖A‖² − Σσ²: what they leave out."""
        kept = self.values[:, : self.left.shape[2]].square().sum(1)
        return ((self.square - kept).clamp(min=0) / self.square.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()

    @classmethod
    def join(cls, spectra: Sequence["Spectrum"]) -> "Spectrum":
        """Those of several matrices as one; of adapters of unlike rank, the missing singular values are 0."""
        width = max(one.values.shape[1] for one in spectra)
        values = [torch.nn.functional.pad(one.values, (0, width - one.values.shape[1])) for one in spectra]
        others = ("left", "right", "square", "backward_error", "noise")
        joined = {name: torch.cat([getattr(one, name) for one in spectra]) for name in others}
        return cls(values=torch.cat(values), **joined, is_whole=all(one.is_whole for one in spectra))


@dataclass(frozen=True)
class Products:
    """One matrix A [row, column] that is known by its products with thin matrices alone; in float64."""

    shape: tuple[int, int]
    times: Callable[[Tensor], Tensor]
    """X [column, any] to A X."""
    transposed_times: Callable[[Tensor], Tensor]
    """Y [row, any] to Aᵀ Y."""
    square: Tensor
    """‖A‖_F², a scalar; where it is not finite, nothing is multiplied."""

    @classmethod
    def of(cls, matrix: Float[Tensor, "row column"]) -> "Products":
        """Those of a matrix in memory."""
        square = torch.linalg.vector_norm(matrix).square()
        return cls((matrix.shape[0], matrix.shape[1]), matrix.__matmul__, matrix.mT.__matmul__, square)


def decompose_dense(
    matrices: Float[Tensor, "matrix row column"],
    top: int,
    *,
    noise: Float[Tensor, " matrix"] | None = None,
    streams: Sequence[np.random.Generator] = (),
    exact_up_to: int = EXACT_UP_TO,
) -> Spectrum:
    """Singular values, and the ``top`` leading singular vectors, in the unit of the matrices.

    Up to ``exact_up_to`` exactly, from the eigenvectors of the smaller of A Aᵀ and Aᵀ A in float64: a value σ is then good
    to about ε σ₁²/σ with ε = 2e-16, which is ≤ 1e-8 σ₁ and under the tolerance of `Spectrum.rank`; it takes half of the
    time of an SVD. Over it by `decompose_products`. Each matrix wants a stream of its own there: with a common sketch, the
    errors of two matrices lie in common directions, and noise seems to overlap.

    Memory: matrices in float64 are not copied; their products with themselves take two times shorter side² × 8 bytes each.

    Raises:
        ValueError: a sketch is needed and there is not a stream for each matrix.
    """
    exact = min(matrices.shape[1:]) <= exact_up_to
    if not exact and len(streams) != len(matrices):
        raise ValueError(f"{len(matrices)} matrices {tuple(matrices.shape[1:])} need a random stream each, not {len(streams)}")
    matrices = matrices.double()
    noise = matrices.new_zeros(len(matrices)) if noise is None else noise.to(matrices)
    if not exact:
        wanted = zip(matrices, streams, noise, strict=True)
        return Spectrum.join([decompose_products(Products.of(matrix), top, stream, own) for matrix, stream, own in wanted])
    square = torch.linalg.vector_norm(matrices, dim=(1, 2)).square()
    finite = torch.isfinite(square)
    if not finite.all():
        matrices = torch.where(finite[:, None, None], matrices, 0.0)
    values, left, right = _decompose_exactly(matrices, top)
    missed = matrices @ right - left * _pad(values, top)[:, None, :]
    square = torch.where(finite, square, torch.nan)
    return Spectrum(values, left, right, square, _relative(missed, square), noise, True)


def decompose_products(products: Products, top: int, stream: np.random.Generator, noise: Float[Tensor, ""]) -> Spectrum:
    """The ``top`` leading singular values and vectors of one matrix by a random sketch with power iterations.

    `Spectrum.backward_error` is its error as it came out. The matrix is gone through 2 · `POWER_ITERATIONS` + 3 times.
    Source: Halko, Martinsson & Tropp 2011, algorithms 4.4 and 5.1.
    """
    square = products.square
    if torch.isfinite(square):
        values, left, right = _sketch(products, top, stream)
        missed = products.times(right) - left * values
    else:
        square = torch.full_like(square, torch.nan)
        values = square.new_zeros(top)
        left, right = (square.new_zeros(length, top) for length in products.shape)
        missed = left
    error = _relative(missed[None], square[None])
    return Spectrum(values[None], left[None], right[None], square[None], error, noise.to(square)[None], False)


def decompose_low_rank(factors: Factors, top: int) -> Spectrum:
    """The same of one product ``rows @ columns``, which is never formed: the QR of each factor, then the SVD of R_r R_cᵀ."""
    rows, columns = factors.rows.double(), factors.columns.double()
    finite = bool(torch.isfinite(rows).all() and torch.isfinite(columns).all())
    if not finite:
        rows, columns = torch.zeros_like(rows), torch.zeros_like(columns)
    (left_base, left_core), (right_base, right_core) = torch.linalg.qr(rows), torch.linalg.qr(columns.mT)
    left, values, right = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    kept = (values > 0).to(values)[:top]
    left, right = _pad(left_base @ left[:, :top] * kept, top), _pad(right_base @ right.mT[:, :top] * kept, top)
    missed = rows @ (columns @ right) - left * _pad(values, top)
    square = values.square().sum()[None] if finite else values.new_full((1,), torch.nan)
    return Spectrum(
        values[None], left[None], right[None], square, _relative(missed[None], square), torch.zeros_like(square), True
    )


def _decompose_exactly(matrices: Float[Tensor, "matrix row column"], top: int) -> tuple[Tensor, Tensor, Tensor]:
    """(values, left, right): eigenvectors of the smaller side, and the other side from them."""
    flip = matrices.shape[1] > matrices.shape[2]
    sides = matrices.mT if flip else matrices
    squares, vectors = torch.linalg.eigh(sides @ sides.mT)
    values = squares.flip(-1).clamp(min=0).sqrt()
    leading = values[:, None, :top]
    near = torch.where(leading > 0, vectors.flip(-1)[:, :, :top], 0.0)
    far = sides.mT @ near / torch.where(leading > 0, leading, 1.0)
    near, far = _pad(near, top), _pad(far, top)
    return (values, far, near) if flip else (values, near, far)


def _sketch(products: Products, top: int, stream: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(values, left, right) of one large matrix from a random sketch of its columns' span."""
    width = min(top + OVERSAMPLING, *products.shape)
    sketch = torch.from_numpy(stream.standard_normal((products.shape[1], width))).to(products.square)
    base = torch.linalg.qr(products.times(sketch)).Q
    for _ in range(POWER_ITERATIONS):  # orthonormal in between, or all columns turn to the leading one
        base = torch.linalg.qr(products.times(torch.linalg.qr(products.transposed_times(base)).Q)).Q
    small, values, right = torch.linalg.svd(products.transposed_times(base).mT, full_matrices=False)
    kept = (values > 0).to(values)[:top]
    return _pad(values[:top], top), _pad(base @ small[:, :top] * kept, top), _pad(right.mT[:, :top] * kept, top)


def _pad(values: Tensor, top: int) -> Tensor:
    """Exactly ``top`` along the last axis, zeros where there are no more."""
    return torch.nn.functional.pad(values[..., :top], (0, max(0, top - values.shape[-1])))


def _relative(missed: Float[Tensor, "matrix row top"], square: Float[Tensor, " matrix"]) -> Float[Tensor, " matrix"]:
    missing = missed.square().sum((1, 2))
    return torch.where(square > 0, missing / torch.where(square > 0, square, 1.0), 0.0).sqrt()


def effective_rank(spectrum: Spectrum) -> Float[np.ndarray, " matrix"]:
    """exp(H(p)), p = σ²/Σσ²: in [1, min(shape)], in dimensions; NaN where the matrix is 0 or its spectrum is not whole.

    Source: Roy & Vetterli 2007, "The effective rank", who take p = σ/Σσ; with squares p are shares of ‖A‖_F², and H is
    the von Neumann entropy of A Aᵀ/‖A‖_F².
    """
    if not spectrum.is_whole:
        return np.full(len(spectrum.values), np.nan)
    shares = spectrum.values.square() / spectrum.square[:, None]
    found: np.ndarray = torch.special.entr(shares).sum(1).exp().cpu().numpy()
    return found


def stable_rank(spectrum: Spectrum) -> Float[np.ndarray, " matrix"]:
    """‖A‖_F² / ‖A‖₂²: in [1, rank], in dimensions; NaN where the matrix is 0. Source: Rudelson & Vershynin 2007."""
    found: np.ndarray = (spectrum.square / spectrum.values[:, 0].square()).cpu().numpy()
    return found


def top_shares(spectrum: Spectrum, num: int) -> Float[np.ndarray, "matrix num"]:
    """Σ_{i ≤ k} σᵢ² / ‖A‖_F² for k = 1 … num, in [0, 1]; NaN where the matrix is 0 or σ_k is not known."""
    known = spectrum.values[:, :num].square().cumsum(1)
    if spectrum.is_whole:
        known = torch.cat([known, known[:, -1:].expand(-1, num - known.shape[1])], dim=1)
    shares = np.full((len(known), num), np.nan)
    shares[:, : known.shape[1]] = (known / spectrum.square[:, None]).cpu().numpy()
    np.minimum(shares, 1.0, out=shares)
    return shares


def compute_overlaps(
    first: Spectrum, second: Spectrum, ranks: Sequence[int]
) -> tuple[Float[np.ndarray, "matrix side k"], Int[np.ndarray, "matrix side k"]]:
    """‖U_kᵀ W_k‖_F² / k of the k leading singular vectors, left and right, with its status (of `STATUS`).

    The mean squared cosine of the principal angles: in [0, 1], k/d for random subspaces of R^d. NaN where a matrix is 0
    or has a rank under k (its k-th direction is noise), and on a side with d ≤ k, where any two subspaces are the same.
    Source: Björck & Golub 1973 (principal angles).
    """
    sides = []
    for one, other in ((first.left, second.left), (first.right, second.right)):
        squares = (one.mT @ other).square().cumsum(1).cumsum(2)
        sides.append(torch.stack([squares[:, k - 1, k - 1] / k for k in ranks], dim=1))
    codes = _explain_pair(first, second, ranks)
    values = torch.stack(sides, dim=1).clamp(max=1.0).cpu().numpy()
    return np.where(codes == OK, values, np.nan), codes


def principal_angles(first: Spectrum, second: Spectrum, k: int) -> Float[np.ndarray, "matrix side angle"]:
    """The k principal angles of the k leading singular vectors, ascending, in radians within [0, π/2].

    NaN where `compute_overlaps` is. arccos of the singular values of U_kᵀ W_k: angles under 1e-7 are rounding.
    """
    pairs = ((first.left, second.left), (first.right, second.right))
    cosines = torch.stack([torch.linalg.svdvals(one[:, :, :k].mT @ other[:, :, :k]) for one, other in pairs], dim=1)
    angles = torch.arccos(cosines.clamp(max=1.0)).cpu().numpy()
    return np.where(_explain_pair(first, second, [k]) == OK, angles, np.nan)


def _explain_pair(first: Spectrum, second: Spectrum, ranks: Sequence[int]) -> Int[np.ndarray, "matrix side k"]:
    """Of `STATUS`, for every overlap of two spectra."""
    wanted = np.array(ranks)
    lengths = np.array([first.left.shape[1], first.right.shape[1]])
    rank = torch.minimum(first.rank, second.rank).cpu().numpy()
    codes = np.where(rank[:, None, None] < wanted, BELOW, OK) * np.ones((1, 2, 1), dtype=int)
    codes = np.where(wanted >= lengths[:, None], SPANS, codes)
    codes[explain_matrices(first) == ZERO] = ZERO
    codes[explain_matrices(second) == ZERO] = ZERO
    codes[(explain_matrices(first) == NOT_FINITE) | (explain_matrices(second) == NOT_FINITE)] = NOT_FINITE
    return codes.astype(np.int8)


def explain_matrices(spectrum: Spectrum) -> Int[np.ndarray, " matrix"]:
    """Of `STATUS`, for every matrix by itself: ok, zero or not finite."""
    square = spectrum.square.cpu().numpy()
    return np.where(np.isnan(square), NOT_FINITE, np.where(square > 0, OK, ZERO)).astype(np.int8)


def haar_mean(k: int, dimension: int) -> float:
    """The mean overlap of two uniformly random k-dimensional subspaces of R^d, k/d."""
    return k / dimension


def sample_haar_overlaps(k: int, dimension: int, num: int, stream: np.random.Generator) -> Float[np.ndarray, " num"]:
    """Overlaps of ``num`` pairs of uniformly random k-dimensional subspaces of R^d, exactly distributed; k < d.

    The first subspace may be e₁ … e_k. A basis of the second is G (GᵀG)^(−1/2) with G Gaussian, so that the overlap is
    tr[(W₁ + W₂)⁻¹ W₁]/k with Wishart W₁ of k degrees of freedom and W₂ of d − k. Both are drawn as k × k matrices by
    Bartlett's decomposition, whatever d is; under k degrees of freedom as Gᵀ G itself.
    Source: Muirhead 1982, "Aspects of multivariate statistical theory", sections 3.2 and 3.3.
    """
    own, rest = (_sample_wishart(k, freedom, num, stream) for freedom in (k, dimension - k))
    overlaps: np.ndarray = np.trace(np.linalg.solve(own + rest, own), axis1=1, axis2=2) / k
    return overlaps


def _sample_wishart(size: int, freedom: int, num: int, stream: np.random.Generator) -> Float[np.ndarray, "num size size"]:
    if freedom < size:
        draws = stream.standard_normal((num, freedom, size))
        return np.swapaxes(draws, 1, 2) @ draws
    lower = np.tril(stream.standard_normal((num, size, size)), -1)
    diagonal = np.arange(size)
    lower[:, diagonal, diagonal] = np.sqrt(stream.chisquare(freedom - diagonal, (num, size)))
    return lower @ np.swapaxes(lower, 1, 2)

"""Similarity of two models' representations: debiased linear CKA and orthogonal Procrustes, from sums over paired rows.

Nothing of size rows × rows is formed: what is kept is of size (width + width)², however many rows there are.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsub.activations.backends import ModelView
from mechsub.activations.hook_points import HookPoint
from mechsub.activations.inputs import ModelInputs, PromptSet
from mechsub.activations.recording import record
from mechsub.errors import ActivationError

LEAST_ROWS = 4
"""With fewer rows the debiased HSIC is not defined."""
_NO_SPREAD = 1e-12
"""Of the squared length of rows: where they scatter by less than this share of it, that is rounding."""


@dataclass(frozen=True)
class ModelSide:
    """One of two models that are run on the same prompts."""

    view: ModelView
    prompts: PromptSet
    points: Sequence[HookPoint]


@dataclass(frozen=True)
class PairedRows:
    """What two models have at one hook point and one position policy in one batch: row i of both is of the same position."""

    point: str
    policy: str
    left: Float[Tensor, "row left_width"]
    right: Float[Tensor, "row right_width"]
    prompts: Int[Tensor, " row"]
    """The number of each row's prompt among all."""


def pair_rows(left: ModelSide, right: ModelSide) -> Iterator[PairedRows]:
    """Run two models in lockstep; give the rows of every batch at the hook points and policies that both have.

    Rows are in float64, on their model's device. A policy whose rows do not belong together is left out; see
    `paired_policies`. A batch's rows are all that is in memory.
    """
    policies = paired_policies(left.prompts, right.prompts)
    names = [point.name for point in left.points if point.name in {other.name for other in right.points}]
    if not policies or not names:
        return
    first = 0
    for left_batch, right_batch in zip(left.prompts.batches, right.prompts.batches, strict=True):
        sides = ((left, left_batch), (right, right_batch))
        left_rows, right_rows = (_record_rows(side, batch, names, policies) for side, batch in sides)
        for policy in policies:
            prompts = first + left_batch.positions[policy].nonzero()[:, 0]
            for name in names:
                yield PairedRows(name, policy, left_rows[name, policy], right_rows[name, policy], prompts)
        first += left_batch.num_rows


def paired_policies(left: PromptSet, right: PromptSet) -> list[str]:
    """The position policies by which the rows of two models belong together.

    Where both take the same inputs these are all that both have; else those that take one position of every prompt: models
    with other tokens, or another system prompt, still ask for an answer at the end of the same prompts.
    """
    if [batch.num_rows for batch in left.batches] != [batch.num_rows for batch in right.batches]:
        return []
    pairs = list(zip(left.batches, right.batches, strict=True))
    shared = [policy for policy in left.policies if policy in right.policies]
    if all(_has_same_inputs(*pair) for pair in pairs):
        return shared
    return [
        policy for policy in shared if all(bool((one.positions[policy].sum(-1) == 1).all()) for pair in pairs for one in pair)
    ]


@dataclass
class PairedMoments:
    """Sums over paired rows z = [x, y] of two models, about fixed shifts: all that the measures of this module need.

    About a shift near the mean nothing large is subtracted from anything large. Sums are in float64.
    """

    left_shift: Float[Tensor, " left_width"]
    right_shift: Float[Tensor, " right_width"]
    num_rows: int = 0
    _first: Float[Tensor, " both"] = field(init=False, repr=False)
    """Σ z."""
    _second: Float[Tensor, "both both"] = field(init=False, repr=False)
    """Σ z zᵀ."""
    _third: Float[Tensor, "2 both"] = field(init=False, repr=False)
    """Σ [‖x‖², ‖y‖²] zᵀ."""
    _fourth: Float[Tensor, "2 2"] = field(init=False, repr=False)
    """Σ [‖x‖², ‖y‖²] [‖x‖², ‖y‖²]ᵀ."""

    def __post_init__(self) -> None:
        both = len(self.left_shift) + len(self.right_shift)
        self._first, self._second = self.left_shift.new_zeros(both), self.left_shift.new_zeros(both, both)
        self._third, self._fourth = self.left_shift.new_zeros(2, both), self.left_shift.new_zeros(2, 2)

    @classmethod
    def about(cls, left: Float[Tensor, "row left_width"], right: Float[Tensor, "row right_width"]) -> "PairedMoments":
        """No sums yet, about the means of some rows, as those of a first batch."""
        return cls(left.double().mean(0), right.double().mean(0))

    @property
    def is_finite(self) -> bool:
        """Whether no row of either model holds NaN or ∞."""
        return bool(self._fourth.isfinite().all())

    def empty_copy(self) -> "PairedMoments":
        """No sums yet, about the same shifts."""
        return PairedMoments(self.left_shift, self.right_shift)

    def add(self, left: Float[Tensor, "left_row left_width"], right: Float[Tensor, "right_row right_width"]) -> None:
        """Add rows, pair by pair.

        Raises:
            ActivationError: two numbers of rows, or other widths than those of the shifts.
        """
        if len(left) != len(right) or left.shape[1] != len(self.left_shift) or right.shape[1] != len(self.right_shift):
            raise ActivationError(
                f"rows of {list(left.shape)} and {list(right.shape)} are no pairs of width {len(self.left_shift)} and "
                f"{len(self.right_shift)}: record both models on the same prompts, at the same hook point"
            )
        sides = (left.double() - self.left_shift, right.double() - self.right_shift)
        both = torch.cat(sides, dim=1)
        lengths = torch.stack([side.square().sum(1) for side in sides])
        self.num_rows += len(both)
        self._first += both.sum(0)
        self._second += both.T @ both
        self._third += lengths @ both
        self._fourth += lengths @ lengths.T

    def __add__(self, other: "PairedMoments") -> "PairedMoments":
        """The sums over the rows of both, which are about the same shifts.

        Raises:
            ActivationError: they are not.
        """
        shifts = ((self.left_shift, other.left_shift), (self.right_shift, other.right_shift))
        if not all(torch.equal(*pair) for pair in shifts):
            raise ActivationError("sums about other shifts cannot be added; take `empty_copy` of the first for the others")
        total = self.empty_copy()
        total.num_rows = self.num_rows + other.num_rows
        for name in ("_first", "_second", "_third", "_fourth"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def means(self) -> tuple[Float[Tensor, " left_width"], Float[Tensor, " right_width"]]:
        """Mean rows of the two models."""
        left, right = self._sides
        return self.left_shift + self._first[left] / self.num_rows, self.right_shift + self._first[right] / self.num_rows

    @property
    def covariances(self) -> tuple[Float[Tensor, "left_width left_width"], Float[Tensor, "right_width right_width"]]:
        """Covariances of the rows of the two models, Σ (h − m)(h − m)ᵀ / n."""
        left, right = self._sides
        return self._centre(left, left) / self.num_rows, self._centre(right, right) / self.num_rows

    @property
    def products(self) -> Float[Tensor, "left_width right_width"]:
        """Σ (x − x̄)(y − ȳ)ᵀ."""
        return self._centre(*self._sides)

    @property
    def scatters(self) -> tuple[float, float]:
        """Σ ‖x − x̄‖² and Σ ‖y − ȳ‖²; 0 where it is no more than rounding leaves of equal rows."""
        squares = self._second.diagonal() - self._first.square() / max(self.num_rows, 1)
        found = []
        for side, mean in zip(self._sides, self.means, strict=True):
            scatter = float(squares[side].sum())
            found.append(scatter if scatter > _NO_SPREAD * self.num_rows * float(mean.square().sum()) else 0.0)
        return found[0], found[1]

    def hsic(self, one: int, other: int) -> float:
        """The debiased HSIC of two of the sides (0: left, 1: right) with linear kernels, in products of squared units.

        With K̃ = X Xᵀ and L̃ = Y Yᵀ without their diagonals,
        [tr(K̃ L̃) + 1ᵀK̃1 · 1ᵀL̃1 / ((n − 1)(n − 2)) − 2 · 1ᵀK̃L̃1 / (n − 2)] / (n (n − 3)); NaN where n < 4. Its mean over draws of
        independent rows is 0 for independent X and Y.

        Source: Song et al. 2012, Journal of Machine Learning Research 13, eq. 5; in feature space here.
        """
        n = self.num_rows
        if n < LEAST_ROWS:
            return float("nan")
        left, right = self._sides[one], self._sides[other]
        block, fourth = self._second[left, right], self._fourth[one, other]
        sums, other_sums = self._first[left], self._first[right]
        total, other_total = (self._first[side].square().sum() - self._second.diagonal()[side].sum() for side in (left, right))
        # K̃1 = X Σx − [‖x‖²], row by row, and the same of L̃.
        across = sums @ block @ other_sums - self._third[other, left] @ sums - self._third[one, right] @ other_sums + fourth
        trace = block.square().sum() - fourth
        return float((trace + total * other_total / ((n - 1) * (n - 2)) - 2 * across / (n - 2)) / (n * (n - 3)))

    def _centre(self, one: slice, other: slice) -> Tensor:
        """A block of Σ z zᵀ about the means."""
        centred: Tensor = self._second[one, other] - self._first[one, None] * self._first[other] / max(self.num_rows, 1)
        return centred

    @property
    def _sides(self) -> tuple[slice, slice]:
        width = len(self.left_shift)
        return slice(0, width), slice(width, None)


@dataclass(frozen=True)
class HalvedMoments:
    """Paired moments of even and of odd prompts apart: what is fitted on one half is tried on the other."""

    even: PairedMoments
    odd: PairedMoments

    @classmethod
    def about(cls, rows: PairedRows) -> "HalvedMoments":
        """No sums yet, about the means of a first batch."""
        even = PairedMoments.about(rows.left, rows.right)
        return cls(even, even.empty_copy())

    def add(self, rows: PairedRows) -> None:
        """Add one batch, each row to the half of its prompt."""
        is_odd = (rows.prompts % 2 == 1).to(rows.left.device)
        self.even.add(rows.left[~is_odd], rows.right[~is_odd])
        self.odd.add(rows.left[is_odd], rows.right[is_odd])

    @property
    def whole(self) -> PairedMoments:
        """Of all prompts."""
        return self.even + self.odd

    @property
    def num_rows(self) -> int:
        """Of all prompts."""
        return self.even.num_rows + self.odd.num_rows

    @property
    def is_finite(self) -> bool:
        """Whether no row of either model holds NaN or ∞."""
        return self.even.is_finite and self.odd.is_finite


def debiased_cka(moments: PairedMoments) -> float:
    """HSIC(X, Y) / √(HSIC(X, X) HSIC(Y, Y)), debiased, with linear kernels: 1 for the same rows in any rotation and scale.

    Range [−1, 1], no unit; about 0 on average for independent rows, however few and wide. In one dimension it is a debiased
    squared correlation. NaN where there are under 4 rows, or the rows of one model do not differ. Rows that depend on each
    other, as tokens of one prompt, are taken as if they did not: the bias is then not wholly gone.

    Source: Kornblith et al., arXiv:1905.00414; debiased: Nguyen et al., arXiv:2010.15327; Murphy et al., arXiv:2405.01012.
    """
    if moments.num_rows < LEAST_ROWS or 0.0 in moments.scatters:
        return float("nan")
    scale = moments.hsic(0, 0) * moments.hsic(1, 1)
    # Rows that differ in one row only have no debiased HSIC of their own: what is left is rounding.
    floor = (_NO_SPREAD * moments.scatters[0] * moments.scatters[1] / moments.num_rows**2) ** 2
    return moments.hsic(0, 1) / math.sqrt(scale) if scale > floor else float("nan")


def fit_procrustes(moments: PairedMoments) -> Float[Tensor, "left_width right_width"]:
    """The rotation or reflection R that takes the left model's rows nearest to the right one's: R = U Vᵀ of the SVD of XᵀY.

    X and Y are centred. A vector v of the left model's basis is v R in the right one's. Of two widths the narrower is filled
    up with zeros, so that R has orthonormal rows or columns. It minimises ‖X R − Y‖² where R Rᵀ = 1, and of the filled rows.

    Raises:
        ActivationError: no more rows than a model is wide, which any rotation could fit.

    Source: Schönemann 1966, Psychometrika 31, "A generalized solution of the orthogonal Procrustes problem".
    """
    width = max(len(moments.left_shift), len(moments.right_shift))
    if moments.num_rows <= width:
        raise ActivationError(
            f"{moments.num_rows} rows cannot fix a rotation of width {width}; fit it on more rows than that: on all tokens, or "
            "on more prompts"
        )
    left, _, right = torch.linalg.svd(moments.products, full_matrices=False)
    rotation: Tensor = left @ right
    return rotation


def procrustes_distance(moments: PairedMoments, rotation: Float[Tensor, "left_width right_width"]) -> float:
    """‖X R − Y‖² / ‖Y‖² of centred rows, of others than R was fitted on: 0 where the two differ by that rotation only.

    At least 0, no unit; 1 + ‖X‖² / ‖Y‖² on average for a rotation that has nothing to do with the rows. Where X is the wider,
    Y is filled up with zeros and what R leaves of X counts as well. NaN where the rows of Y do not differ.
    """
    left, right = moments.scatters
    if right == 0 or moments.num_rows < 2:
        return float("nan")
    agreement = float((rotation * moments.products).sum())
    return max(0.0, (left + right - 2 * agreement) / right)  # rounding can take it a little under 0


def procrustes_correlation(moments: PairedMoments, rotation: Float[Tensor, "left_width right_width"]) -> float:
    """⟨X R, Y⟩ / (‖X‖ ‖Y‖) of centred rows, of others than R was fitted on.

    Range [−1, 1], no unit; 1 where the two differ by that rotation and a scale, 0 on average for a rotation that has nothing to
    do with the rows. Its square is the share of ‖Y‖² that X R explains at the best scale. NaN where the rows of one model do
    not differ.
    """
    left, right = moments.scatters
    if 0.0 in (left, right) or moments.num_rows < 2:
        return float("nan")
    return float((rotation * moments.products).sum()) / math.sqrt(left * right)


def try_procrustes(
    halves: HalvedMoments,
    measure: Callable[[PairedMoments, Float[Tensor, "left_width right_width"]], float] = procrustes_distance,
) -> float:
    """A measure of the rotation that is fitted on even prompts, tried on odd ones.

    NaN where the even ones give no more rows than a model is wide, or the rows of one model do not differ.
    """
    if halves.even.num_rows <= max(len(halves.even.left_shift), len(halves.even.right_shift)):
        return float("nan")
    return measure(halves.odd, fit_procrustes(halves.even))


class _Kept:
    """A `Collector` that keeps the chosen rows of one batch."""

    def __init__(self, batch: ModelInputs, policies: Sequence[str]) -> None:
        self._batch, self._policies = batch, policies
        self.rows: dict[tuple[str, str], Float[Tensor, "row width"]] = {}

    def add(self, point: HookPoint, activations: Float[Tensor, "row position width"], batch: int) -> None:
        for policy in self._policies:
            chosen = self._batch.positions[policy].to(activations.device)
            self.rows[point.name, policy] = activations[chosen].double()


def _record_rows(
    side: ModelSide, batch: ModelInputs, names: Sequence[str], policies: Sequence[str]
) -> dict[tuple[str, str], Tensor]:
    kept = _Kept(batch, policies)
    record(side.view, [batch], [point for point in side.points if point.name in names], [kept])
    return kept.rows


def _has_same_inputs(left: ModelInputs, right: ModelInputs) -> bool:
    if left.arguments.keys() != right.arguments.keys() or left.positions.keys() != right.positions.keys():
        return False
    pairs = [(left.arguments[name], right.arguments[name]) for name in left.arguments]
    pairs += [(left.positions[name], right.positions[name]) for name in left.positions]
    return all(torch.equal(one, two) if isinstance(one, Tensor) else one == two for one, two in pairs)

"""A screening's numbers as labelled arrays, each that can be NaN with its reason."""

from enum import IntEnum
from typing import Any

import numpy as np
import xarray as xr

from mechsub.families.language.examples_file import FileExamples
from mechsub.gradients.example_statistics import QUANTILES
from mechsub.results import label_variable, status_variable
from mechsub.screening.measure import BASELINES, PERMUTATIONS, Measured
from mechsub.statistics.intervals import Interval
from mechsub.statistics.prediction import Association

SOURCE = "a training step's first-order effect by example: Pruthi et al., arXiv:2002.08484; Cloud et al., arXiv:2507.14805"
COSINE = "mean_i ⟨−∇ℓ_i, d⟩ / (‖mean_i ∇ℓ_i‖ ‖d‖)"
SCALED = "⟨−∇ℓ_i, d⟩ / (√(mean_i ‖∇ℓ_i‖²) ‖d‖)"
BASELINE_WORDS = {
    "log_ratio": ("log-ratio of teacher and reference", "log p_T(x) − log p₀(x), x the completion", "nats"),
    "loss": ("loss of the reference", "−log p₀(x), mean over completion tokens", "nats"),
    "length": ("length of the completion", "number of completion tokens", "tokens"),
    "gradient_norm": ("length of the example's gradient", "‖∇ℓ_i‖", "loss / weight"),
}
_BOUNDS = ("estimate", "low", "high")


class Why(IntEnum):
    """Why a value is NaN."""

    OK = 0
    NO_TEACHER = 1
    NO_NEUTRAL_DATA = 2
    NOTHING_TO_PERMUTE = 3
    """All examples have one prompt, or one completion."""
    TOO_FEW_EXAMPLES = 4
    """An interval or a regression needs more."""
    CONSTANT = 5
    """It is the same for all examples."""
    ZERO_LENGTH = 6
    """The mean gradient is 0 in all parameters."""


STATUS = tuple(why.name.lower() for why in Why)


def label_arrays(measured: Measured, data: FileExamples) -> xr.Dataset:
    """Every array of ``screen.h5``."""
    variables: dict[str, xr.Variable] = {}

    def put(name: str, values: Any, dims: tuple[str, ...], why: Why, description: str, unit: str, formula: str = "") -> None:
        found = np.asarray(values, dtype=np.float64)
        codes = np.where(np.isnan(found), np.int8(why), np.int8(0))
        variables[name] = label_variable(found, dims, description=description, unit=unit, formula=formula, source=SOURCE)
        variables[f"{name}_status"] = status_variable(codes, dims, STATUS, name)

    reading, toward, num = measured.reading, measured.toward, len(data.rows)
    overlap_unit = "loss × direction / weight"
    variables["line"] = label_variable(list(data.lines), ["example"], description="line in the data file, from 1", unit="line")
    variables["rank"] = label_variable(
        measured.ranks, ["example"], description=f"rank toward {toward[0]}, 1 the furthest", unit="rank"
    )
    put("overlap", reading.totals.T, ("toward", "example"), Why.OK, "how far a step on the example goes along the direction",
        overlap_unit, "⟨−∇ℓ_i, d⟩")  # fmt: skip
    for name, (description, formula, unit) in BASELINE_WORDS.items():
        values = measured.baselines.get(name, np.full(num, np.nan))
        put(name, values, ("example",), Why.NO_TEACHER, description, unit, formula)
    put("mean_overlap", reading.totals.mean(0), ("toward",), Why.OK, "mean overlap over examples", overlap_unit)
    total = "the dataset's total: its mean overlap as a cosine, with its bootstrap interval over examples"
    few = Why.TOO_FEW_EXAMPLES if num < 2 else Why.ZERO_LENGTH
    put("cosine", _bounds(measured.cosines), ("toward", "bound"), few, total, "cosine", COSINE)
    put("overlap_quantile", reading.quantiles(), ("toward", "quantile"), Why.ZERO_LENGTH, "quantile over examples, overlap",
        "cosine", SCALED)  # fmt: skip
    neutral = measured.neutral
    nothing = Why.NO_NEUTRAL_DATA if neutral is None else few if num < 2 else Why.TOO_FEW_EXAMPLES
    against = np.full((len(toward), 3), np.nan) if neutral is None else _bounds(measured.neutral_cosines)
    put("cosine_of_neutral", against, ("toward", "bound"), nothing, f"{total}, of the neutral data", "cosine", COSINE)
    quantiles = np.full((len(toward), len(QUANTILES)), np.nan) if neutral is None else neutral.quantiles()
    put(
        "overlap_quantile_of_neutral",
        quantiles,
        ("toward", "quantile"),
        nothing,
        "the same of the neutral data",
        "cosine",
        SCALED,
    )
    permuted = np.full((PERMUTATIONS, len(toward)), np.nan) if measured.permuted is None else measured.permuted
    put("cosine_of_permuted", permuted.T, ("toward", "permutation"), Why.NOTHING_TO_PERMUTE,
        "the total with completions permuted across prompts", "cosine", COSINE)  # fmt: skip
    if measured.others:
        put("cosine_with_other", list(measured.others.values()), ("other",), Why.ZERO_LENGTH,
            "the dataset's total along the directions of other traits", "cosine", COSINE)  # fmt: skip
    _put_added(put, measured)
    coords = {
        "toward": list(toward),
        "example": np.arange(num),
        "bound": list(_BOUNDS),
        "quantile": list(QUANTILES),
        "permutation": np.arange(PERMUTATIONS),
        "baseline": list(BASELINES),
        **({"other": list(measured.others)} if measured.others else {}),
    }
    return xr.Dataset(variables, coords=coords)


def _put_added(put: Any, measured: Measured) -> None:
    missing = Association(np.nan, np.nan, np.nan, 0, 0)
    for name in BASELINES:
        found = [measured.added[toward].correlations.get(name, missing) for toward in measured.toward]
        why = Why.CONSTANT if name in measured.baselines else Why.NO_TEACHER
        put(f"correlation_with_{name}", _bounds(found), ("toward", "bound"), why, f"rank correlation of overlap and {name}",
            "correlation", "Spearman's ρ over examples")  # fmt: skip
    put("unexplained_share", _bounds([measured.added[toward].unexplained for toward in measured.toward]), ("toward", "bound"),
        Why.TOO_FEW_EXAMPLES, "share of the overlap's rank variance that the baselines' ranks do not explain", "share",
        "(1 − R²)(n − 1)/(n − k − 1), linear regression on ranks")  # fmt: skip


def _bounds(intervals: Any) -> np.ndarray:
    """[case, bound] of intervals or associations."""
    found: list[Interval | Association] = list(intervals)
    return np.array([[one.estimate, one.low, one.high] for one in found])

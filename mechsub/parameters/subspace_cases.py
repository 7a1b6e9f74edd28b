"""What is measured of the singular subspaces of one student, its control and two teachers, as labelled arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mechsub.parameters.matrices import MatrixScopes, average_groups
from mechsub.parameters.subspaces import (
    INCOMPARABLE,
    NO_VALUE,
    NOT_RUN,
    OK,
    TRUNCATED,
    Spectrum,
    compute_overlaps,
    effective_rank,
    explain_matrices,
    principal_angles,
    stable_rank,
    top_shares,
)

WHO = ("student", "control", "student − control", "teacher", "neutral")
"""Whose displacement a spectrum is of, at the last step; ``student − control`` is θ_S − θ_C."""
ALONG_TRAINING = {
    "overlap": "Δ_S and Δ_T",
    "overlap_of_control": "Δ_C and Δ_T",
    "overlap_excess": "Δ_S and Δ_T, minus that of Δ_C and Δ_T, matrix by matrix and side by side",
    "overlap_with_neutral": "Δ_S and Δ_N",
    "overlap_with_other_traits": "Δ_S and Δ_Tj, mean over the other traits' teachers j",
}
AT_THE_END = {
    "specific_overlap": "θ_S − θ_C and Δ_T − Δ_N",
    "sham_overlap": "θ_C′ − θ_C and Δ_T − Δ_N, C′ a second control with draws of its own",
}
OF_TEACHERS = {"teacher_overlap_with_neutral": "Δ_T and Δ_N"}
OVERLAPS = {**ALONG_TRAINING, **AT_THE_END, **OF_TEACHERS}
"""The overlaps, and of which two directions each is."""
ANGLE_PAIRS = ("student and teacher", "control and teacher")
SHOWN_VALUES, KEPT_VALUES = 32, 256
"""How many leading singular values go into the cumulative shares, and into the stored spectra."""

SIDE_NAMES = ("left", "right", "both")
_SIDES = np.array([[True, False], [False, True], [True, True]])


@dataclass(frozen=True)
class Sizes:
    """The lengths of the arrays' axes."""

    conditions: int
    traits: int
    members: int
    steps: int
    matrices: int
    ranks: tuple[int, ...]
    longest: int
    """The most singular values of a matrix."""


@dataclass(frozen=True)
class Measured:
    """Arrays with their status; the leading axes are condition, trait and, where there is one, member and step."""

    sizes: Sizes
    values: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]

    @classmethod
    def empty(cls, sizes: Sizes) -> "Measured":
        """Nothing has been run."""
        case, matrices, ranks = (sizes.conditions, sizes.traits), sizes.matrices, len(sizes.ranks)
        pair, kept = (matrices, 2, ranks), min(sizes.longest, KEPT_VALUES)
        who = (*case, len(WHO), sizes.members, matrices)
        shapes = {
            **{name: (*case, sizes.members, sizes.steps, *pair) for name in ALONG_TRAINING},
            **{name: (*case, sizes.members, *pair) for name in AT_THE_END},
            **{name: (sizes.traits, sizes.members, *pair) for name in OF_TEACHERS},
            "effective_rank": who,
            "rank": who,
            "stable_rank": who,
            "cumulative_share": (*who, min(sizes.longest, SHOWN_VALUES)),
            "singular_values": (*who, kept),
            "backward_error": who,
            "tail": who,
            "principal_angles": (*case, len(ANGLE_PAIRS), sizes.members, *pair, max(sizes.ranks)),
        }
        return cls(
            sizes,
            {name: np.full(shape, np.nan) for name, shape in shapes.items()},
            {name: np.full(shape, NOT_RUN, dtype=np.int8) for name, shape in shapes.items()},
        )

    def set_incomparable(self, condition: int) -> None:
        """Its students have other tensors than the teachers."""
        for name, codes in self.codes.items():
            if name not in OF_TEACHERS:
                codes[condition] = INCOMPARABLE

    def put_overlap(self, name: str, cell: tuple[int | slice, ...], first: Spectrum, second: Spectrum) -> None:
        """The overlaps of two directions in one matrix; ``cell`` says where, up to the matrix."""
        self.put(name, cell, *compute_overlaps(first, second, self.sizes.ranks))

    def put_mean_overlap(self, name: str, cell: tuple[int | slice, ...], first: Spectrum, others: Sequence[Spectrum]) -> None:
        """The mean of the overlaps with several others, where all of them have one."""
        found = [compute_overlaps(first, other, self.sizes.ranks) for other in others]
        values, codes = (np.stack(parts) for parts in zip(*found, strict=True))
        self.put(name, cell, values.mean(0), codes.max(0))

    def put_excess(self, name: str, cell: tuple[int | slice, ...], first: str, second: str) -> None:
        """The difference of two overlaps that are there."""
        codes = np.maximum(self.codes[first][cell], self.codes[second][cell])
        self.put(name, cell, self.values[first][cell] - self.values[second][cell], codes)

    def put_angles(self, cell: tuple[int | slice, ...], first: Spectrum, second: Spectrum) -> None:
        """All principal angles for every k."""
        _, codes = compute_overlaps(first, second, self.sizes.ranks)
        for place, k in enumerate(self.sizes.ranks):
            target = (*cell, slice(None), place)
            self.values["principal_angles"][target][..., :k] = principal_angles(first, second, k)
            self.codes["principal_angles"][target] = NO_VALUE
            self.codes["principal_angles"][target][..., :k] = codes[..., place, None]

    def put_spectrum(self, cell: tuple[int | slice, ...], spectrum: Spectrum) -> None:
        """The spectrum of one direction in one matrix, and what follows from it."""
        codes = explain_matrices(spectrum)
        kept, shown = self.values["singular_values"].shape[-1], self.values["cumulative_share"].shape[-1]
        values = np.full((len(codes), kept), np.nan)
        known = spectrum.values[:, :kept].cpu().numpy()
        values[:, : known.shape[1]] = np.where(codes[:, None] == OK, known, np.nan)
        found: dict[str, np.ndarray] = {
            "effective_rank": effective_rank(spectrum),
            "rank": spectrum.rank.cpu().numpy(),
            "stable_rank": stable_rank(spectrum),
            "cumulative_share": top_shares(spectrum, shown),
            "singular_values": values,
            "backward_error": spectrum.backward_error.cpu().numpy(),
            "tail": spectrum.tail.cpu().numpy(),
        }
        found["rank"] = np.where(spectrum.is_whole | (found["rank"] < known.shape[1]), found["rank"], np.nan)
        unknown = NO_VALUE if spectrum.is_whole else TRUNCATED
        for name, array in found.items():
            own = codes.reshape(-1, *[1] * (array.ndim - 1)) * np.ones(array.shape, dtype=np.int8)
            self.put(name, cell, array, np.where((own == OK) & np.isnan(array), unknown, own))

    def put(self, name: str, cell: tuple[int | slice, ...], values: np.ndarray, codes: np.ndarray) -> None:
        """Values of one matrix, with why some are NaN."""
        self.values[name][cell] = np.where(codes == OK, values, np.nan)
        self.codes[name][cell] = codes

    def average(self, name: str, scopes: MatrixScopes) -> tuple[np.ndarray, np.ndarray]:
        """Overlaps and ranks over scopes in place of matrices; overlaps over left, right and both in place of the sides."""
        values, codes = self.values[name], self.codes[name]
        if name in OVERLAPS:
            values, codes = average_groups(values, codes, _SIDES, -2)
            return average_groups(values, codes, scopes.groups, -3)
        return average_groups(values, codes, scopes.groups, -1)


def average_haar(
    draws: np.ndarray, codes: np.ndarray, scopes: MatrixScopes, reduce: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What chance gives over the matrices that have an overlap in some member, as [scope, side, k].

    ``draws`` [draw, matrix, side, k] of single matrices are averaged over sides and matrices like the overlaps, draw by
    draw, and then reduced over the draws; ``codes`` [member, matrix, side, k] are those of the overlaps.
    """
    measured = np.broadcast_to(codes.min(0), draws.shape)
    values, found = average_groups(draws, measured, _SIDES, -2)
    values, found = average_groups(values, found, scopes.groups, -3)
    return np.where(found[0] == OK, reduce(values), np.nan), found[0]

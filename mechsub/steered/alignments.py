"""How one student's steering directions lie to its teacher's, to other teachers', and to its control's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

STATUS = (
    "ok", "nothing_moved", "not_run", "incomparable", "no_control", "no_other_teacher", "no_readout", "not_this_group",
    "no_map_between_bases", "not_finite",
)  # fmt: skip
OK, UNMOVED, NOT_RUN, INCOMPARABLE, NO_CONTROL, NO_OTHER, NO_READOUT, NO_GROUP, NO_MAP, NOT_FINITE = range(len(STATUS))
_ROUNDING = 1e-6
"""Of a vector: what is left of it where all of it was taken out."""
ByGroup = Float[np.ndarray, "member group"]
Vectors = Float[np.ndarray, "member group width"]


@dataclass(frozen=True)
class Cell:
    """The directions of one student at one step and hook point."""

    student: Vectors
    teacher: Vectors
    others: Sequence[Vectors]
    """Other traits' teachers; the neutral one where there is no other trait."""
    readout: Sequence[np.ndarray | None]
    """[member, direction, width]: what the head reads each teacher's trait from, own teacher's first; None where not known."""
    control: Vectors | None
    neutral: Vectors | None
    origin_norm: ByGroup
    shuffles: Float[np.ndarray, "member shuffle width"] | None
    """Of the student at its last step, on the prompts of the first group."""
    lacks: Bool[np.ndarray, " group"]
    """Groups that one of these lineages was not run on; NaN elsewhere is of the models."""

    def explain(self, found: ByGroup) -> Int[np.ndarray, "member group"]:
        """The status of values of a quantity."""
        why = np.where(self.lacks, NO_GROUP, np.where(self._is_damaged, NOT_FINITE, UNMOVED))
        codes: np.ndarray = np.where(np.isfinite(found), OK, why)
        return codes

    @cached_property
    def _is_damaged(self) -> Bool[np.ndarray, "member group"]:
        held = [self.student, self.teacher, *self.others, *(one for one in (self.control, self.neutral) if one is not None)]
        damaged: np.ndarray = np.any([np.isnan(vectors).any(-1) for vectors in held], axis=0)
        return damaged

    @property
    def adjusted(self) -> Vectors | None:
        """v_S − v_C; None without a control."""
        return None if self.control is None else self.student - self.control


@dataclass(frozen=True)
class Quantity:
    """One measure of a cell: its values, or the status that says why there are none."""

    name: str
    formula: str
    measure: Callable[[Cell], ByGroup | int]
    unit: str = "cosine"


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Over the last axis; NaN where one of them is 0."""
    inner, lengths = (first * second).sum(-1), np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    cosine: np.ndarray = np.divide(inner, lengths, out=np.full_like(inner, np.nan), where=lengths > 0)
    return cosine


def _mean_cosine(first: Vectors, others: Sequence[Vectors]) -> ByGroup | int:
    return np.mean([_cosine(first, other) for other in others], axis=0) if others else NO_OTHER


def _without(vectors: Vectors, basis: np.ndarray) -> Vectors:
    """The vectors without their part in the span of each member's orthonormal rows; 0 where only rounding is left of them."""
    kept: Vectors = vectors - np.einsum("mgd,mkd,mke->mge", vectors, basis, basis)
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    kept[np.broadcast_to(np.linalg.norm(kept, axis=-1, keepdims=True) < _ROUNDING * lengths, kept.shape)] = 0.0
    return kept


def _own_without_readout(cell: Cell) -> ByGroup | int:
    basis = cell.readout[0]
    if basis is None or cell.adjusted is None:
        return NO_READOUT if basis is None else NO_CONTROL
    return _cosine(_without(cell.adjusted, basis), _without(cell.teacher, basis))


def _others_without_readout(cell: Cell) -> ByGroup | int:
    """Each pair without what the head reads that teacher's trait from."""
    if cell.adjusted is None:
        return NO_CONTROL
    found = []
    for other, basis in zip(cell.others, cell.readout[1:], strict=True):
        if basis is None:
            return NO_READOUT
        found.append(_cosine(_without(cell.adjusted, basis), _without(other, basis)))
    return np.mean(found, axis=0) if found else NO_OTHER


def _of_control(cell: Cell) -> ByGroup | int:
    return NO_CONTROL if cell.control is None else _cosine(cell.control, cell.teacher)


def _adjusted(cell: Cell) -> ByGroup | int:
    return NO_CONTROL if cell.adjusted is None else _cosine(cell.adjusted, cell.teacher)


def _adjusted_with_others(cell: Cell) -> ByGroup | int:
    return NO_CONTROL if cell.adjusted is None else _mean_cosine(cell.adjusted, cell.others)


def _specific(cell: Cell) -> ByGroup | int:
    if cell.adjusted is None or cell.neutral is None:
        return NO_CONTROL if cell.adjusted is None else NO_OTHER
    return _cosine(cell.adjusted, cell.teacher - cell.neutral)


def _length(vectors: Vectors, cell: Cell) -> ByGroup:
    length: ByGroup = np.linalg.norm(vectors, axis=-1) / cell.origin_norm
    return length


def _shuffled_sd(cell: Cell) -> ByGroup | int:
    """Over draws; of the first group only."""
    if cell.shuffles is None:
        return NOT_RUN
    spread = np.full(cell.student.shape[:2], np.nan)
    spread[:, 0] = _cosine(cell.shuffles, cell.teacher[:, :1]).std(-1, ddof=1)
    return spread


RAW, RAW_OTHERS, RAW_CONTROL = (
    "steering_alignment",
    "steering_alignment_with_other_teachers",
    "steering_alignment_of_control",
)
ADJUSTED, ADJUSTED_OTHERS = "control_adjusted_steering_alignment", "control_adjusted_steering_alignment_with_other_teachers"
BARE, BARE_NULL = f"{ADJUSTED}_without_readout", f"{ADJUSTED_OTHERS}_without_readout"
SPECIFIC = "specific_steering_alignment"
QUANTITIES = (
    Quantity(RAW, "cos(v_S, v_T)", lambda cell: _cosine(cell.student, cell.teacher)),
    Quantity(RAW_OTHERS, "mean over other teachers of cos(v_S, v_T′)", lambda cell: _mean_cosine(cell.student, cell.others)),
    Quantity(RAW_CONTROL, "cos(v_C, v_T)", _of_control),
    Quantity(ADJUSTED, "cos(v_S − v_C, v_T)", _adjusted),
    Quantity(ADJUSTED_OTHERS, "mean over other teachers of cos(v_S − v_C, v_T′)", _adjusted_with_others),
    Quantity(BARE, "cos of v_S − v_C and v_T without their parts along the target's unembedding", _own_without_readout),
    Quantity(BARE_NULL, "mean over other teachers of the same, without their targets' unembedding", _others_without_readout),
    Quantity(SPECIFIC, "cos(v_S − v_C, v_T − v_N)", _specific),
    Quantity("student_shift", "‖v_S‖ / mean ‖h‖ of its origin", lambda cell: _length(cell.student, cell), "share of ‖h‖"),
    Quantity("teacher_shift", "‖v_T‖ / mean ‖h‖", lambda cell: _length(cell.teacher, cell), "share of ‖h‖"),
    Quantity(
        "control_shift",
        "‖v_C‖ / mean ‖h‖ of its origin",
        lambda cell: NO_CONTROL if cell.control is None else _length(cell.control, cell),
        "share of ‖h‖",
    ),
    Quantity("shuffled_steering_alignment_sd", "sd over draws of cos(v_S of shuffled labels, v_T)", _shuffled_sd),
)

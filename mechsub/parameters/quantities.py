"""What is measured of one student, its control and two teachers: every alignment quantity, as data."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int8

from mechsub.parameters.alignment import ByScope, Combination, DirectionAlgebra


@dataclass(frozen=True)
class Case:
    """One condition at one step: how its directions are called, and the algebra that knows them."""

    algebra: DirectionAlgebra
    student: Combination
    control: Combination
    difference: Combination
    """θ_S − θ_C."""
    sham_difference: Combination
    """θ_C′ − θ_C of a second control."""
    teacher: Combination
    neutral: Combination
    teacher_difference: Combination
    """Δ_T − Δ_N."""
    student_origin: Combination
    teacher_origin: Combination
    anchor: str
    """The label of the teacher's displacement."""
    partners: tuple[int, ...]
    """For each member, whose reference its student starts from."""
    others: tuple["OtherTrait", ...] = ()
    """The other traits of the same condition."""
    has_mate: bool = True
    """Whether what students start from elsewhere is a reference that a teacher was trained from, as it is."""
    missing: frozenset[str] = frozenset()
    """Who of ``control``, ``neutral`` and ``sham`` the run has not; their directions are then empty sums."""

    @property
    def starts_elsewhere(self) -> bool:
        """Whether students start at another member's reference."""
        return self.partners != tuple(range(len(self.partners)))


@dataclass(frozen=True)
class OtherTrait:
    """Another trait's teacher and student from the same reference."""

    difference: Combination
    """θ_Sj − θ_C."""
    teacher: Combination


@dataclass(frozen=True)
class Quantity:
    """One measure of alignment."""

    name: str
    formula: str
    compute: Callable[[Case], ByScope | None]
    """None where it has no meaning for the case."""
    directions: Callable[[Case], Sequence[Combination]]
    """What it is made of; of a measure against other members' anchors, the anchor is the last."""
    unit: str = "cosine"
    null: str | None = None
    """The variable that holds its null: the same measure of another teacher's student."""
    null_words: str = ""
    judged: str = ""
    """``paired``: against its null, member by member; ``swap``: against 0, by swapping labels; empty: no verdict."""
    why_unjudged: str = ""
    needs: frozenset[str] = frozenset()
    """Who of ``control``, ``neutral`` and ``sham`` must be there."""

    is_with_mate: bool = False
    """Whether it is held against another member's anchor."""

    def measure(self, case: Case) -> ByScope | None:
        """Its value; None where the run does not hold what it needs."""
        return None if self.needs & case.missing else self.compute(case)

    def explain(self, case: Case, values: ByScope) -> Int8[np.ndarray, "member scope"]:
        """Why its values are NaN where they are, as codes of `Missing`."""
        return case.algebra.explain(values, *self.directions(case), partners=case.partners if self.is_with_mate else ())


def _mate(case: Case, of: Combination) -> ByScope | None:
    has_mate = case.starts_elsewhere and case.has_mate
    return case.algebra.cosine_with_anchor(of, case.anchor, case.partners) if has_mate else None


def _without_radial(case: Case, of: Combination) -> ByScope:
    return case.algebra.cosine_without_radial(of, case.student_origin, case.teacher, case.teacher_origin)


def _norm(case: Case, of: Combination) -> ByScope:
    """The last scope is the shared support of student and teacher, whoever's norm it is."""
    return case.algebra.norm(of, case.algebra.support(case.student, case.teacher))


def _subtract(first: Combination, second: Combination) -> Combination:
    return {**first, **{label: -sign for label, sign in second.items()}}


def _mean_over_others(case: Case, cosine: Callable[[OtherTrait], ByScope]) -> ByScope | None:
    return np.mean([cosine(other) for other in case.others], axis=0) if case.others else None


def _adjusted_of_others(case: Case) -> ByScope | None:
    return _mean_over_others(case, lambda other: case.algebra.cosine(other.difference, case.teacher))


def _between_traits(case: Case) -> ByScope | None:
    return _mean_over_others(
        case,
        lambda other: case.algebra.cosine(_subtract(case.difference, other.difference), _subtract(case.teacher, other.teacher)),
    )


CONTROL, NEUTRAL, SHAM = "control", "neutral", "sham"
_CONTROLLED = frozenset({CONTROL})
_PAIRED = frozenset({CONTROL, NEUTRAL})

OTHER_TEACHER = "another teacher's student from the same start: the control's value"

_SHARE = "share of the teacher's displacement"
SWAPPED = "0, by swapping the two teachers' labels within members: the central part of the swapped means"

QUANTITIES: tuple[Quantity, ...] = (
    Quantity(
        "alignment",
        "cos(Δ_S, Δ_T)",
        lambda case: case.algebra.cosine(case.student, case.teacher),
        directions=lambda case: (case.student, case.teacher),
        null="alignment_of_control",
        null_words=OTHER_TEACHER,
        judged="paired",
    ),
    Quantity(
        "alignment_of_control",
        "cos(Δ_C, Δ_T)",
        lambda case: case.algebra.cosine(case.control, case.teacher),
        directions=lambda case: (case.control, case.teacher),
        needs=_CONTROLLED,
    ),
    Quantity(
        "alignment_with_neutral",
        "cos(Δ_S, Δ_N)",
        lambda case: case.algebra.cosine(case.student, case.neutral),
        directions=lambda case: (case.student, case.neutral),
        needs=frozenset({NEUTRAL}),
    ),
    Quantity(
        "specific_alignment",
        "cos(θ_S − θ_C, Δ_T − Δ_N)",
        lambda case: case.algebra.cosine(case.difference, case.teacher_difference),
        directions=lambda case: (case.difference, case.teacher_difference),
        null_words=SWAPPED,
        judged="swap",
        needs=_PAIRED,
    ),
    Quantity(
        "sham_alignment",
        "cos(θ_C′ − θ_C, Δ_T − Δ_N), C′ a second control with draws of its own",
        lambda case: case.algebra.cosine(case.sham_difference, case.teacher_difference),
        directions=lambda case: (case.sham_difference, case.teacher_difference),
        null_words=SWAPPED,
        why_unjudged="it checks the instrument: two controls could swap places",
        needs=_PAIRED | {SHAM},
    ),
    Quantity(
        "control_adjusted_alignment",
        "cos(θ_S − θ_C, Δ_T)",
        lambda case: case.algebra.cosine(case.difference, case.teacher),
        directions=lambda case: (case.difference, case.teacher),
        null="control_adjusted_alignment_with_neutral",
        null_words="the same difference against the other teacher, cos(θ_S − θ_C, Δ_N)",
        why_unjudged="θ_S − θ_C leans away from the neutral teacher by construction; the specific alignment has the verdict",
        needs=_CONTROLLED,
    ),
    Quantity(
        "control_adjusted_alignment_with_neutral",
        "cos(θ_S − θ_C, Δ_N)",
        lambda case: case.algebra.cosine(case.difference, case.neutral),
        directions=lambda case: (case.difference, case.neutral),
        needs=_PAIRED,
    ),
    Quantity(
        "control_adjusted_alignment_of_other_traits",
        "mean over other traits j of cos(θ_Sj − θ_C, Δ_T)",
        _adjusted_of_others,
        directions=lambda case: (case.teacher, *(other.difference for other in case.others)),
        null_words="none: it stands beside the control-adjusted alignment, of which it is what any trait's student has",
        why_unjudged="a line to read the control-adjusted alignment by",
        needs=_CONTROLLED,
    ),
    Quantity(
        "specific_alignment_between_traits",
        "mean over other traits j of cos(θ_S − θ_Sj, Δ_T − Δ_Tj)",
        _between_traits,
        directions=lambda case: (
            case.difference,
            case.teacher,
            *(part for other in case.others for part in (other.difference, other.teacher)),
        ),
        null_words="0 on average where students could swap teachers; no band: among several traits a swap is no flip of a sign",
        why_unjudged="traits share students and teachers, so that their numbers are not independent tests; the specific "
        "alignment has the verdict",
        needs=_CONTROLLED,
    ),
    Quantity(
        "radial_removed_alignment",
        "cos(Δ_S, Δ_T), each without its component along its own θ₀",
        lambda case: _without_radial(case, case.student),
        directions=lambda case: (case.student, case.teacher, case.student_origin, case.teacher_origin),
        null="radial_removed_alignment_of_control",
        null_words=OTHER_TEACHER,
        why_unjudged="shown beside the alignment, which has the verdict",
    ),
    Quantity(
        "radial_removed_alignment_of_control",
        "cos(Δ_C, Δ_T), each without its component along its own θ₀",
        lambda case: _without_radial(case, case.control),
        directions=lambda case: (case.control, case.teacher, case.student_origin, case.teacher_origin),
        needs=_CONTROLLED,
    ),
    Quantity(
        "init_mate_alignment",
        "cos(Δ_S, Δ_T of the member whose reference the student starts from)",
        lambda case: _mate(case, case.student),
        is_with_mate=True,
        directions=lambda case: (case.student, {case.anchor: 1.0}),
        null="init_mate_alignment_of_control",
        null_words=OTHER_TEACHER,
        judged="paired",
    ),
    Quantity(
        "init_mate_alignment_of_control",
        "cos(Δ_C, Δ_T of the member whose reference the control starts from)",
        lambda case: _mate(case, case.control),
        is_with_mate=True,
        directions=lambda case: (case.control, {case.anchor: 1.0}),
        needs=_CONTROLLED,
    ),
    Quantity(
        "projection",
        "⟨Δ_S, Δ_T⟩ / ‖Δ_T‖²",
        lambda case: case.algebra.projection_coefficient(case.student, case.teacher),
        directions=lambda case: (case.student, case.teacher),
        unit=_SHARE,
        null="projection_of_control",
        null_words=OTHER_TEACHER,
        why_unjudged="a size, not a direction: the alignment has the verdict",
    ),
    Quantity(
        "projection_of_control",
        "⟨Δ_C, Δ_T⟩ / ‖Δ_T‖²",
        lambda case: case.algebra.projection_coefficient(case.control, case.teacher),
        directions=lambda case: (case.control, case.teacher),
        unit=_SHARE,
        needs=_CONTROLLED,
    ),
    Quantity(
        "control_adjusted_projection",
        "⟨θ_S − θ_C, Δ_T⟩ / ‖Δ_T‖²",
        lambda case: case.algebra.projection_coefficient(case.difference, case.teacher),
        directions=lambda case: (case.difference, case.teacher),
        unit=_SHARE,
        null="control_adjusted_projection_on_neutral",
        null_words="the same difference along the other teacher, ⟨θ_S − θ_C, Δ_N⟩ / ‖Δ_N‖²",
        why_unjudged="a size, not a direction: the specific alignment has the verdict",
        needs=_CONTROLLED,
    ),
    Quantity(
        "control_adjusted_projection_on_neutral",
        "⟨θ_S − θ_C, Δ_N⟩ / ‖Δ_N‖²",
        lambda case: case.algebra.projection_coefficient(case.difference, case.neutral),
        directions=lambda case: (case.difference, case.neutral),
        unit="share of the neutral teacher's displacement",
        needs=_PAIRED,
    ),
    Quantity(
        "student_norm",
        "‖Δ_S‖",
        lambda case: _norm(case, case.student),
        directions=lambda case: (case.student, case.teacher),
        unit="weight",
    ),
    Quantity(
        "control_norm",
        "‖Δ_C‖",
        lambda case: _norm(case, case.control),
        directions=lambda case: (case.control, case.student, case.teacher),
        unit="weight",
        needs=_CONTROLLED,
    ),
    Quantity(
        "teacher_norm",
        "‖Δ_T‖",
        lambda case: _norm(case, case.teacher),
        directions=lambda case: (case.teacher, case.student),
        unit="weight",
    ),
    Quantity(
        "neutral_norm",
        "‖Δ_N‖",
        lambda case: _norm(case, case.neutral),
        directions=lambda case: (case.neutral, case.student, case.teacher),
        unit="weight",
        needs=frozenset({NEUTRAL}),
    ),
    Quantity(
        "student_rounding_floor",
        "√Σ ulp² / 12: ‖Δ_S‖ if rounding in storage were all there is",
        lambda case: case.algebra.rounding_floor(case.student),
        directions=lambda case: (case.student,),
        unit="weight",
    ),
    Quantity(
        "teacher_rounding_floor",
        "√Σ ulp² / 12: ‖Δ_T‖ if rounding in storage were all there is",
        lambda case: case.algebra.rounding_floor(case.teacher),
        directions=lambda case: (case.teacher,),
        unit="weight",
    ),
)

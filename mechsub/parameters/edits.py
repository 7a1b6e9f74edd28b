"""The edits of the causal test as data: each by its name, and how it is made of one student beside its control."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import copysign, hypot, isnan, nan, sqrt

from mechsub.parameters.surgery import LARGEST_RANK, Edit, LeadingParts, Subject, Tensors, layer_products, list_ranks, project

TEACHER, NEUTRAL, OTHER, RANDOM, STUDENT = "teacher", "neutral", "other trait", "random", "student"
COMPONENT, LAYER, GRAFT, TRUNCATION, SCAN = "component", "layer component", "graft", "truncation", "scan"
SYMBOLS = {TEACHER: "Δ_T", NEUTRAL: "Δ_N", OTHER: "another trait's Δ_T", RANDOM: "a random Δ", STUDENT: "D"}
TOTAL, ALONG, WITHOUT, FLIPPED = "D (all of it)", "along Δ_T", "D without Δ_T", "along −Δ_T (sign flip)"
LAYERWISE, WITHOUT_LAYERWISE = "along Δ_T, layer by layer", "D without Δ_T, layer by layer"
ONLY, ALL_BUT, UP_TO, FROM = "only this layer", "all but this layer", "up to this layer", "from this layer on"
LEADING, RESIDUAL = "leading part", "residual"
OWN, REST = "own component", "rest"
"""Of a null direction: D along it, by its own coefficient, and D without that."""
DOSES = (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
NULL_DOSES = (-1.0, -0.5, 0.0, 0.5, 1.0)
STUDENT_DOSES = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class PlannedEdit:
    """One edit, whatever the student."""

    name: str
    group: str
    """`COMPONENT`, `LAYER`, `GRAFT`, `TRUNCATION` or `SCAN`."""
    series: str
    """What it is within its group, e.g. `ALONG` or `UP_TO`; in a scan its direction."""
    direction: str = STUDENT
    """Whose displacement it is made of."""
    layer: str = ""
    rank: int = -1
    """Of truncations; −1 elsewhere."""
    dose: float = 0.0
    """Of scans, in units of ‖Δ_T‖, or of D; 0 elsewhere."""

    @property
    def needs_same_start(self) -> bool:
        """Whether it only answers something where the student starts at the weights that its teacher started at."""
        return self.group in {LAYER, SCAN} or (self.group == COMPONENT and self.series in {OWN, REST})

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher's displacement, or its length, is in it."""
        return self.direction != STUDENT and self.series not in {OWN, REST}

    @property
    def needs_effect(self) -> bool:
        """Whether it divides an effect into parts, so that there must be one."""
        return self.group in {LAYER, GRAFT, TRUNCATION}


def list_edits(layers: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> list[PlannedEdit]:
    """Every edit of models with these layers, in their order, and tensors of these shapes."""
    components = {
        TOTAL: STUDENT, ALONG: TEACHER, LAYERWISE: TEACHER, long_as_student(TEACHER): TEACHER, FLIPPED: TEACHER,
        WITHOUT: TEACHER, WITHOUT_LAYERWISE: TEACHER,
    }  # fmt: skip
    edits = [PlannedEdit(name, COMPONENT, name, direction) for name, direction in components.items()]
    for null in (RANDOM, NEUTRAL, OTHER):
        names = (long_as_along(null), long_as_layerwise(null), long_as_student(null))
        edits += [PlannedEdit(name, COMPONENT, name, null) for name in names]
    for null in (NEUTRAL, OTHER):
        for name, series in ((f"along {SYMBOLS[null]}", OWN), (f"D without {SYMBOLS[null]}", REST)):
            edits.append(PlannedEdit(name, COMPONENT, series, null))
    for layer in layers:
        for series in (ALONG, WITHOUT):
            edits.append(PlannedEdit(f"{series}, in {layer} alone", LAYER, series, TEACHER, layer))
        edits += [PlannedEdit(f"{layer}: {series}", GRAFT, series, layer=layer) for series in (ONLY, ALL_BUT, UP_TO, FROM)]
    for rank in list_ranks(shapes):
        edits += [PlannedEdit(f"rank {rank}: {series}", TRUNCATION, series, rank=rank) for series in (LEADING, RESIDUAL)]
    scans = {TEACHER: DOSES, NEUTRAL: NULL_DOSES, OTHER: NULL_DOSES, RANDOM: NULL_DOSES, STUDENT: STUDENT_DOSES}
    for direction, doses in scans.items():
        symbol = SYMBOLS[direction]
        edits += [PlannedEdit(f"{dose:+g} {symbol}", SCAN, symbol, direction, dose=dose) for dose in doses]
    return edits


def long_as_along(direction: str) -> str:
    """How the edit is called that goes along a null direction as far as D goes along Δ_T."""
    return f"{SYMBOLS[direction]}, as far as D along Δ_T"


def long_as_layerwise(direction: str) -> str:
    """The same in every layer."""
    return f"{long_as_along(direction)}, layer by layer"


def long_as_student(direction: str) -> str:
    """How the edit is called that goes along a direction as far as the whole of D."""
    return f"along {SYMBOLS[direction]}, stretched to ‖D‖"


@dataclass(frozen=True)
class Operation:
    """A subject with the directions that its edits are made of."""

    subject: Subject
    directions: Mapping[str, Sequence[Tensors]]
    """By whose they are; several where an edit's effect is the mean over them, none where a run has none."""
    seed: int
    stream: tuple[str | int, ...]
    """Names the draws of randomised decompositions."""
    top: int = LARGEST_RANK
    """The largest rank of a truncation."""
    teacher: "Extent | None" = None
    """Of the teacher's displacement, where it is not among ``directions``: others are made as long as it."""

    @property
    def coefficient(self) -> float:
        """⟨D, Δ_T⟩ / ‖Δ_T‖²; NaN where the teacher has no displacement."""
        return self.teacher_extent.own

    @cached_property
    def teacher_extent(self) -> "Extent":
        """Of the teacher's displacement; of nothing where it is not known."""
        if self.teacher is not None:
            return self.teacher
        return self._extents[TEACHER][0] if self.directions.get(TEACHER) else Extent(nan, {}, {})

    @cached_property
    def _extents(self) -> Mapping[str, Sequence["Extent"]]:
        return {
            who: [Extent(*project(self.subject, direction), self._layer_norms(direction)) for direction in found]
            for who, found in self.directions.items()
        }

    def _layer_norms(self, direction: Tensors) -> dict[str, float]:
        squares = layer_products(direction, direction, self.subject.layers)
        return {layer: sqrt(square) for layer, square in squares.items()}

    def make(self, planned: PlannedEdit) -> Iterator[Edit | None]:
        """The edit for each of its directions; None where the layer, or the direction, did not move."""
        if planned.direction == STUDENT:
            yield _OF_STUDENT[planned.group](self, planned)
            return
        teacher_norm = self.teacher_extent.norm
        for direction, extent in zip(self.directions[planned.direction], self._extents[planned.direction], strict=True):
            if extent.norm == 0 or (planned.needs_teacher and teacher_norm == 0):
                yield None
            elif planned.group == SCAN:
                yield self.subject.add(direction, self.subject.everywhere(planned.dose * teacher_norm / extent.norm))
            elif planned.series == long_as_layerwise(planned.direction):
                yield self.subject.add(direction, self._matched_layers(extent))
            elif planned.group == LAYER or planned.series in {LAYERWISE, WITHOUT_LAYERWISE}:
                yield self._layerwise(planned, direction, extent)
            elif planned.series in {WITHOUT, REST}:
                yield self.subject.remove(direction, self.subject.everywhere(extent.own))
            else:
                dose = {
                    FLIPPED: -extent.own,
                    long_as_along(planned.direction): self.coefficient * teacher_norm / extent.norm,
                    long_as_student(planned.direction): copysign(self.subject.norm / extent.norm, self.coefficient),
                }.get(planned.series, extent.own)
                yield self.subject.add(direction, self.subject.everywhere(dose))

    def _matched_layers(self, extent: "Extent") -> dict[str, float]:
        """What makes a direction as long in every layer as D's part along Δ_T is there; nothing where either did not move."""
        teacher = self.teacher_extent
        return {
            layer: value * teacher.layer_norms[layer] / extent.layer_norms[layer]
            for layer, value in teacher.by_layer.items()
            if not isnan(value) and extent.layer_norms[layer] > 0
        }

    def _layerwise(self, planned: PlannedEdit, direction: Tensors, extent: "Extent") -> Edit | None:
        chosen = {layer: value for layer, value in extent.by_layer.items() if not isnan(value)}
        if planned.group == LAYER:
            chosen = {layer: value for layer, value in chosen.items() if layer == planned.layer and layer in self.subject.moved}
            if not chosen:
                return None
        takes_away = planned.series in {WITHOUT, WITHOUT_LAYERWISE}
        return (self.subject.remove if takes_away else self.subject.add)(direction, chosen)

    def _graft(self, planned: PlannedEdit) -> Edit | None:
        names = self.subject.layer_names
        place, one = names.index(planned.layer), frozenset([planned.layer])
        if planned.series in {ONLY, ALL_BUT}:
            chosen = self.subject.put_in(one) if planned.series == ONLY else self.subject.take_out(one)
            return chosen if planned.layer in self.subject.moved else None
        return self.subject.put_in(frozenset(names[: place + 1] if planned.series == UP_TO else names[place:]))

    def _whole(self, planned: PlannedEdit) -> Edit:
        return self.subject.put_in(frozenset(self.subject.layer_names))

    def _truncation(self, planned: PlannedEdit) -> Edit:
        part, everywhere = self._leading_parts.truncate(planned.rank), self.subject.everywhere(1.0)
        return (self.subject.add if planned.series == LEADING else self.subject.remove)(part, everywhere)

    def _student_scan(self, planned: PlannedEdit) -> Edit:
        if planned.dose == 1:  # θ_S itself, without rounding
            return self._whole(planned)
        return self.subject.add(self.subject.difference, self.subject.everywhere(planned.dose))

    def truncation_error(self, rank: int) -> float:
        """‖D − D_k‖ / ‖D‖, in [0, 1]."""
        return self._leading_parts.relative_error(rank)

    @cached_property
    def _leading_parts(self) -> LeadingParts:
        return LeadingParts(self.subject.difference, self.top, self.seed, *self.stream)


@dataclass(frozen=True)
class Extent:
    """How long a direction is, and how far D goes along it."""

    own: float
    by_layer: Mapping[str, float]
    layer_norms: Mapping[str, float]

    @property
    def is_known(self) -> bool:
        """Whether it is of any direction."""
        return bool(self.layer_norms)

    @property
    def norm(self) -> float:
        """Of the whole direction, in the unit of the weights."""
        return hypot(*self.layer_norms.values())


_OF_STUDENT: Mapping[str, Callable[[Operation, PlannedEdit], Edit | None]] = {
    COMPONENT: Operation._whole,
    GRAFT: Operation._graft,
    TRUNCATION: Operation._truncation,
    SCAN: Operation._student_scan,
}

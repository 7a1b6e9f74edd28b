"""Edits of activations along steering directions: which there are, and what each did to the student's own trait's score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
from jaxtyping import Float

from mechsub.run import Run

ADD, OUT, REPLACE = "add to origin", "project out", "replace by origin's"
OWN_TEACHER, OTHER_TEACHERS, OWN_STUDENT, OTHER_STUDENTS, CONTROL, RANDOM = (
    "own v_T", "other teachers' v_T", "own v_S", "other students' v_S", "v_C", "random",
)  # fmt: skip
VECTORS = (OWN_TEACHER, OTHER_TEACHERS, OWN_STUDENT, OTHER_STUDENTS, CONTROL, RANDOM)
DOSES = (-1.0, 0.25, 0.5, 1.0, 2.0)
JUDGED_DOSE = 0.5
"""Half the length of the activations: set before any run was looked at."""
OWN_LENGTH = "own length"
OTHERS_TAKEN_OUT = 2
"""Other traits whose directions are taken out of a student; all of them are added to origins."""
_MOST_LAYERS = 8
ALL_LAYERS = "all layers"
STATUS = (
    "ok", "not_run", "other_basis", "no_such_vector", "no_such_hook_point", "nothing_moved", "other_passes", "not_trained",
    "not_finite", "no_score", "no_control", "added_to_the_start_of_both",
)  # fmt: skip
(
    OK, NOT_RUN, OTHER_BASIS, NO_VECTOR, NO_POINT, UNMOVED, OTHER_PASSES, NOT_TRAINED, NOT_FINITE, NO_SCORE, NO_CONTROL, SHARED,
) = range(len(STATUS))  # fmt: skip
ByMember = Float[np.ndarray, " member"]


@dataclass(frozen=True)
class Edit:
    """One change of a model's activations."""

    kind: str
    """``add to origin``; of student and control ``project out`` or ``replace by origin's``."""
    vector: str
    window: str
    """A hook point, or several."""
    points: tuple[str, ...]
    """Of the reference; another model has the windows of its own stream."""
    dose: str
    """Length of what is added, as a multiple of the mean ‖h‖ there, in equal parts over the hook points of a window; ``own
    length``: as it is. Empty where nothing is added."""

    @property
    def name(self) -> str:
        """Of all edits one."""
        return " ".join(filter(None, (self.kind, self.vector, self.dose, "@", self.window)))


def list_windows(points: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The windows of several hook points of a stream, by name."""
    halves = len(points) // 2
    windows = {ALL_LAYERS: tuple(points)} if len(points) > 1 else {}
    return windows | ({"earlier half": tuple(points[:halves]), "later half": tuple(points[halves:])} if len(points) > 3 else {})


def list_edits(points: Sequence[str]) -> list[Edit]:
    """Single layers and windows; what is added in windows, which is there in the next layers too, at the judged dose only.

    ``points``: all hook points of the stream, which the windows are made of; of a deep model some stand for all as single ones.
    """
    places = np.linspace(0, len(points) - 1, min(len(points), _MOST_LAYERS))
    windows = {points[round(place)]: (points[round(place)],) for place in places} | list_windows(points)
    doses = [*map(str, DOSES), OWN_LENGTH]
    added = [
        Edit(ADD, vector, window, held, dose)
        for vector, (window, held), dose in product(VECTORS, windows.items(), doses)
        if len(held) == 1 or dose == str(JUDGED_DOSE)
    ]
    taken = [
        Edit(kind, vector, window, held, "")
        for kind, vector, (window, held) in product((OUT, REPLACE), VECTORS, windows.items())
    ]
    return added + taken


@dataclass
class Measured:
    """Effects of every edit on the score of the student's own trait."""

    run: Run
    edits: Sequence[Edit]
    effects: Float[np.ndarray, "condition taught member edit"]
    """Of the student, or of its origin where something is added to that."""
    control_effects: Float[np.ndarray, "condition taught member edit"]
    """Of the control under the very same edit of what is taken out."""
    damage: Float[np.ndarray, "condition taught member edit"]
    status: np.ndarray
    control_status: np.ndarray
    totals: Mapping[str, Float[np.ndarray, "condition taught member"]]
    """The student less its control, and the teacher less its reference."""

    @cached_property
    def specific_effects(self) -> Float[np.ndarray, "condition taught member edit"]:
        """What an edit does to what the student has over its control; what is added is added to the origin of both."""
        is_added = np.array([edit.kind == ADD for edit in self.edits])
        return self.effects - np.where(is_added, 0.0, self.control_effects)

    def pooled(self, condition: str, edit: Edit) -> ByMember:
        """The specific effect of one edit, member by member, mean over traits."""
        return self._pool(self.specific_effects[..., self.edits.index(edit)], condition)

    def price(self, condition: str, edit: Edit) -> ByMember:
        """The damage of one edit, member by member, mean over traits."""
        return self._pool(self.damage[..., self.edits.index(edit)], condition)

    def total(self, condition: str) -> ByMember:
        """The student less its control, mean over traits."""
        return self._pool(self.totals["student"], condition)

    def taught(self, condition: str) -> ByMember:
        """The teacher less its reference, mean over traits."""
        return self._pool(self.totals["teacher"], condition)

    def _pool(self, values: np.ndarray, condition: str) -> ByMember:
        found: np.ndarray = values[self.run.conditions.index(condition)].mean(0)
        return found

    def find(self, kind: str, vector: str, window: str, dose: str = "") -> Edit:
        """The edit of that description."""
        return next(one for one in self.edits if (one.kind, one.vector, one.window, one.dose) == (kind, vector, window, dose))

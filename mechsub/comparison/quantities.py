"""The quantities that a comparison shows: the one that each analysis judges first, its null, its margin, and where it lies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsub.findings import Finding
from mechsub.results import Result

_MODEL = "model"
_NOT_RUN = "not_run"

Case = tuple[str, str]
"""A condition and the trait of the student's teacher."""


@dataclass(frozen=True)
class Place:
    """Where in a result the judged value of a case stands."""

    indexers: Mapping[str, Any]
    """Labels by dimension; over a list of steps the mean is taken."""
    words: str
    """What of it must be the same for two values to be held against each other; empty where that is always so."""


Locate = Callable[["Quantity", Result, Case], Place]


@dataclass(frozen=True)
class Quantity:
    """One quantity of the comparison."""

    name: str
    title: str
    """What it asks, as a heading."""
    analysis: str
    variable: str
    margin: str
    """The field of the recipe's verdict that holds its margin."""
    locate: Locate
    null: str = ""
    """The variable that is its null, member by member; without one it is 0."""
    swaps: bool = False
    """Whether the null is what swapping two teachers' labels within members gives."""
    needs_traits: bool | None = None
    """Of an analysis that judges one quantity in a run of several traits and another in a run of one: which this is."""

    def is_of(self, result: Result) -> bool:
        """Whether this is what the analysis judges in that run."""
        return self.needs_traits is None or self.needs_traits == (result.data.sizes["taught"] > 1)

    def find(self, result: Result, case: Case) -> Finding | None:
        """The finding over the widest scope; it has the verdict."""
        return next(
            (one for one in result.findings if (one.quantity, one.condition, one.trait) == (self.variable, *case)), None
        )


@dataclass(frozen=True)
class Measured:
    """One variable's value of every member, and why it is missing; no reason where it is there."""

    values: Float[np.ndarray, " member"]
    why: tuple[str, ...]


def measure(data: xr.Dataset, name: str, place: Place) -> Measured:
    """A variable at a place, member by member; of several steps the mean, NaN where one of them is missing."""
    chosen = data[name].sel(place.indexers)
    values = chosen.mean("step", skipna=False) if "step" in chosen.dims else chosen
    why = ["" if np.isfinite(value) else "not measured" for value in values.values]
    if f"{name}_status" in data:
        status = data[f"{name}_status"]
        meanings = str(status.attrs["flag_meanings"]).split()
        codes = status.sel(place.indexers).transpose("member", ...).values.reshape(values.sizes["member"], -1)
        for member in np.flatnonzero(~np.isfinite(values.values)):
            said = [meanings[code] for code in codes[member] if code]
            why[member] = said[0].replace("_", " ") if said else why[member]
    return Measured(values.values.astype(float), tuple(why))


def subtract_null(value: Measured, null: Measured) -> Measured:
    """The value over its own null; where either is missing its reason."""
    why = tuple(own or (f"its null: {other}" if other else "") for own, other in zip(value.why, null.why, strict=True))
    return Measured(value.values - null.values, why)


def mean_over_traits(measured: Sequence[Measured]) -> Measured:
    """Of each member the mean over traits; missing where one of them is."""
    reasons = zip(*(one.why for one in measured), strict=True)
    why = tuple(next((reason for reason in of_member if reason), "") for of_member in reasons)
    return Measured(np.mean([one.values for one in measured], axis=0), why)


def _case_labels(case: Case) -> dict[str, Any]:
    return {"condition": case[0], "taught": case[1]}


def _in_first_context(quantity: Quantity, result: Result, case: Case) -> Place:
    finding = quantity.find(result, case)
    context = str(result.data.context.values[0])
    return Place(_case_labels(case) | {"context": context}, finding.context if finding else context)


def _at_last_step(quantity: Quantity, result: Result, case: Case) -> Place:
    last = int(result.data.last_step.sel(_case_labels(case)))
    return Place(_case_labels(case) | {"scope": _MODEL, "step": [last]}, "")


def _over_steps(quantity: Quantity, result: Result, case: Case) -> Place:
    """All of the student's own checkpoints: those of other students were not run."""
    labels = _case_labels(case) | {"scope": _MODEL}
    status = result.data[f"{quantity.variable}_status"]
    code = str(status.attrs["flag_meanings"]).split().index(_NOT_RUN)
    were_run = (status.sel(labels) != code).any("member")
    steps = result.data.step.values[were_run.values]
    return Place(labels | {"step": list(steps) or list(result.data.step.values)}, "")


def _at_last_point(quantity: Quantity, result: Result, case: Case) -> Place:
    """The last hook point at which the analysis could compare; its findings name it first.

    Of several traits the null is made of the other teachers, so that runs of other traits have another null.
    """
    finding, points = quantity.find(result, case), [str(name) for name in result.data.point.values]
    named = finding.scope.partition(", ")[0] if finding else ""
    point, group = named if named in points else points[-1], str(result.data.group.values[0])
    last = int(result.data.last_step.sel(_case_labels(case)))
    others = [str(trait) for trait in result.data.taught.values if trait != case[1]]
    null = f", against the teachers of {', '.join(sorted(others))}" if others else ""
    return Place(_case_labels(case) | {"point": point, "group": group, "step": [last]}, f"{point}, {group}{null}")


QUANTITIES = (
    Quantity("effect", "Did the trait pass? The effect", "behaviour", "effect", "margin", _in_first_context),
    Quantity(
        "specific_alignment",
        "Did the weights move to its own teacher rather than to another? Specific alignment",
        "parameter_alignment",
        "specific_alignment",
        "alignment_margin",
        _at_last_step,
        swaps=True,
    ),
    Quantity(
        "gradient_overlap",
        "Does a step that imitates the teacher teach the trait? Gradient overlap",
        "gradient_overlap",
        "gradient_alignment",
        "gradient_margin",
        _over_steps,
        null="gradient_alignment_of_control",
    ),
    Quantity(
        "steering_cosine",
        "Did the activations move where the teacher's did? Steering cosine",
        "steering_directions",
        "steering_alignment",
        "alignment_margin",
        _at_last_point,
        null="steering_alignment_of_control",
        needs_traits=False,
    ),
    Quantity(
        "steering_cosine_less_control",
        "Did the activations move where the own teacher's did, not where others' did? Steering cosine",
        "steering_directions",
        "control_adjusted_steering_alignment",
        "alignment_margin",
        _at_last_point,
        null="control_adjusted_steering_alignment_with_other_teachers",
        needs_traits=True,
    ),
)
"""In the order of the page."""

"""Steering effect: do steering directions give the trait to a model that lacks it, and does taking them out take it away?"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.backends import Visit
from mechsub.activations.hook_points import RESIDUAL_SITES, HookPoint
from mechsub.activations.steering import add_vector, project_out, replace_components
from mechsub.analyses.registry import analysis
from mechsub.cases import count_members
from mechsub.errors import ActivationError
from mechsub.figures import DATA, Figure, chart_spec, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.lineages import Lineage, Origin
from mechsub.mean_activations import ActivationReader
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, fieller_interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects
from mechsub.steered_scores import Steered, SteeredModel, open_steered
from mechsub.streams import random_stream

SOURCE = "adding and removing steering directions: Blank, arXiv:2606.00995; Turner et al., arXiv:2308.10248"
ADD, OUT, REPLACE = "add to origin", "project out of student", "replace by origin's"
OWN_TEACHER, OTHER_TEACHERS, OWN_STUDENT, OTHER_STUDENTS, CONTROL, RANDOM = (
    "own v_T", "other teachers' v_T", "own v_S", "other students' v_S", "v_C", "random",
)  # fmt: skip
_VECTORS = (OWN_TEACHER, OTHER_TEACHERS, OWN_STUDENT, OTHER_STUDENTS, CONTROL, RANDOM)
_DOSES = (-1.0, 0.25, 0.5, 1.0, 2.0)
_JUDGED_DOSE = 0.5
"""Half the length of the activations: set before any run was looked at."""
_OWN_LENGTH = "own length"
_OTHERS_TAKEN_OUT = 2
"""Other traits whose directions are taken out of a student; all of them are added to origins."""
_MOST_LAYERS = 8
_ALL_LAYERS, _ALL_TRAITS = "all layers", "mean over traits"
_STATUS = ("ok", "not_run", "other_basis", "no_such_vector", "no_such_hook_point", "nothing_moved", "other_passes")
_OK, _NOT_RUN, _OTHER_BASIS, _NO_VECTOR, _NO_POINT, _UNMOVED, _OTHER_PASSES = range(len(_STATUS))
ByMember = Float[np.ndarray, " member"]


@dataclass(frozen=True)
class Edit:
    """One change of a model's activations."""

    kind: str
    """``add to origin``, ``project out of student`` or ``replace by origin's``."""
    vector: str
    window: str
    """A hook point, or several."""
    points: tuple[str, ...]
    dose: str
    """Length of what is added, as a multiple of the mean ‖h‖ there; ``own length``: as it is. Empty where nothing is added."""

    @property
    def name(self) -> str:
        """Of all edits one."""
        return " ".join(filter(None, (self.kind, self.vector, self.dose, "@", self.window)))


def _list_edits(points: Sequence[str]) -> list[Edit]:
    """Single layers for what is added, which is there in the next layers too; windows for what is taken out."""
    halves = len(points) // 2
    windows: dict[str, tuple[str, ...]] = {point: (point,) for point in points}
    if len(points) > 1:
        windows[_ALL_LAYERS] = tuple(points)
    if len(points) > 3:
        windows |= {"earlier half": tuple(points[:halves]), "later half": tuple(points[halves:])}
    doses = [*map(str, _DOSES), _OWN_LENGTH]
    added = [Edit(ADD, vector, point, (point,), dose) for vector, point, dose in product(_VECTORS, points, doses)]
    taken = [
        Edit(kind, vector, window, held, "")
        for kind, vector, (window, held) in product((OUT, REPLACE), _VECTORS, windows.items())
    ]
    return added + taken


@dataclass
class _Measured:
    """Effects of every edit on the score of the student's own trait."""

    run: Run
    edits: Sequence[Edit]
    effects: Float[np.ndarray, "condition taught member edit"]
    damage: Float[np.ndarray, "condition taught member edit"]
    status: np.ndarray
    totals: Mapping[str, Float[np.ndarray, "condition taught member"]]
    """The student less its control, and the teacher less its reference."""

    def pooled(self, condition: str, edit: Edit, trait: str | None = None) -> ByMember:
        """The effect of one edit, member by member, of one trait or the mean over traits."""
        return self._pool(self.effects[..., self.edits.index(edit)], condition, trait)

    def pooled_damage(self, condition: str, edit: Edit) -> ByMember:
        """The same of the damage."""
        return self._pool(self.damage[..., self.edits.index(edit)], condition, None)

    def total(self, condition: str, trait: str | None = None) -> ByMember:
        """The student less its control."""
        return self._pool(self.totals["student"], condition, trait)

    def taught(self, condition: str) -> ByMember:
        """The teacher less its reference, mean over traits."""
        return self._pool(self.totals["teacher"], condition, None)

    def _pool(self, values: np.ndarray, condition: str, trait: str | None) -> ByMember:
        of_condition = values[self.run.conditions.index(condition)]
        found: np.ndarray = of_condition.mean(0) if trait is None else of_condition[self.run.traits.index(trait)]
        return found

    def find(self, kind: str, vector: str, window: str, dose: str = "") -> Edit:
        """The edit of that description."""
        return next(one for one in self.edits if (one.kind, one.vector, one.window, one.dose) == (kind, vector, window, dose))


@analysis(needs=["traits"], reads_activations=True)
def steering_effect(run: Run) -> Result:
    """Whether steering directions are enough for the trait in the reference, and needed for it in the student."""
    measured = _Measurer(run).measure_all()
    data = _label(run, measured)
    judgements = _judge(run, measured)
    figures = [_necessity_figure(run, measured), *_dose_figures(run, measured)]
    return Result(data, list(_findings(run, measured, judgements)), figures, list(_sentences(run, measured, judgements)))


Vectors = Mapping[str, Float[Tensor, " width"]]
"""By hook point."""


@dataclass
class _Member:
    """One member: its directions, and its starts with what was already added to them."""

    run: Run
    reader: ActivationReader
    number: int
    stack: ExitStack
    _directions: dict[str, Vectors] = field(default_factory=dict)
    _origins: dict[tuple[Origin, str], SteeredModel] = field(default_factory=dict)
    _added: dict[tuple[Any, ...], Steered] = field(default_factory=dict)

    def direction(self, lineage: Lineage) -> Vectors:
        """V of a lineage at its last step, on the trait's prompts, by hook point."""
        if lineage.name not in self._directions:
            found = self.reader.direction(lineage, lineage.last, self.number)
            self._directions[lineage.name] = found.group(found.groups[0])
        return self._directions[lineage.name]

    def lengths(self, lineage: Lineage) -> Mapping[str, float]:
        """Mean ‖h‖ of where a lineage starts, on the same prompts."""
        return {name: float(norms[0]) for name, norms in self.reader.read_origin(lineage, self.number).norms.items()}

    def origin(self, lineage: Lineage) -> SteeredModel:
        """Where a lineage starts, asked what the lineage is asked; opened once."""
        key = (lineage.spec.origin, str(lineage.context(self.number)))
        if key not in self._origins:
            opened = open_steered(self.run, lineage, 0, self.number, (lineage, self.number))
            self._origins[key] = self.stack.enter_context(opened)
        return self._origins[key]

    def add(self, lineage: Lineage, name: str, point: HookPoint, vector: Tensor) -> Steered:
        """A vector added to where a lineage starts; what many conditions add there is added once."""
        origin = self.origin(lineage)
        key = (id(origin), name, point.name, float(vector.norm()))
        if key not in self._added:
            self._added[key] = origin.evaluate({point: add_vector(vector)})
        return self._added[key]

    def draw_random(self, points: Sequence[HookPoint]) -> Vectors:
        """One direction a hook point, uniform on the sphere."""
        found = {}
        for point in points:
            stream = random_stream(self.run.recipe.seed, "member", self.number, "random-steering", point.name)
            drawn = torch.from_numpy(stream.standard_normal(point.width))
            found[point.name] = drawn / drawn.norm()
        return found


@dataclass(frozen=True)
class _Measurer:
    """Goes through members, conditions and traits; a student is loaded once."""

    run: Run

    @cached_property
    def reader(self) -> ActivationReader:
        """Of the residual stream, or hidden layers."""
        every = ActivationReader(self.run).points
        sites = tuple(dict.fromkeys(point.site for point in every if point.site in RESIDUAL_SITES))
        return ActivationReader(self.run, sites=sites or None)

    def measure_all(self) -> _Measured:
        """Every edit of every student, and what there is to explain."""
        run = self.run
        points = [point.name for point in self.reader.points]
        if len(points) > _MOST_LAYERS:
            points = [points[round(place)] for place in np.linspace(0, len(points) - 1, _MOST_LAYERS)]
        edits = _list_edits(points)
        shape = (len(run.conditions), len(run.traits), run.recipe.members)
        effects, damage = np.full((*shape, len(edits)), np.nan), np.full((*shape, len(edits)), np.nan)
        status = np.full((*shape, len(edits)), _NOT_RUN, dtype=np.int8)
        totals = {name: np.full(shape, np.nan) for name in ("student", "teacher")}
        for number in range(run.recipe.members):
            with ExitStack() as stack:
                member = _Member(run, self.reader, number, stack)
                for row, condition in enumerate(run.conditions):
                    controlled = self._score(run.control(condition), number)
                    for place, trait in enumerate(run.traits):
                        cell = (row, place, number)
                        found = _edit_student(member, condition, trait, edits)
                        effects[cell], damage[cell], status[cell] = found.effects, found.damage, found.status
                        totals["student"][cell] = (found.scores - controlled)[place]
                        taught = self._score(run.teacher(trait), number)
                        totals["teacher"][cell] = (taught - member.origin(run.teacher(trait)).scores)[place]
            run.report_progress(run.num_checkpoints * (number + 1) // run.recipe.members)
        return _Measured(run, edits, effects, damage, status, totals)

    def _score(self, lineage: Lineage | None, member: int) -> Float[np.ndarray, " trait"]:
        """Of a lineage's end, every trait; NaN where there is none."""
        if lineage is None:
            return np.full(len(self.run.family.traits), np.nan)
        model = self.run.family.load_model(lineage, lineage.last, member)
        found = self.run.family.trait_score(model, lineage, member, verdict_only=True)
        scores: np.ndarray = next(iter(found.values()))[:, 0]
        return scores


@dataclass(frozen=True)
class _Edited:
    """One student's edits."""

    effects: Float[np.ndarray, " edit"]
    damage: Float[np.ndarray, " edit"]
    status: np.ndarray
    scores: Float[np.ndarray, " trait"]
    """Of the student as it is."""


def _edit_student(member: _Member, condition: str, trait: str, edits: Sequence[Edit]) -> _Edited:
    run = member.run
    student, place = run.student(condition, trait), run.traits.index(trait)
    effects, damage = np.full(len(edits), np.nan), np.full(len(edits), np.nan)
    status = np.full(len(edits), _NOT_RUN, dtype=np.int8)
    with open_steered(run, student, student.last, member.number, (student, member.number)) as opened:
        points = {point.name: point for point in opened.points}
        for number, edit in enumerate(edits):
            chosen = [points[name] for name in edit.points if name in points]
            vectors = _find_vectors(member, condition, trait, edit)
            if isinstance(vectors, int) or len(chosen) < len(edit.points):
                status[number] = vectors if isinstance(vectors, int) else _NO_POINT
            elif student.last == 0 or any(not bool(held[p.name].any()) for held in vectors.values() for p in chosen):
                status[number] = _UNMOVED
            else:
                apply = partial(_add, member, student) if edit.kind == ADD else partial(_take_out, member, student, opened)
                found = [apply(edit, name, held, chosen) for name, held in vectors.items()]
                told = [one for one in found if one is not None]
                base = member.origin(student).scores if edit.kind == ADD else opened.scores
                status[number] = _OK if len(told) == len(found) else _OTHER_PASSES
                if status[number] == _OK:
                    effects[number] = np.mean([one.scores[place] - base[place] for one in told])
                    damage[number] = np.mean([one.damage for one in told])
        return _Edited(effects, damage, status, opened.scores)


def _find_vectors(member: _Member, condition: str, trait: str, edit: Edit) -> dict[str, Vectors] | int:
    """The directions that an edit means, by name; or the status that says why there are none."""
    run = member.run
    student, control = run.student(condition, trait), run.control(condition)
    if edit.vector == RANDOM:
        return {RANDOM: member.draw_random(run.family.hook_points(student, member.origin(student).view.model))}
    others = [other for other in run.traits if other != trait]
    if edit.kind != ADD:  # the next ones in the list, so that each trait's is taken as often
        start = run.traits.index(trait)
        turned = [run.traits[(start + step) % len(run.traits)] for step in range(1, len(run.traits))]
        others = turned[:_OTHERS_TAKEN_OUT]
    chosen: Mapping[str, list[Lineage | None]] = {
        OWN_TEACHER: [run.teacher(trait)],
        OTHER_TEACHERS: [*map(run.teacher, others)] or [run.neutral],
        OWN_STUDENT: [student],
        OTHER_STUDENTS: [run.student(condition, other) for other in others] or [control],
        CONTROL: [control],
    }
    lineages = [lineage for lineage in chosen[edit.vector] if lineage is not None]
    is_teachers = edit.vector in {OWN_TEACHER, OTHER_TEACHERS}
    if is_teachers and (run.starts_elsewhere(student) or not run.is_comparable(condition)):
        return _OTHER_BASIS
    return {lineage.name: member.direction(lineage) for lineage in lineages} or _NO_VECTOR


def _add(member: _Member, student: Lineage, edit: Edit, name: str, vectors: Vectors, points: Sequence[HookPoint]) -> Steered:
    (point,) = points
    vector = vectors[point.name]
    if edit.dose != _OWN_LENGTH:
        vector = vector / vector.norm() * float(edit.dose) * member.lengths(student)[point.name]
    elif name == RANDOM:  # it has no length of its own: as long as what the student has
        vector = vector * member.direction(student)[point.name].norm()
    return member.add(student, name, point, vector)


def _take_out(
    member: _Member,
    student: Lineage,
    opened: SteeredModel,
    edit: Edit,
    name: str,
    vectors: Vectors,
    points: Sequence[HookPoint],
) -> Steered | None:
    """None where the origin's forward passes are others than the student's: answers that are sampled end at other places."""
    rows = {point: vectors[point.name][None] for point in points}
    if edit.kind == OUT:
        return opened.evaluate({point: project_out(held) for point, held in rows.items()})
    kept = member.origin(student).keep(rows)
    changes: dict[HookPoint, Visit] = {point: replace_components(held, kept[point]) for point, held in rows.items()}
    try:
        return opened.evaluate(changes)
    except ActivationError:
        return None


def _label(run: Run, measured: _Measured) -> xr.Dataset:
    unit = next(iter(run.family.measures.values())).unit
    dims = ("condition", "taught", "member", "edit")
    described = {
        "effect": (
            measured.effects,
            "change of the student's own trait's score by one edit",
            unit,
            "score(edited) − score(unedited)",
        ),
        "damage": (measured.damage, "how much else the edit changes, on neutral inputs", "nats", "KL(p ‖ p_edited)"),
    }
    variables: dict[str, Any] = {}
    for name, (values, description, own_unit, formula) in described.items():
        variables[name] = label_variable(values, dims, description=description, unit=own_unit, formula=formula, source=SOURCE)
        variables[f"{name}_status"] = status_variable(measured.status, dims, _STATUS, name)
    for name, formula in (("student", "score(student) − score(control)"), ("teacher", "score(teacher) − score(reference)")):
        values = measured.totals[name]
        variables[f"{name}_effect"] = label_variable(
            values, dims[:3], description=f"what the {name} has of its trait", unit=unit, formula=formula
        )
        missing = status_variable(np.isnan(values), dims[:3], ("ok", "no_control_or_score"), f"{name}_effect")
        variables[f"{name}_effect_status"] = missing
    coords: dict[str, Any] = {
        "condition": run.conditions,
        "taught": run.traits,
        "member": np.arange(run.recipe.members),
        "edit": [edit.name for edit in measured.edits],
    }
    for field_name in ("kind", "vector", "window", "dose"):
        coords[field_name] = ("edit", np.array([getattr(edit, field_name) for edit in measured.edits], dtype=object))
    numbers = [float(edit.dose) if edit.dose not in ("", _OWN_LENGTH) else np.nan for edit in measured.edits]
    coords["alpha"] = ("edit", numbers)
    return xr.Dataset(variables, coords)


@dataclass(frozen=True)
class _Claim:
    """A judged comparison: an edit with a student's own direction, less the same with others'."""

    quantity: str
    kind: str
    own: str
    others: str
    dose: str
    sign: float
    """−1 where taking something out is to lower the score."""
    null: str
    formula: str


_CLAIMS = (
    _Claim(
        "sufficiency_of_teacher_direction", ADD, OWN_TEACHER, OTHER_TEACHERS, str(_JUDGED_DOSE), 1.0,
        "other teachers' v_T, as long", "score(origin + α ‖h‖ v̂_T) − score(origin)",
    ),
    _Claim(
        "sufficiency_of_student_direction", ADD, OWN_STUDENT, OTHER_STUDENTS, str(_JUDGED_DOSE), 1.0,
        "other students' v_S, as long", "score(origin + α ‖h‖ v̂_S) − score(origin)",
    ),
    _Claim(
        "necessity_of_teacher_direction", REPLACE, OWN_TEACHER, OTHER_TEACHERS, "", -1.0,
        "other teachers' v_T", "score(student) − score(student with the origin's component along v̂_T)",
    ),
    _Claim(
        "necessity_of_student_direction", REPLACE, OWN_STUDENT, OTHER_STUDENTS, "", -1.0,
        "other students' v_S", "score(student) − score(student with the origin's component along v̂_S)",
    ),
)  # fmt: skip


def _windows(measured: _Measured, kind: str) -> list[str]:
    return list(dict.fromkeys(edit.window for edit in measured.edits if edit.kind == kind))


Claimed = tuple[str, str, str]
"""A claim's quantity, a condition and a window."""


def _judge(run: Run, measured: _Measured) -> dict[Claimed, Judgement]:
    """Verdicts on the mean over traits; Holm over conditions and windows of each claim."""
    judgements: dict[Claimed, Judgement] = {}
    for claim in _CLAIMS:
        effects = {}
        for condition, window in product(run.conditions, _windows(measured, claim.kind)):
            own, others = _compare(measured, claim, condition, window)
            if np.isfinite(own - others).any():
                effects[claim.quantity, condition, window] = own - others
        judgements |= judge_effects(effects, run.rules(run.recipe.verdict.margin), AGAINST_NULL)
    return judgements


def _compare(measured: _Measured, claim: _Claim, condition: str, window: str) -> tuple[ByMember, ByMember]:
    """The own effect and others', mean over traits."""
    own, others = (measured.find(claim.kind, vector, window, claim.dose) for vector in (claim.own, claim.others))
    return claim.sign * measured.pooled(condition, own), claim.sign * measured.pooled(condition, others)


def _findings(run: Run, measured: _Measured, judgements: Mapping[Claimed, Judgement]) -> Iterator[Finding]:
    verdict = run.recipe.verdict
    for claim, condition in product(_CLAIMS, run.conditions):
        for window in _windows(measured, claim.kind):
            own, others = _compare(measured, claim, condition, window)
            if not np.isfinite(own).any():
                continue
            against = student_interval(others, verdict.confidence)
            dose = f", α = {claim.dose}" if claim.dose else ""
            yield Finding(
                analysis="steering_effect",
                quantity=claim.quantity,
                condition=condition,
                trait=_ALL_TRAITS if len(run.traits) > 1 else run.traits[0],
                context=next(iter(run.family.contexts)),
                step=run.student(condition, run.traits[0]).last,
                scope=f"{window}, all positions{dose}",
                unit=next(iter(run.family.measures.values())).unit,
                null=claim.null if np.isfinite(against.estimate) else "none: there is no other direction",
                null_low=against.low,
                null_high=against.high,
                num_references=run.recipe.num_references(condition),
                **judgement_fields(judgements.get((claim.quantity, condition, window)), verdict.margin, "it has no null here"),
                formula=claim.formula,
                source=SOURCE,
                **interval_fields(student_interval(own, verdict.confidence)),
            )


_COLORS = alt.Color(
    "vector:N",
    sort=list(_VECTORS),
    title=None,
    scale=alt.Scale(domain=list(_VECTORS), range=["#ea580c", "#fdba74", "#2563eb", "#93c5fd", "#64748b", "#cbd5e1"]),
)


def _told(run: Run, measured: _Measured) -> list[str]:
    """The conditions in which something was edited."""
    return [name for row, name in enumerate(run.conditions) if (measured.status[row] == _OK).any()]


def _necessity_figure(run: Run, measured: _Measured) -> Figure:
    windows = _windows(measured, OUT)
    edits = [edit.name for edit in measured.edits if edit.kind != ADD]
    base = alt.Chart(DATA).encode(
        y=alt.Y("window:N", sort=windows, title=None), yOffset=alt.YOffset("vector:N", sort=list(_VECTORS)), color=_COLORS
    )
    dots = (
        base.transform_aggregate(effect="mean(effect)", groupby=["condition", "kind", "window", "vector", "member"])
        .mark_circle(size=20, opacity=0.6)
        .encode(
            x=alt.X("effect:Q", title=f"effect on the trait's score ({_unit(run)})"),
            tooltip=["vector:N", "member:O", "effect:Q"],
        )
    )
    total = (
        alt.Chart(DATA)
        .transform_aggregate(total="mean(student_effect)", groupby=["condition", "kind"])
        .transform_calculate(removed="-datum.total")
        .mark_rule(strokeDash=[4, 3], color="#0f172a")
        .encode(x="removed:Q")
    )
    facets = (
        alt.layer(zero_line().encode(x=alt.datum(0)), total, dots, data=DATA)
        .properties(width=230, height=alt.Step(7))
        .facet(
            row=alt.Row("condition:N", sort=run.conditions, title=None),
            column=alt.Column("kind:N", sort=[OUT, REPLACE], title=None),
        )
    )
    return Figure(
        name="steering_necessity",
        title="What is left of the trait without a steering direction",
        caption=(
            "Change of the student's own trait's score when one direction is taken out of its activations at every position: "
            "projected out, or replaced by what its origin has there. Each dot is the mean over traits of one of "
            f"{count_members(run)}. The null is other teachers' or students' directions; random ones are a line to read by. "
            f"Dashed: all that the student took over, − (score − control), in {_unit(run)}."
        ),
        variables=("effect", "student_effect"),
        spec=chart_spec(facets),
        select={"edit": edits, "condition": _told(run, measured)},
        headline=True,
    )


def _unit(run: Run) -> str:
    return next(iter(run.family.measures.values())).unit


def _dose_figures(run: Run, measured: _Measured) -> list[Figure]:
    edits = [edit.name for edit in measured.edits if edit.kind == ADD and edit.dose != _OWN_LENGTH]
    figures = []
    for name, y, title in (
        ("effect", f"effect ({_unit(run)})", "What steering directions give to the model that students start from"),
        ("damage", "damage (nats)", "What else they do there: the price of each dose"),
    ):
        x = alt.X("alpha:Q", title="α: length over that of the activations", axis=alt.Axis(grid=False))
        chart = alt.Chart(DATA).transform_filter(f"isValid(datum.{name})")
        members = (
            chart.transform_aggregate(value=f"mean({name})", groupby=["condition", "window", "vector", "alpha", "member"])
            .mark_line(opacity=0.25, strokeWidth=1)
            .encode(x=x, y=alt.Y("value:Q", title=y), color=_COLORS, detail="member:N")
        )
        mean = chart.mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=18)).encode(
            x=x, y=f"mean({name}):Q", color=_COLORS
        )
        facets = (
            alt.layer(zero_line().encode(y=alt.datum(0)), members, mean, data=DATA)
            .properties(width=165, height=115)
            .facet(
                row=alt.Row("condition:N", sort=run.conditions, title=None),
                column=alt.Column("window:N", sort=_windows(measured, ADD), title=None),
            )
        )
        figures.append(
            Figure(
                name=f"steering_{'doses' if name == 'effect' else name}",
                title=title,
                caption=(
                    f"{'Score of the own trait' if name == 'effect' else 'KL(p ‖ p′) on neutral inputs'} after α ‖h‖ v̂ is "
                    "added at every position of one hook point, less that of the origin; ‖h‖ is the mean norm there. Thin "
                    f"lines: {count_members(run)}, mean over traits; thick: their mean. The null is other teachers' and "
                    "students' directions, as long; so is a random one."
                ),
                variables=(name,),
                spec=chart_spec(facets),
                select={"edit": edits, "condition": _told(run, measured)},
            )
        )
    return figures


def _sentences(run: Run, measured: _Measured, judgements: Mapping[Claimed, Judgement]) -> Iterator[str]:
    yield (
        "Directions are estimated on the trait's prompts at the position that they are read at, and added or taken out at "
        "every position of other prompts, on which the score is taken."
    )
    for condition in run.conditions:
        if condition not in _told(run, measured):
            yield f"{condition}: nothing was edited; its students did not move."
            continue
        yield _tell_sufficiency(run, measured, judgements, condition)
        yield _tell_necessity(run, measured, judgements, condition)
        if run.starts_elsewhere(run.student(condition, run.traits[0])) or not run.is_comparable(condition):
            yield f"{condition}: its students start from another base, so that teachers' directions mean nothing there."


def _tell_sufficiency(run: Run, measured: _Measured, judgements: Mapping[Claimed, Judgement], condition: str) -> str:
    """What half a length of the directions gives where it gives most, beside what teacher and student have."""
    parts = []
    for claim in _CLAIMS[:2]:
        windows = [window for window in _windows(measured, ADD) if (claim.quantity, condition, window) in judgements]
        if windows:
            effects = {window: _compare(measured, claim, condition, window) for window in windows}
            most = max(windows, key=lambda window: effects[window][0].mean())
            own, others = (_interval(run, values) for values in effects[most])
            counts = _count([judgements[claim.quantity, condition, window].verdict for window in windows])
            parts.append(f"{claim.own} gives {own} at {most}, where it gives most (others {others}); {counts} hook points")
    teacher, given = _interval(run, measured.taught(condition)), "; ".join(parts) or "nothing was judged"
    return (
        f"{condition}: added to where students start, α = {_JUDGED_DOSE:g}: {given}. The teacher itself gained {teacher}, "
        f"the student {_interval(run, measured.total(condition))} over its control ({_unit(run)})."
    )


def _count(verdicts: Sequence[str]) -> str:
    return ", ".join(f"{name} at {verdicts.count(name)} of {len(verdicts)}" for name in dict.fromkeys(verdicts))


def _tell_necessity(run: Run, measured: _Measured, judgements: Mapping[Claimed, Judgement], condition: str) -> str:
    """What share of the transferred trait goes with each direction: over all layers, and of single ones where most does."""
    if not _interval(run, measured.total(condition)).low > 0:
        return f"{condition}: what its students took over is not told from 0, so no share of it is given."
    parts = []
    for claim in _CLAIMS[2:]:
        shares = {
            window: share
            for window in _windows(measured, REPLACE)
            if np.isfinite((share := _share(run, measured, condition, claim.own, window)).estimate)
        }
        if shares:
            single = [window for window in shares if window in _windows(measured, ADD)]
            shown = dict.fromkeys([max(single, key=lambda window: shares[window].estimate), *(set(shares) & {_ALL_LAYERS})])
            told = [f"{shares[one]} at {one} (others {_share(run, measured, condition, claim.others, one)})" for one in shown]
            counts = _count(
                [judgements[key].verdict for one in shares if (key := (claim.quantity, condition, one)) in judgements]
            )
            parts.append(f"with {claim.own} {', '.join(told)}; {counts} windows")
    how = "share of the transferred trait that goes when the origin's component takes the place of the student's"
    return f"{condition}: {how}: {'; '.join(parts)}. The single hook point is the one where most goes."


def _share(run: Run, measured: _Measured, condition: str, vector: str, window: str) -> Interval:
    removed = -measured.pooled(condition, measured.find(REPLACE, vector, window))
    return fieller_interval(removed, measured.total(condition), run.recipe.verdict.confidence)


def _interval(run: Run, values: ByMember) -> Interval:
    return student_interval(values, run.recipe.verdict.confidence)

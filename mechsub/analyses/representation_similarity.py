"""Representation similarity: do a student's activations come to be like its teacher's, and where the trait is read?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float

from mechsub.analyses.registry import analysis
from mechsub.cases import CaseName, count_members, label_last_steps, list_cases
from mechsub.figures import DATA, Figure, chart_spec, diverging_scale, fold_variables
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.pooling import list_traits, pool_traits, say_statuses
from mechsub.representations import (
    CKA,
    DISTANCE,
    FROZEN,
    INSIDE,
    INSIDE_DISTANCE,
    PROBE,
    READOUT,
    REFITTED,
    STATUS,
    Comparer,
    Unknown,
    ValueTable,
)
from mechsub.results import Result, label_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, TRANSFER, Judgement, judge_effects
from mechsub.steered.scores import score_effects

SOURCE = "CKA beside transfer, whole and in a trait's subspace: Okatan et al., arXiv:2511.01023; debiased: arXiv:2405.01012"
_HIGH = 0.9
"""A CKA that is called high."""
_BY_GROUP = ("condition", "taught", "member", "point", "group")
_BY_POINT = _BY_GROUP[:-1]


@dataclass(frozen=True)
class _Quantity:
    """One measure of a student, of its control, and where it has one of its start."""

    name: str
    formula: str
    unit: str = "no unit"
    dims: tuple[str, ...] = _BY_POINT
    of_start: bool = False
    margin: str = ""
    """The recipe's field; empty where it has no verdict."""
    why_unjudged: str = ""

    @property
    def of_control(self) -> str:
        """The variable of its null."""
        return f"{self.name}_of_control"


_QUANTITIES = (
    _Quantity(CKA, "debiased linear CKA of student and teacher", "no unit", _BY_GROUP, True, "similarity_margin"),
    _Quantity(
        INSIDE,
        "debiased linear CKA of what lies in the span of all teachers' v_T; a squared correlation where that is one trait's",
        dims=_BY_GROUP,
        of_start=True,
        margin="similarity_margin",
    ),
    _Quantity(
        DISTANCE,
        "‖X R − Y‖² / ‖Y‖², R a rotation fitted on other prompts, X student, Y teacher",
        dims=_BY_GROUP,
        of_start=True,
        why_unjudged="a distance that grows with whatever a training moves: CKA has the verdict",
    ),
    _Quantity(
        INSIDE_DISTANCE,
        "the same of what lies in the span of all teachers' v_T",
        dims=_BY_GROUP,
        of_start=True,
        why_unjudged="CKA has the verdict",
    ),
    _Quantity(
        PROBE,
        "⟨w_T, m_S − m_start⟩ / ⟨w_T, m_T − m_ref⟩, w_T a probe of teacher against reference, fitted on other prompts",
        unit="share of the way from reference to teacher",
        margin="share_margin",
    ),
    _Quantity(
        READOUT,
        "Σ ⟨z_S − z_start, z_T − z_ref⟩ / Σ ‖z_T − z_ref‖² over prompts, z = W h what a model's own head reads of the trait "
        "(rows W less the mean of all traits' rows)",
        unit="share of the way from reference to teacher",
        margin="share_margin",
    ),
    _Quantity(
        FROZEN,
        "d′ of student against its start by w_T, on prompts that w_T was not fitted on",
        unit="standard deviations over prompts",
        why_unjudged="the share of the way has the verdict",
    ),
    _Quantity(
        REFITTED,
        "d′ of student against its start by a probe that is fitted on these two, on other prompts",
        unit="standard deviations over prompts",
        why_unjudged="whatever a training moves can be told apart: it says that something moved, not what",
    ),
)
_JUDGED = tuple(quantity for quantity in _QUANTITIES if quantity.margin)


@analysis(needs=["traits", "hook_points"], reads_activations=True)
def representation_similarity(run: Run) -> Result:
    """Whether a student's representation comes to be its teacher's: as a whole, in the trait's subspace, and for its head."""
    comparer = Comparer(run)
    data = _measure(run, comparer)
    judgements = _judge(run, data)
    figures = [make(run, data) for make in (_similarity_figure, _probe_figure, _place_figure)]
    return Result(
        data, list(_findings(run, data, judgements)), figures, [*_sentences(run, data, judgements), *_warnings(run, data)]
    )


def _measure(run: Run, comparer: Comparer) -> xr.Dataset:
    """Every quantity of students, controls and starts at last steps, with why a value is NaN."""
    comparer.compare_all()
    variables: dict[str, Any] = {"last_step": label_last_steps(run)}
    for quantity in _QUANTITIES:
        whose = [("", quantity.formula), ("_of_control", f"the same of the control: {quantity.formula}")]
        if quantity.of_start:
            whose.append(("_of_start", f"the same of where student and control start: {quantity.formula}"))
        for suffix, formula in whose:
            name = f"{quantity.name}{suffix}"
            variables |= _fill(comparer, quantity, suffix).label(name, quantity.dims, formula, quantity.unit, SOURCE)
    variables |= _describe_probes(run, comparer) | _describe_maps(run, comparer)
    variables["num_rows"] = _count_rows(run, comparer)
    coords = {
        "condition": run.conditions,
        "taught": run.traits,
        "member": np.arange(run.recipe.members),
        "point": [point.name for point in comparer.points],
        "layer": ("point", [point.layer for point in comparer.points]),
        "site": ("point", [point.site for point in comparer.points]),
        "is_read_out": ("point", [int(point.is_read_out) for point in comparer.points]),
        "group": comparer.groups,
    }
    return xr.Dataset(variables, coords)


def _fill(comparer: Comparer, quantity: _Quantity, suffix: str) -> ValueTable:
    """One quantity of students, of controls or of starts."""
    run = comparer.run
    sizes = {
        "condition": len(run.conditions),
        "taught": len(run.traits),
        "member": run.recipe.members,
        "point": len(comparer.points),
        "group": len(comparer.groups),
    }
    table = ValueTable([sizes[dim] for dim in quantity.dims])
    for (row, condition), (place, trait), member in product(
        enumerate(run.conditions), enumerate(run.traits), range(run.recipe.members)
    ):
        student = run.student(condition, trait)
        lineage = run.control(condition) if suffix == "_of_control" else student
        for number, point in enumerate(comparer.points):
            cell = (row, place, member, number)
            if lineage is None:
                table.status[cell] = Unknown.NO_CONTROL
            elif quantity.dims == _BY_POINT:
                table.put(cell, comparer.probed[trait, lineage.name, member][point.name, quantity.name])
            else:
                name = comparer.start_name(student) if suffix == "_of_start" else lineage.name
                by_group = comparer.compared[trait, name, member].similarities[quantity.name]
                for column, group in enumerate(comparer.groups):
                    table.put((*cell, column), by_group[point.name, group])
    return table


def _describe_probes(run: Run, comparer: Comparer) -> dict[str, xr.Variable]:
    """How well the frozen probes tell teachers from references on prompts that they were not fitted on."""
    table = ValueTable((len(run.traits), run.recipe.members, len(comparer.points)))
    for (place, trait), member, (number, point) in product(
        enumerate(run.traits), range(run.recipe.members), enumerate(comparer.points)
    ):
        table.put((place, member, number), comparer.separations[trait, member][point.name])
    formula = "d′ of teacher against reference by w_T, on prompts that w_T was not fitted on"
    return table.label(
        "teacher_probe_separation", ("taught", "member", "point"), formula, "standard deviations over prompts", SOURCE
    )


def _describe_maps(run: Run, comparer: Comparer) -> dict[str, xr.Variable]:
    """How well the bases of starts elsewhere are mapped onto the references'."""
    table = ValueTable((len(run.conditions), run.recipe.members, len(comparer.points)))
    for (row, condition), member, (number, point) in product(
        enumerate(run.conditions), range(run.recipe.members), enumerate(comparer.points)
    ):
        student = run.student(condition, run.traits[0])
        fitted = comparer.correlations.get((comparer.start_name(student), member), {})
        correlation = fitted.get(point.name, Unknown.INCOMPARABLE)
        table.put((row, member, number), correlation if run.starts_elsewhere(student) else 1.0)
    formula = "⟨X R, Y⟩ / (‖X‖ ‖Y‖) on prompts that R was not fitted on, X the start, Y the reference; 1 where it starts there"
    return table.label("basis_correlation", ("condition", "member", "point"), formula, "no unit", SOURCE)


def _count_rows(run: Run, comparer: Comparer) -> xr.Variable:
    """Of students beside their teachers."""
    counts = [
        [
            [
                [
                    comparer.compared[trait, run.student(condition, trait).name, member].num_rows.get(group, 0)
                    for group in comparer.groups
                ]
                for member in range(run.recipe.members)
            ]
            for trait in run.traits
        ]
        for condition in run.conditions
    ]
    dims = ("condition", "taught", "member", "group")
    return label_variable(counts, dims, description="paired rows of student and teacher", unit="rows")


def _judged_point(data: xr.Dataset) -> str:
    """The last hook point that the head reads: whatever passes on passes there."""
    return str(data.point.values[data.is_read_out.values > 0][-1])


def _by_trait(
    run: Run, data: xr.Dataset, name: str, case: CaseName, point: str, group: str | None = None
) -> Float[np.ndarray, "trait member"]:
    """A variable of one case. On the trait's own prompts unless told."""
    found = data[name].sel(condition=case[0], taught=list_traits(run, case), point=point)
    if "group" in found.dims:
        found = found.sel(group=data.group.values[0] if group is None else group)
    values: np.ndarray = found.transpose("taught", "member").values
    return values


def _mean_over_traits(values: Float[np.ndarray, "trait member"]) -> Float[np.ndarray, " member"]:
    """Of the traits that have a value in that member."""
    known = np.isfinite(values)
    count = known.sum(0)
    sums = np.where(known, values, 0.0).sum(0)
    mean: np.ndarray = np.divide(sums, count, out=np.full(values.shape[1], np.nan), where=count > 0)
    return mean


def _values(
    run: Run, data: xr.Dataset, name: str, case: CaseName, point: str, group: str | None = None
) -> Float[np.ndarray, " member"]:
    """A variable of one case, member by member; of all traits their mean."""
    return _mean_over_traits(_by_trait(run, data, name, case, point, group))


def _effect(run: Run, data: xr.Dataset, quantity: _Quantity, case: CaseName) -> Float[np.ndarray, " member"]:
    """The student's value less its control's, at the judged hook point."""
    own, control = (_by_trait(run, data, name, case, _judged_point(data)) for name in (quantity.name, quantity.of_control))
    return _mean_over_traits(own - control)


Judgements = Mapping[tuple[str, CaseName], Judgement]
"""By quantity and case; of the mean over traits the case's trait says so."""


def _judge(run: Run, data: xr.Dataset) -> Judgements:
    """Verdicts against the control, quantity by quantity.

    Of the mean over traits Holm runs over conditions, of single traits over conditions and traits.
    """
    found: dict[tuple[str, CaseName], Judgement] = {}
    for quantity in _JUDGED:
        rules = run.rules(getattr(run.recipe.verdict, quantity.margin))
        for cases in (list_cases(run), [pool_traits(run, condition) for condition in run.conditions]):
            effects = {case: _effect(run, data, quantity, case) for case in cases}
            known = {case: effect for case, effect in effects.items() if np.isfinite(effect).any()}
            found |= {(quantity.name, case): judged for case, judged in judge_effects(known, rules, AGAINST_NULL).items()}
    return found


def _findings(run: Run, data: xr.Dataset, judgements: Judgements) -> Iterator[Finding]:
    """Of the mean over traits every quantity at every hook point, of single traits what is judged."""
    judged_point, own = _judged_point(data), str(data.group.values[0])
    for quantity, condition in product(_QUANTITIES, run.conditions):
        pooled = pool_traits(run, condition)
        places = [(pooled, str(point), own) for point in data.point.values]
        if quantity.dims == _BY_GROUP:
            places += [(pooled, judged_point, str(group)) for group in data.group.values[1:]]
        if quantity.margin and len(run.traits) > 1:
            places += [((condition, trait), judged_point, own) for trait in run.traits]
        for case, point, group in places:
            if np.isfinite(_values(run, data, quantity.name, case, point, group)).any():
                is_judged = point == judged_point and group == own
                yield _finding(
                    run, data, quantity, case, point, group, judgements.get((quantity.name, case)) if is_judged else None
                )


def _finding(
    run: Run, data: xr.Dataset, quantity: _Quantity, case: CaseName, point: str, group: str, judgement: Judgement | None
) -> Finding:
    verdict = run.recipe.verdict

    def interval(name: str) -> Interval:
        return student_interval(_values(run, data, name, case, point, group), verdict.confidence)

    against = interval(quantity.of_control)
    null_words = f"the control's, a student of {run.neutral_name} from the same start"
    reason = quantity.why_unjudged or f"the verdict is given at {_judged_point(data)}, on {data.group.values[0]}"
    if against.n == 0:
        null_words, reason = (
            "none: no control was given",
            "without its null it says nothing: much is alike before anything is learnt",
        )
    elif quantity.of_start:
        null_words += f"; before anything was learnt it was {interval(f'{quantity.name}_of_start')}"
    students = [run.student(case[0], trait) for trait in list_traits(run, case)]
    is_mapped = run.starts_elsewhere(students[0]) and quantity.name not in (CKA, DISTANCE, READOUT, REFITTED)
    rows = int(data.num_rows.sel(condition=case[0], group=group).max())
    return Finding(
        analysis="representation_similarity",
        quantity=quantity.name,
        condition=case[0],
        trait=case[1],
        context="activations",
        step=max(student.last for student in students),
        scope=f"{point}, {group}, {rows} rows" + (", mapped by a rotation fitted to both starts" if is_mapped else ""),
        unit=quantity.unit,
        null=null_words,
        null_low=against.low,
        null_high=against.high,
        num_references=run.recipe.num_references(case[0]),
        **judgement_fields(
            judgement if against.n else None, getattr(verdict, quantity.margin) if quantity.margin else float("nan"), reason
        ),
        formula=quantity.formula,
        source=SOURCE,
        **interval_fields(interval(quantity.name)),
    )


def _told(run: Run, data: xr.Dataset, *names: str) -> list[str]:
    """The conditions with a value of one of these."""
    return [
        condition
        for condition in run.conditions
        if any(np.isfinite(data[name].sel(condition=condition).values).any() for name in names)
    ]


_CKA_BY_WHO = {
    CKA: "student",
    f"{CKA}_of_control": "control (null)",
    f"{CKA}_of_start": "before training",
    INSIDE: "student",
    f"{INSIDE}_of_control": "control (null)",
    f"{INSIDE}_of_start": "before training",
}
_SHARES = {
    PROBE: "student",
    f"{PROBE}_of_control": "control (null)",
    READOUT: "student",
    f"{READOUT}_of_control": "control (null)",
}


def _parted_dots(names: Mapping[str, str], value: str, title: str, second: str, parts: tuple[str, str], run: Run) -> alt.Chart:
    """One dot per member, by condition and who, in two panels: of variables that begin with ``second`` and of the others."""
    who = list(dict.fromkeys(names.values()))
    dots: alt.Chart = (
        fold_variables(value, names)
        .transform_calculate(part=f"indexof(datum.which, '{second}') == 0 ? '{parts[1]}' : '{parts[0]}'")
        .mark_circle(size=30, opacity=0.5)
        .encode(
            x=alt.X(f"{value}:Q", title=title),
            y=alt.Y("condition:N", sort=run.conditions, title=None),
            yOffset=alt.YOffset("who:N", sort=who),
            color=alt.Color("who:N", sort=who, title=None),
            tooltip=["condition:N", "part:N", "taught:N", "who:N", "member:O", alt.Tooltip(f"{value}:Q", format=".3f")],
        )
        .properties(width=300, height=alt.Step(8))
    )
    return dots


def _similarity_figure(run: Run, data: xr.Dataset) -> Figure:
    parts = ("whole", "in the trait subspace")
    dots = _parted_dots(_CKA_BY_WHO, "similarity", "debiased CKA with the teacher", INSIDE, parts, run)
    rows = int(data.num_rows.isel(group=0).max())
    return Figure(
        name="cka_by_condition",
        title="Is the student's representation its teacher's? As a whole, and in the trait's subspace",
        caption=(
            f"Debiased linear CKA of student and teacher at last steps, no unit, at {_judged_point(data)} on "
            f"{data.group.values[0]} ({rows} rows). Each dot is one of {count_members(run)}. The null is its control's CKA "
            "with the same teacher; the third colour is the start's, before anything is learnt. The trait subspace is the span "
            f"of all teachers' v_T{_span_words(run)}; it is not drawn across bases that no rotation maps."
        ),
        variables=tuple(_CKA_BY_WHO),
        spec=chart_spec(dots.facet(facet=alt.Facet("part:N", sort=parts, title=None), columns=2)),
        select={"condition": _told(run, data, CKA), "point": [_judged_point(data)], "group": [data.group.values[0]]},
        headline=True,
    )


def _span_words(run: Run) -> str:
    count = len(run.traits)
    return ", one direction: CKA is a squared correlation there" if count == 1 else f", {count} directions at most"


def _probe_figure(run: Run, data: xr.Dataset) -> Figure:
    parts = ("a frozen probe of the teacher", "what its own head reads")
    dots = _parted_dots(_SHARES, "share", "share of the way from reference (0) to teacher (1)", READOUT, parts, run)
    facets = dots.facet(facet=alt.Facet("part:N", sort=parts, title=None), columns=2).resolve_scale(x="independent")
    return Figure(
        name="frozen_probe_shares",
        title="Is the teacher's feature in the student, and where its head reads?",
        caption=(
            f"How much of the way from reference to teacher students go at {_judged_point(data)} on {data.group.values[0]}, as "
            "a linear probe sees it that was fitted on teacher and reference and frozen, and along what the model's own head "
            f"reads the trait from. Each dot is one of {count_members(run)}; the null is the control. Probes are fitted on "
            "half of the prompts and tried on the other half."
        ),
        variables=tuple(_SHARES),
        spec=chart_spec(facets),
        select={"condition": _told(run, data, PROBE, READOUT), "point": [_judged_point(data)]},
    )


def _place_figure(run: Run, data: xr.Dataset) -> Figure:
    points, null = [str(point) for point in data.point.values], f"{CKA}_of_control"
    shown = (data[CKA] - data[null]).mean(["member", "taught"])
    chart = (
        alt.Chart(DATA)
        .transform_filter(f"isValid(datum.{CKA}) && isValid(datum.{null})")
        .transform_calculate(difference=f"datum.{CKA} - datum.{null}")
        .mark_rect()
        .encode(
            x=alt.X("group:N", sort=data.group.values.tolist(), title=None, axis=alt.Axis(labelAngle=-35)),
            y=alt.Y("point:N", sort=points, title=None),
            color=alt.Color(
                "mean(difference):Q",
                title="CKA − its null",
                scale=diverging_scale(shown.values),
                legend=alt.Legend(orient="top", gradientLength=180, gradientThickness=10),
            ),
            tooltip=["point:N", "group:N", alt.Tooltip("mean(difference):Q", format=".3f", title="CKA − its null")],
        )
        .properties(width=alt.Step(30), height=alt.Step(18))
    )
    rows = {str(group): int(data.num_rows.sel(group=group).max()) for group in data.group.values}
    return Figure(
        name="cka_by_place",
        title="Where and on what the student grew more like its teacher than its control did",
        caption=(
            f"Debiased linear CKA with the teacher less its null, the control's; no unit, mean over {count_members(run)}, at "
            f"last steps. Rows: {', '.join(f'{group} {count}' for group, count in rows.items())}; tokens of one prompt are not "
            "independent, so that their bias is not wholly gone."
        ),
        variables=(CKA, null),
        spec=chart_spec(chart.facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)),
        select={"condition": _told(run, data, CKA)},
    )


def _sentences(run: Run, data: xr.Dataset, judgements: Judgements) -> Iterator[str]:
    """What was found of each condition, or why nothing was."""
    traits = f"{len(run.traits)} traits" if len(run.traits) > 1 else "the one trait, so that CKA there is a squared correlation"
    yield (
        f"Verdicts are given at {_judged_point(data)} on {data.group.values[0]}, each quantity against its control's; Holm "
        f"runs over the conditions (of single traits over conditions and traits). The trait subspace is that of {traits}."
    )
    for condition in run.conditions:
        yield _summarise(run, data, judgements, condition)


def _summarise(run: Run, data: xr.Dataset, judgements: Judgements, condition: str) -> str:
    case, point = pool_traits(run, condition), _judged_point(data)

    def tell(name: str, what: str, of_start: bool = False) -> str:
        found, null, start = (
            student_interval(_values(run, data, one, case, point), run.recipe.verdict.confidence) if one in data else None
            for one in (name, f"{name}_of_control", f"{name}_of_start")
        )
        assert found is not None and null is not None
        if found.n == 0:
            return f"{what}: none ({_why(run, data, name, case, point)})"
        judged = judgements.get((name, case))
        before = f", {start} before training" if start is not None else ""
        verdict = f" (difference {judged.interval}, n = {judged.interval.n}: {judged.verdict})" if judged is not None else ""
        return f"{what} {found}, its control {null}{before}{verdict}"

    told = [
        tell(CKA, "CKA with its teacher"),
        tell(INSIDE, "in the trait subspace"),
        tell(PROBE, "of the teacher's way a frozen probe sees"),
        tell(READOUT, "its own head reads"),
        tell(REFITTED, "a refitted probe tells it from its start by d′"),
    ]
    return f"{condition}: {'; '.join(told)}. {_conclude(judgements, case)}".strip()


def _why(run: Run, data: xr.Dataset, name: str, case: CaseName, point: str) -> str:
    found = data[f"{name}_status"].sel(condition=case[0], taught=list_traits(run, case), point=point)
    return say_statuses((found.isel(group=0) if "group" in found.dims else found).values.flat, STATUS)


def _conclude(judgements: Judgements, case: CaseName) -> str:
    """Whether the teacher's feature is there and its head reads it: in the words of both verdicts, and no more."""
    probe, readout = (judgements.get((name, case)) for name in (PROBE, READOUT))
    if readout is None:
        return ""
    above, absent = AGAINST_NULL.above, AGAINST_NULL.equivalent
    is_read = readout.verdict == above
    head = {
        above: "Its own head reads more of the teacher's change than its control's",
        absent: "Its own head reads no more of the teacher's change than its control's",
    }
    read = head.get(readout.verdict, "That its own head reads of the teacher's change is not shown")
    if probe is None:
        return f"{read}; whether the teacher's feature is there cannot be told across bases."
    if probe.verdict == above:
        frame = "the feature is in the frame that the head reads" if is_read else "the teacher's feature is there all the same"
        return f"{read}{', and ' if is_read else '; '}{frame}."
    if probe.verdict == absent:
        other = ", by another feature than the teacher's or one that was rotated" if is_read else ""
        return f"{read}{other}; along the teacher's it went no further than its control."
    return f"{read}; that the teacher's feature is there is not shown."


def _warnings(run: Run, data: xr.Dataset) -> Iterator[str]:
    """Where a high CKA would be taken for transfer, and there is none."""
    point, confidence = _judged_point(data), run.recipe.verdict.confidence
    high = {}
    for case in list_cases(run):
        found = student_interval(_values(run, data, CKA, case, point), confidence)
        if found.estimate >= _HIGH and run.control(case[0]) is not None:
            high[case] = found
    if not high:
        return
    effects = score_effects(run)
    verdicts = judge_effects(effects, run.rules(run.recipe.verdict.margin), TRANSFER)
    for condition in run.conditions:
        absent = [case for case in high if case[0] == condition and verdicts[case].verdict == TRANSFER.equivalent]
        if absent:
            least, before = (
                np.mean([student_interval(_values(run, data, name, case, point), confidence).estimate for case in absent])
                for name in (CKA, f"{CKA}_of_start")
            )
            of = (
                ""
                if len(run.traits) == 1
                else f" of {len(absent)} of {len(run.traits)} traits ({', '.join(c[1] for c in absent)})"
            )
            yield (
                f"Warning: {condition}: CKA with the teacher is high, {least:.2f} on average (before training {before:.2f}), "
                f"while the trait is not passed on{of} ({TRANSFER.equivalent} by the recipe's rules): a high CKA does not show "
                "that a trait passed (Okatan et al., arXiv:2511.01023)."
            )

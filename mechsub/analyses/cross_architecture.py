"""The null results: does the trait pass to other architectures and from other starts, and how alike do these models become?"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.similarity import HalvedMoments
from mechsub.analyses.registry import analysis
from mechsub.architecture_matrix import (
    JudgedCell,
    draw_matrix,
    judge_cells,
    label_cells,
    matrix_findings,
    read_cells,
    say_matrix,
)
from mechsub.figures import Figure, chart_spec, color_by_who, fold_variables
from mechsub.findings import ALL_TRAITS, Finding, interval_fields
from mechsub.lineages import Lineage
from mechsub.mean_activations import NEUTRAL, TRAIT
from mechsub.open_models import OpenModel
from mechsub.paired_activations import PairReader, add_rows, pair_groups
from mechsub.representations import Unknown, Value, ValueTable, compare_rows
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import format_number, student_interval

SOURCE = "similar and yet no transfer: Okatan et al., arXiv:2511.01023; matrix: Brockers, arXiv:2605.23645"
_DEPTHS = {"first": 0.0, "middle": 0.5, "last": 1.0}
"""Share of the way through a model's hook points of the residual stream, or hidden layers, at which it is compared."""
_KINDS = (TRAIT, NEUTRAL)
_NO_CONTROL = ("ok", "no_control_or_not_measured")
_CKA, _DISTANCE, _KL, _START_KL = "cka", "procrustes_distance", "output_kl", "start_kl"
_FORMULAS = {
    _CKA: "debiased linear CKA with the teacher, at the same relative depth",
    _DISTANCE: "‖X R − Y‖² / ‖Y‖², R a rotation fitted on other prompts, Y the teacher, at the same relative depth",
    _KL: "KL(teacher ‖ model) of the answers that all architectures can give, mean over held-out probes",
    _START_KL: "KL(reference ‖ start) of the same answers: 0 where the student starts as its teacher did",
}
_UNITS = {_CKA: "no unit", _DISTANCE: "no unit", _KL: "nats", _START_KL: "nats"}


@analysis(needs=["traits", "starts", "hook_points"], reads_activations=True)
def cross_architecture(run: Run) -> Result:
    """Whether the trait passes to other architectures and from other starts: a verdict for every cell, with its evidence."""
    measured = _Measured(run)
    measured.measure_all()
    data = measured.label()
    cells = read_cells(data)
    rules = run.rules(run.recipe.verdict.margin)
    judged = judge_cells(cells, {"": data.teacher_gain.values}, rules)
    unit = str(data.effect_on.attrs["units"])
    members = f"n = {run.recipe.members}"
    findings = matrix_findings(cells, judged, lambda cell: _common(run, cell.condition, unit))
    findings += [finding for condition in measured.conditions for finding in _descriptions(run, data, condition)]
    return Result(
        data.merge(label_cells(cells, judged, unit)),
        findings,
        [
            draw_matrix(cells, judged, unit, members, rules.margin),
            _output_figure(run, data),
            _similarity_figure(run, data),
        ],
        [*say_matrix(cells, judged), *_say_evidence(data, judged)],
    )


@dataclass(frozen=True)
class _Measured:
    """Goes through last checkpoints, a teacher at a time, and keeps what is measured of the models beside it."""

    run: Run
    tables: dict[str, ValueTable] = field(default_factory=dict)
    """By quantity, students' and (``_of_control``) controls'."""
    answers: dict[tuple[str, int], Mapping[str, Tensor]] = field(default_factory=dict, repr=False)
    """Of lineages' last steps, by member; of one member at a time."""
    scores: dict[tuple[str, int], Float[np.ndarray, " trait"]] = field(default_factory=dict, repr=False)
    """Of lineages' last steps, by member."""

    @cached_property
    def conditions(self) -> list[str]:
        """Those that are cells of the matrix."""
        return [name for name in self.run.conditions if self.run.recipe.conditions[name].shared_start() is not None]

    @cached_property
    def reader(self) -> PairReader:
        """Opens models."""
        return PairReader(self.run, stream_only=True)

    @cached_property
    def probes(self) -> list[str]:
        """What kinds of probes are answered."""
        reference = self.run.reference
        model = self.run.family.load_model(reference, reference.last, 0)
        return list(self.run.family.probe_answers(model, reference, 0))

    def measure_all(self) -> None:
        """Everything, member by member."""
        run = self.run
        shape = (len(self.conditions), len(run.traits), run.recipe.members)
        sizes = {_CKA: (len(_DEPTHS), len(_KINDS)), _DISTANCE: (len(_DEPTHS), len(_KINDS)), _KL: (len(self.probes),)}
        self.tables.update(
            {f"{name}{suffix}": ValueTable((*shape, *more)) for name, more in sizes.items() for suffix in ("", "_of_control")}
        )
        self.tables[_START_KL] = ValueTable((len(self.conditions), run.recipe.members, len(self.probes)))
        for member in range(run.recipe.members):
            with self._open(run.reference, member) as reference:
                self._see(reference, member)
            for place, trait in enumerate(run.traits):
                teacher = run.teacher(trait)
                with self._open(teacher, member) as opened:
                    self._see(opened, member)
                    self._compare_with(opened, trait, place, member)
            self._compare_starts(member)
            self.answers.clear()
            run.report_progress(run.num_checkpoints * (member + 1) // run.recipe.members)

    def _open(self, lineage: Lineage, member: int) -> AbstractContextManager[OpenModel]:
        return self.reader.open(lineage, lineage.last, member)

    def _see(self, opened: OpenModel, member: int) -> None:
        """A model's scores and answers, once."""
        key = (opened.lineage.name, member)
        if key not in self.scores or key not in self.answers:
            family = self.run.family
            found = family.trait_score(opened.model, opened.lineage, member, verdict_only=True)
            self.scores[key] = next(iter(found.values()))[:, 0]
            self.answers[key] = family.probe_answers(opened.model, opened.lineage, member)

    def _compare_with(self, teacher: OpenModel, trait: str, place: int, member: int) -> None:
        run = self.run
        for row, condition in enumerate(self.conditions):
            for suffix, lineage in (("", run.student(condition, trait)), ("_of_control", run.control(condition))):
                cell = (row, place, member)
                if lineage is None:
                    for name in (_CKA, _DISTANCE, _KL):
                        self.tables[f"{name}{suffix}"].status[cell] = Unknown.NO_CONTROL
                    continue
                with self._open(lineage, member) as opened:
                    self._see(opened, member)
                    self._compare_rows(opened, teacher, cell, suffix)
                both = (self.answers[name, member] for name in (teacher.lineage.name, lineage.name))
                _put_divergences(self.tables[f"{_KL}{suffix}"], cell, self.probes, *both)

    def _compare_rows(self, left: OpenModel, teacher: OpenModel, cell: tuple[int, ...], suffix: str) -> None:
        """CKA and Procrustes distance; of each kind of prompts at the first position policy by which the rows pair."""
        sums: dict[tuple[str, str], HalvedMoments] = {}
        policies: dict[str, str] = {}
        sides = [replace(one, points=_by_depth(one.points)) for one in (left, teacher)]
        for group, rows in pair_groups(sides[0], sides[1], _KINDS):
            kind = group.partition(":")[0]
            if policies.setdefault(kind, rows.policy) == rows.policy:
                add_rows(sums, (rows.point, kind), rows)
        for (column, depth), (place, kind) in product(enumerate(_DEPTHS), enumerate(_KINDS)):
            found: tuple[Value, Value] = (Unknown.ROWS_OF_OTHER_POSITIONS, Unknown.ROWS_OF_OTHER_POSITIONS)
            if (depth, kind) in sums:
                found = compare_rows(sums[depth, kind])
            for name, value in zip((_CKA, _DISTANCE), found, strict=True):
                self.tables[f"{name}{suffix}"].put((*cell, column, place), value)

    def _compare_starts(self, member: int) -> None:
        """How alike the starts of students and the references of their teachers answer."""
        family, reference = self.run.family, self.answers[self.run.reference.name, member]
        for row, condition in enumerate(self.conditions):
            student = self.run.student(condition, self.run.traits[0])
            with self.reader.open_start(student, member) as opened:
                begun = family.probe_answers(opened.model, student.origin, member)
            _put_divergences(self.tables[_START_KL], (row, member), self.probes, reference, begun)

    def label(self) -> xr.Dataset:
        """Effects, teachers' gains, and how alike the models are, with why a value is NaN."""
        run, unit = self.run, next(iter(self.run.family.measures.values())).unit
        effects = np.array([[self._effects(condition, trait) for trait in run.traits] for condition in self.conditions])
        gains = np.array([self._scores(run.teacher(trait), trait) - self._scores(run.reference, trait) for trait in run.traits])
        dims, missing = ("condition", "taught", "trait", "member"), np.isnan(effects)
        description = "student − control on every trait, at the last step"
        variables: dict[str, Any] = {
            "effect_on": label_variable(effects, dims, description=description, unit=unit, source=SOURCE),
            "effect_on_status": status_variable(missing, dims, _NO_CONTROL, "effect_on"),
            "teacher_gain": label_variable(
                gains, ("taught", "member"), description="teacher − reference on the teacher's trait", unit=unit
            ),
            "teacher_gain_status": status_variable(np.isnan(gains), ("taught", "member"), _NO_CONTROL, "teacher_gain"),
        }
        by_case = ("condition", "taught", "member")
        more = {_CKA: ("depth", "prompts"), _DISTANCE: ("depth", "prompts"), _KL: ("probe",)}
        for name, suffix in product(more, ("", "_of_control")):
            formula = f"of the control: {_FORMULAS[name]}" if suffix else _FORMULAS[name]
            table = self.tables[f"{name}{suffix}"]
            variables |= table.label(f"{name}{suffix}", (*by_case, *more[name]), formula, _UNITS[name], SOURCE)
        variables |= self.tables[_START_KL].label(
            _START_KL, ("condition", "member", "probe"), _FORMULAS[_START_KL], _UNITS[_START_KL], SOURCE
        )
        coords = {
            "condition": self.conditions,
            "taught": run.traits,
            "trait": run.traits,
            "member": np.arange(run.recipe.members),
            "depth": list(_DEPTHS),
            "prompts": list(_KINDS),
            "probe": self.probes,
        }
        return xr.Dataset({**variables, **self._describe_conditions()}, coords)

    def _describe_conditions(self) -> dict[str, Any]:
        run, recipe = self.run, self.run.recipe
        words = {
            "student_architecture": [recipe.architecture(name) for name in self.conditions],
            "shared_start": [recipe.conditions[name].shared_start() for name in self.conditions],
            "why_incomparable": [run.why_incomparable(name) for name in self.conditions],
        }
        described: dict[str, Any] = {name: ("condition", np.array(texts, dtype=object)) for name, texts in words.items()}
        described["has_control"] = ("condition", [int(run.control(name) is not None) for name in self.conditions])
        described["teacher_architecture"] = ((), recipe.architecture())
        return described

    def _effects(self, condition: str, trait: str) -> Float[np.ndarray, "trait member"]:
        """Of one student, on all of the run's traits."""
        run = self.run
        student, control = run.student(condition, trait), run.control(condition)
        if control is None:
            return np.full((len(run.traits), run.recipe.members), np.nan)
        return np.array([self._scores(student, scored) - self._scores(control, scored) for scored in run.traits])

    def _scores(self, lineage: Lineage, trait: str) -> Float[np.ndarray, " member"]:
        place = list(self.run.family.traits).index(trait)
        return np.array([self.scores[lineage.name, member][place] for member in range(self.run.recipe.members)])


def _by_depth(points: Sequence[HookPoint]) -> list[HookPoint]:
    """The hook points at some relative depths, called by them, so that models of other depths have the same ones."""
    return [replace(points[round(share * (len(points) - 1))], name=depth) for depth, share in _DEPTHS.items()]


def _put_divergences(
    table: ValueTable,
    cell: tuple[int, ...],
    probes: Sequence[str],
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
) -> None:
    """Σ p (log p − log q) of every kind of probe, mean over its probes."""
    for column, probe in enumerate(probes):
        wanted, given = expected[probe].cpu(), found[probe].cpu()
        divergence = float((wanted.exp() * (wanted - given)).sum(-1).mean())
        table.put((*cell, column), divergence if np.isfinite(divergence) else Unknown.NOT_FINITE)


def _common(run: Run, condition: str, unit: str) -> dict[str, Any]:
    """The fields of a condition's findings that are the same for all quantities."""
    student = run.student(condition, run.traits[0])
    return {
        "trait": ALL_TRAITS if len(run.traits) > 1 else run.traits[0],
        "context": next(iter(run.family.contexts.values())),
        "step": student.last,
        "scope": "model output",
        "unit": unit,
        "num_references": run.recipe.num_references(condition),
        "margin": run.recipe.verdict.margin,
    }


def _descriptions(run: Run, data: xr.Dataset, condition: str) -> list[Finding]:
    """How alike a condition's students and their teachers are, beside their controls: without verdicts."""
    places = {_KL: {"probe": data.probe.values[0]}} if len(data.probe) else {}
    places |= {name: {"depth": "last", "prompts": TRAIT} for name in (_CKA, _DISTANCE)}
    confidence = run.recipe.verdict.confidence
    findings = []
    for name, place in places.items():
        own, control = (
            student_interval(
                data[f"{name}{suffix}"].sel(condition=condition, **place).mean("taught", skipna=False).values, confidence
            )
            for suffix in ("", "_of_control")
        )
        words = ", ".join(str(value) for value in place.values())
        findings.append(
            Finding(
                **{
                    **_common(run, condition, _UNITS[name]),
                    "analysis": "cross_architecture",
                    "condition": condition,
                    "quantity": name,
                    "scope": f"model output: {words}" if name == _KL else f"hook point at depth {words} prompts",
                    "null": "its control, the same student of a neutral teacher",
                    "null_low": control.low,
                    "null_high": control.high,
                    "verdict": "",
                    "reason": "a description: models that are alike need not share a trait; the effect has the verdict",
                    "rule": "",
                    "margin": np.nan,
                    "formula": _FORMULAS[name],
                    "source": SOURCE,
                    **interval_fields(own),
                }
            )
        )
    return findings


def _say_evidence(data: xr.Dataset, judged: Mapping[str, JudgedCell]) -> list[str]:
    """What is incomparable and why, and how alike models are whose verdicts differ."""
    reasons: dict[str, list[str]] = {}
    for condition in map(str, data.condition.values):
        why = str(data.why_incomparable.sel(condition=condition).values)
        if why:
            reasons.setdefault(why, []).append(condition)
    sentences = [
        f"As a whole the parameters of {', '.join(names)} cannot be held against the teachers': {why}."
        for why, names in reasons.items()
    ]
    for condition in map(str, data.condition.values):
        begun = data.start_kl.sel(condition=condition).mean("member").values
        if str(data.shared_start.sel(condition=condition).values) == "the outputs" and np.isfinite(begun).all():
            probes = ", ".join(
                f"{format_number(value)} ({probe})" for value, probe in zip(begun, data.probe.values, strict=True)
            )
            sentences.append(f"How well the outputs of {condition} were matched, KL(reference ‖ start) in nats: {probes}.")
    alike = data.cka.sel(depth="last", prompts=TRAIT).mean(["taught", "member"])
    by_verdict: dict[str, list[str]] = {}
    for condition in map(str, data.condition.values):
        value = float(alike.sel(condition=condition))
        if np.isfinite(value):
            by_verdict.setdefault(judged[condition].effect.verdict, []).append(f"{condition} {format_number(value)}")
    listed = "; ".join(f"{verdict}: {', '.join(values)}" for verdict, values in by_verdict.items())
    if listed:
        sentences.append(f"CKA with the teacher at the last hook point, by verdict on the effect: {listed}.")
    return sentences


def _draw_beside_controls(data: xr.Dataset, quantity: str, x: alt.X, panel: alt.Facet) -> alt.TopLevelMixin:
    """Students over their controls, condition by condition: a dot a member and trait, a bar for the mean."""
    names = {quantity: "student", f"{quantity}_of_control": "control"}
    encoded = fold_variables("value", names).encode(
        x=x,
        y=alt.Y("condition:N", sort=list(map(str, data.condition.values)), title=None),
        yOffset=alt.YOffset("who:N", sort=list(names.values())),
        color=color_by_who(names),
    )
    dots = encoded.mark_circle(size=22, opacity=0.4).encode(tooltip=["condition:N", "taught:N", "member:O", "who:N", "value:Q"])
    means = encoded.mark_tick(thickness=3, size=11).encode(x=alt.X("mean(value):Q"))
    chart: alt.TopLevelMixin = alt.layer(dots, means).properties(width=250, height=alt.Step(12)).facet(facet=panel, columns=3)
    return chart


def _output_figure(run: Run, data: xr.Dataset) -> Figure:
    x = alt.X("value:Q", title="KL(teacher ‖ model), nats", scale=alt.Scale(type="symlog", constant=0.01))
    chart = _draw_beside_controls(data, _KL, x, alt.Facet("probe:N", title=None))
    return Figure(
        name="outputs",
        title="How far a student's answers are from its teacher's, beside its control's",
        caption=(
            f"{_FORMULAS[_KL]}, in nats; each dot is one member{' and trait' if len(run.traits) > 1 else ''} "
            f"(n = {run.recipe.members} members), the bar their mean. The control is the null. Symmetric-logarithmic axis."
        ),
        variables=(_KL, f"{_KL}_of_control"),
        spec=chart_spec(chart),
    )


def _similarity_figure(run: Run, data: xr.Dataset) -> Figure:
    x = alt.X("value:Q", title="debiased CKA with the teacher", scale=alt.Scale(zero=False))
    chart = _draw_beside_controls(data, _CKA, x, alt.Facet("depth:N", sort=list(_DEPTHS), title=None))
    return Figure(
        name="similarity",
        title="Likeness is not transfer: CKA with the teacher, student beside control",
        caption=(
            f"{_FORMULAS[_CKA]} (first, middle and last hook point), on prompts of the trait, no unit; each dot is one member"
            f"{' and trait' if len(run.traits) > 1 else ''} (n = {run.recipe.members} members), the bar their mean. The "
            "control is the null: where the two coincide, likeness says nothing of the trait."
        ),
        variables=(_CKA, f"{_CKA}_of_control"),
        spec=chart_spec(chart),
        select={"prompts": [TRAIT]},
    )

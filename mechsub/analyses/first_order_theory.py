"""First-order theory: does imitation go where one small step from the common start would go, and for how long?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from mechsub.analyses.registry import analysis
from mechsub.cases import CaseName, list_cases, scope_coordinates
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, fold_variables
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.gradients.first_order import (
    ImitatedLogits,
    Vector,
    gauss_newton_product,
    imitation_step,
    linearisation_errors,
)
from mechsub.lineages import Lineage
from mechsub.parameters.alignment import MODEL, STATUS, Combination, DirectionAlgebra, Missing, Scopes
from mechsub.parameters.blocks import Block, list_blocks
from mechsub.parameters.directions import displacement, load_tensors
from mechsub.parameters.gram import Gram
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects

SOURCE = "Cloud et al., arXiv:2507.14805, Theorem 1"
TOLERANCE = 1e-4
"""Of the self-test: the error at its smallest scale."""
_SCALES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
_MOST_EXAMPLES, _TESTED_EXAMPLES = 256, 64
_MOST_PARAMETERS, _MOST_TESTED = 10**9, 10**8
_STATUS = (*STATUS, "starts_elsewhere", "not_its_teachers_outputs", "too_large")
_STARTS_ELSEWHERE, _OTHER_OUTPUTS, _TOO_LARGE = range(len(STATUS), len(_STATUS))
_WHY = {
    Missing.NOT_RUN: "nothing is trained",
    Missing.INCOMPARABLE: "students have other parameters than the teachers",
    _STARTS_ELSEWHERE: "students start at other weights than their teachers did, and the theory is of a common start",
    _OTHER_OUTPUTS: "what is learnt is not what the teacher gives at the student's own inputs, or is not known",
    _TOO_LARGE: f"models of over {_MOST_PARAMETERS:,} parameters are not held five times over",
}
_TEACHER, _NEUTRAL, _BY_TEACHER, _BY_NEUTRAL, _MEASURED = "Δ_T", "Δ_N", "G Δ_T", "G Δ_N", "−∇L"
_FIXED = (_TEACHER, _NEUTRAL, _BY_TEACHER, _BY_NEUTRAL, _MEASURED)
_CONTROL_NULL = "another teacher's student from the same start: the control's value"
_NEUTRAL_NULL = "the prediction from another teacher's displacement, G Δ_N, in its place"


@dataclass(frozen=True)
class _Quantity:
    """What is measured of a student."""

    name: str
    formula: str
    directions: tuple[str, str]
    """Labels; ``Δ_S`` and ``Δ_C`` stand for student and control at the step."""
    measure: str = "cosine"
    """``cosine`` of the two; ``norm`` of the first; ``gap``: ‖second − first‖ / ‖first‖."""

    @property
    def is_by_step(self) -> bool:
        """Whether there is one at every checkpoint of the student."""
        return bool({"Δ_S", "Δ_C"} & {*self.directions})

    @property
    def unit(self) -> str:
        """Of its values."""
        return {"cosine": "cosine", "norm": "weight / learning rate", "gap": "share of the predicted norm"}[self.measure]


_QUANTITIES = (
    _Quantity("predicted_cosine", "cos(G Δ_T, Δ_T)", (_BY_TEACHER, _TEACHER)),
    _Quantity("predicted_cosine_of_neutral", "cos(G Δ_N, Δ_T)", (_BY_NEUTRAL, _TEACHER)),
    _Quantity("predicted_norm", "‖G Δ_T‖", (_BY_TEACHER, _TEACHER), "norm"),
    _Quantity("measured_norm", "‖∇L‖ at θ₀", (_MEASURED, _TEACHER), "norm"),
    _Quantity("linearisation_cosine", "cos(−∇L, G Δ_T) at θ₀", (_BY_TEACHER, _MEASURED)),
    _Quantity("linearisation_cosine_of_neutral", "cos(−∇L, G Δ_N) at θ₀", (_BY_NEUTRAL, _MEASURED)),
    _Quantity("linearisation_error", "‖−∇L − G Δ_T‖ / ‖G Δ_T‖ at θ₀", (_BY_TEACHER, _MEASURED), "gap"),
    _Quantity("prediction_of_student", "cos(Δ_S(t), G Δ_T)", ("Δ_S", _BY_TEACHER)),
    _Quantity("prediction_of_control", "cos(Δ_C(t), G Δ_T)", ("Δ_C", _BY_TEACHER)),
    _Quantity("prediction_from_neutral", "cos(Δ_S(t), G Δ_N)", ("Δ_S", _BY_NEUTRAL)),
)
_CLAIMS = (
    ("predicted_cosine", "predicted_cosine_of_neutral", _NEUTRAL_NULL, "≥ 0 by theory over all parameters: not a claim"),
    (
        "linearisation_cosine",
        "linearisation_cosine_of_neutral",
        _NEUTRAL_NULL,
        "it checks the theory at the teacher's own size",
    ),
    ("linearisation_error", "", "none: it is 0 where the teacher's step is small", "it checks the theory, not the student"),
    ("prediction_of_student", "prediction_of_control", _CONTROL_NULL, ""),
)
"""What findings are given of: (quantity, its null, the null in words, why it has no verdict)."""


@analysis
def first_order_theory(run: Run) -> Result:
    """How far the first-order theory of imitation foretells where students go, step by step, against another teacher."""
    blocks = list_blocks(run.reference.spec.tensors)
    scopes = Scopes.of(blocks)
    steps = sorted({step for case in list_cases(run) for step in run.student(*case).steps})
    examples = {case: _describe_examples(run, case) for case in list_cases(run)}
    reasons = {case: found if isinstance(found, int) else int(Missing.OK) for case, found in examples.items()}
    data = _measure(run, blocks, scopes, steps, reasons)
    eligible = [case for case, reason in reasons.items() if reason == Missing.OK]
    data = data.merge(_test_itself(run, eligible[0] if eligible else None))
    judgements = {step: _judge(run, data, eligible, step) for step in ("first", "last")}
    findings = [
        _finding(run, data, case, claim, when, judgements[when].get(case))
        for case, claim, when in product(eligible, _CLAIMS, ("first", "last"))
        if when == "first" or claim[0] == "prediction_of_student"
    ]
    findings += [_self_test_finding(run, data, eligible[0])] if eligible else []
    figures = [_step_figure(run, eligible), _self_test_figure(run.recipe.members)] if eligible else []
    described = [found for found in examples.values() if isinstance(found, str)]
    return Result(data, findings, figures, _sentences(run, data, reasons, list(dict.fromkeys(described))))


def _describe_examples(run: Run, case: CaseName) -> str | int:
    """On what predictions of a case are made; where the theory does not speak of it, why not, as a code of its status."""
    student = run.student(*case)
    if not run.is_comparable(case[0]):
        return int(Missing.INCOMPARABLE)
    if student.last == 0:
        return int(Missing.NOT_RUN)
    if run.starts_elsewhere(student):
        return _STARTS_ELSEWHERE
    if sum(block.num_parameters for block in list_blocks(student.spec.tensors)) > _MOST_PARAMETERS:
        return _TOO_LARGE
    logits = run.family.imitated_logits(student, 0, _MOST_EXAMPLES)
    return _OTHER_OUTPUTS if logits is None else logits.description


def _measure(
    run: Run, blocks: Sequence[Block], scopes: Scopes, steps: Sequence[int], reasons: Mapping[CaseName, int]
) -> xr.Dataset:
    """Every quantity as [condition, taught, member, scope], and step where it has one, with why a value is NaN."""
    shape = (len(run.conditions), len(run.traits), run.recipe.members)
    values, status = {}, {}
    for quantity in _QUANTITIES:
        full = (*shape, len(steps), len(scopes.names)) if quantity.is_by_step else (*shape, len(scopes.names))
        values[quantity.name] = np.full(full, np.nan)
        status[quantity.name] = np.full(full, Missing.NOT_RUN, dtype=np.int8)
    for number, (case, reason) in enumerate(reasons.items()):
        place = (run.conditions.index(case[0]), run.traits.index(case[1]))
        algebra = DirectionAlgebra(_contract(run, case, blocks), scopes) if reason == Missing.OK else None
        for quantity in _QUANTITIES:
            cells = status[quantity.name][place]
            if algebra is None:
                cells[...] = reason
                continue
            for column, step in enumerate(steps) if quantity.is_by_step else [(None, 0)]:
                directions = [_at_step(run, case, label, step) for label in quantity.directions]
                if all(direction is not None for direction in directions):
                    at = (slice(None),) if column is None else (slice(None), column)
                    known = [direction for direction in directions if direction is not None]
                    found = _compute(quantity, algebra, known)
                    values[quantity.name][place][at] = found
                    cells[at] = algebra.explain(found, *known)
        run.report_progress(run.num_checkpoints * (number + 1) // len(reasons))
    return _label(run, values, status, steps, scopes)


def _at_step(run: Run, case: CaseName, label: str, step: int) -> Combination | None:
    """A direction at a student's step; an empty sum where nothing has moved; None where the run has no such."""
    student, control = run.student(*case), run.control(case[0])
    if label in {_NEUTRAL, _BY_NEUTRAL} and run.neutral is None:
        return None
    if label not in {"Δ_S", "Δ_C"}:
        return {label: 1.0}
    if step not in student.steps:
        return None
    lineage: Lineage | None = student if label == "Δ_S" else control
    own = None if lineage is None else step if lineage is student else run.paired_step(lineage, student, step)
    if lineage is None or own is None:
        return None
    return {f"{lineage.name} @ {own}": 1.0} if own > 0 else {}


def _compute(
    quantity: _Quantity, algebra: DirectionAlgebra, directions: Sequence[Combination]
) -> Float[np.ndarray, "member scope"]:
    first, second = directions
    if quantity.measure == "cosine":
        return algebra.cosine(first, second)
    support = algebra.support(first, second)
    size = algebra.norm(first, support)
    if quantity.measure == "norm":
        return size
    gap = algebra.norm({**second, **{label: -sign for label, sign in first.items()}}, support)
    share: Float[np.ndarray, "member scope"] = np.divide(gap, size, out=np.full_like(gap, np.nan), where=size > 0)
    return share


def _contract(run: Run, case: CaseName, blocks: Sequence[Block]) -> Gram:
    """The inner products of predictions, displacements and gradient with each other, and of every checkpoint with these."""
    student, control = run.student(*case), run.control(case[0])
    lineages = [student, *([control] if control is not None else [])]
    moved = [(lineage, step) for lineage in lineages for step in lineage.steps if step > 0]
    labels = (*_FIXED, *(f"{lineage.name} @ {step}" for lineage, step in moved))
    within = np.full((run.recipe.members, len(blocks), len(labels), len(labels)), np.nan)
    for member in range(run.recipe.members):
        fixed = _predict(run, case, member)
        for place, (lineage, step) in enumerate(moved, len(_FIXED)):
            change = _displacement(lineage, step, member)
            for number, block in enumerate(blocks):
                row = _flat(change, block)
                within[member, number, place, place] = float(row @ row)
                products = (torch.stack([_flat(vector, block) for vector in fixed]) @ row).cpu().numpy()
                within[member, number, place, : len(_FIXED)] = within[member, number, : len(_FIXED), place] = products
        for number, block in enumerate(blocks):
            rows = torch.stack([_flat(vector, block) for vector in fixed])
            within[member, number, : len(_FIXED), : len(_FIXED)] = (rows @ rows.T).cpu().numpy()
    members, size = run.recipe.members, len(labels)
    across, rounding = np.zeros((members, len(blocks), size, 0, members)), np.zeros((members, len(blocks), size))
    return Gram(labels, tuple(block.name for block in blocks), within, across, (), rounding)


def _predict(run: Run, case: CaseName, member: int) -> list[Mapping[str, Tensor]]:
    """The directions of `_FIXED` of one member; 0 for a neutral teacher that is not there."""
    student, teacher = run.student(*case), run.teacher(case[1])
    logits = _imitated(run, student, member, _MOST_EXAMPLES)
    model = _load(run, student, 0, member)
    taught = _displacement(teacher, teacher.last, member)
    nothing: Vector = {name: torch.zeros_like(tensor) for name, tensor in taught.items()}
    neutral = nothing if run.neutral is None else _displacement(run.neutral, run.neutral.last, member)
    by_teacher, by_neutral = (gauss_newton_product(model, logits, moved) for moved in (taught, neutral))
    measured = imitation_step(model, _load(run, teacher, teacher.last, member), logits)
    return [taught, neutral, by_teacher, by_neutral, measured]


def _imitated(run: Run, student: Lineage, member: int, most: int) -> ImitatedLogits:
    logits = run.family.imitated_logits(student, member, most)
    assert logits is not None  # the case would have had a reason
    return logits


def _load(run: Run, lineage: Lineage, step: int, member: int) -> nn.Module:
    """One member with what adapters add inside its weights."""
    return run.family.load_model(lineage, step, member, merged=True)


def _displacement(lineage: Lineage, step: int, member: int) -> Vector:
    names = dict.fromkeys(block.tensor for block in list_blocks(lineage.spec.tensors))
    found = load_tensors(displacement(lineage, step), names, member)
    return {name: tensor.double() for name, tensor in found.items()}


def _flat(vector: Mapping[str, Tensor], block: Block) -> Float[Tensor, " number"]:
    return vector[block.tensor][block.index].flatten().double().cpu()


def _label(
    run: Run, values: Mapping[str, np.ndarray], status: Mapping[str, np.ndarray], steps: Sequence[int], scopes: Scopes
) -> xr.Dataset:
    variables: dict[str, Any] = {}
    for quantity in _QUANTITIES:
        name = quantity.name
        dims = ("condition", "taught", "member", *(("step",) if quantity.is_by_step else ()), "scope")
        variables[name] = label_variable(
            values[name],
            dims,
            description=name.replace("_", " "),
            unit=quantity.unit,
            formula=quantity.formula,
            source=SOURCE,
        )
        variables[f"{name}_status"] = status_variable(status[name], dims, _STATUS, name)
    coords = scope_coordinates(run, scopes) | {"step": list(steps)}
    return xr.Dataset(variables, coords)


def _test_itself(run: Run, case: CaseName | None) -> xr.Dataset:
    """The error of the prediction as the teacher's displacement is scaled down, of member 0 of one case, in float64."""
    errors = np.full(len(_SCALES), np.nan)
    reason = int(Missing.NOT_RUN if case is None else Missing.OK)
    if case is not None:
        student, teacher = run.student(*case), run.teacher(case[1])
        model = _load(run, student, 0, 0)
        if sum(parameter.numel() for parameter in model.parameters()) > _MOST_TESTED:
            reason = _TOO_LARGE
        else:
            moved, logits = _displacement(teacher, teacher.last, 0), _imitated(run, student, 0, _TESTED_EXAMPLES)
            errors = np.array(linearisation_errors(model, moved, logits, _SCALES))
            reason = int(Missing.OK if np.isfinite(errors).all() else Missing.ZERO_DISPLACEMENT)
    variables = {
        "self_test_error": label_variable(
            errors,
            ["teacher_scale"],
            description="relative error of the predicted imitation step, the teacher's displacement scaled by ε",
            unit="share of the predicted norm",
            formula="‖s(ε)/ε − G Δ_T‖ / ‖G Δ_T‖, s(ε) = −∇L at θ₀ of a teacher at θ₀ + ε Δ_T",
            source=SOURCE,
        ),
        "self_test_error_status": status_variable(
            np.where(np.isfinite(errors), Missing.OK, reason), ["teacher_scale"], _STATUS, "self_test_error"
        ),
    }
    return xr.Dataset(variables, {"teacher_scale": list(_SCALES)})


def _values(run: Run, data: xr.Dataset, name: str, case: CaseName, when: str) -> np.ndarray:
    """A variable over all parameters, member by member; at the student's ``first`` or ``last`` step where it has steps."""
    chosen = data[name].sel(condition=case[0], taught=case[1], scope=MODEL)
    found: np.ndarray = (chosen.sel(step=_step(run, case, when)) if "step" in chosen.dims else chosen).values
    return found


def _step(run: Run, case: CaseName, when: str) -> int:
    student = run.student(*case)
    return student.last if when == "last" else next(step for step in student.steps if step > 0)


def _judge(run: Run, data: xr.Dataset, cases: Sequence[CaseName], when: str) -> dict[CaseName, Judgement]:
    """Verdicts on the prediction of the student over that of its control; Holm runs over the conditions and traits."""
    effects = {
        case: _values(run, data, "prediction_of_student", case, when) - _values(run, data, "prediction_of_control", case, when)
        for case in cases
        if run.control(case[0]) is not None
    }
    return judge_effects(effects, run.rules(run.recipe.verdict.alignment_margin), AGAINST_NULL)


def _finding(
    run: Run, data: xr.Dataset, case: CaseName, claim: tuple[str, str, str, str], when: str, judged: Judgement | None
) -> Finding:
    name, null, null_words, reason = claim
    verdict = run.recipe.verdict
    quantity = next(quantity for quantity in _QUANTITIES if quantity.name == name)
    judgement = judged if quantity.is_by_step else None
    against = student_interval(_values(run, data, null, case, when) if null else np.array([]), verdict.confidence)
    if judgement is None and quantity.is_by_step:
        null_words, reason = "none: no control was given", "without its null a cosine says nothing; give --control"
    return Finding(
        analysis="first_order_theory",
        quantity={"first": "prediction_of_first_update", "last": "prediction_of_displacement"}[when]
        if quantity.is_by_step
        else name,
        condition=case[0],
        trait=case[1],
        context="parameters",
        step=_step(run, case, when) if quantity.is_by_step else 0,
        scope="all parameters",
        unit=quantity.unit,
        null=null_words,
        null_low=against.low,
        null_high=against.high,
        num_references=run.recipe.num_references(case[0]),
        **judgement_fields(judgement, verdict.alignment_margin, reason),
        formula=quantity.formula,
        source=SOURCE,
        **interval_fields(student_interval(_values(run, data, name, case, when), verdict.confidence)),
    )


def _self_test_finding(run: Run, data: xr.Dataset, case: CaseName) -> Finding:
    error = data.self_test_error.values[-1:]
    return Finding(
        analysis="first_order_theory",
        quantity="self_test_error",
        condition=case[0],
        trait=case[1],
        context="parameters",
        step=0,
        scope="all parameters, member 0, in float64",
        unit=str(data.self_test_error.attrs["units"]),
        null=f"none: the tolerance is {TOLERANCE:g} at ε = {_SCALES[-1]:g}",
        null_low=float("nan"),
        null_high=float("nan"),
        num_references=run.recipe.num_references(case[0]),
        verdict="",
        reason=_describe_self_test(data),
        rule="",
        margin=float("nan"),
        formula=str(data.self_test_error.attrs["formula"]),
        source=SOURCE,
        **interval_fields(student_interval(error, run.recipe.verdict.confidence)),
    )


def _describe_self_test(data: xr.Dataset) -> str:
    errors, scales = data.self_test_error.values, np.array(_SCALES)
    if not np.isfinite(errors).all():
        reasons = {_STATUS[int(code)].replace("_", " ") for code in data.self_test_error_status.values if code}
        return f"not tested: {', '.join(sorted(reasons))}"
    slope = np.polyfit(np.log(scales[-4:]), np.log(np.maximum(errors[-4:], np.finfo(float).tiny)), 1)[0]
    within = "within" if errors[-1] < TOLERANCE else "NOT within"
    return (
        f"relative error {errors[-1]:.1e} at ε = {scales[-1]:g}, {within} the tolerance {TOLERANCE:g}; over the four smallest "
        f"ε it goes as ε^{slope:.2f} (theory: 1, below the first kink of a ReLU)"
    )


_STUDENT_AND_NULL = {
    "prediction_of_student": "student",
    "prediction_of_control": "control (null)",
    "prediction_from_neutral": "student, predicted from the other teacher",
}


def _step_figure(run: Run, cases: Sequence[CaseName]) -> Figure:
    conditions = list(dict.fromkeys(condition for condition, _ in cases))
    chart, color = fold_variables("cosine", _STUDENT_AND_NULL), color_by_who(_STUDENT_AND_NULL)
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(grid=False))
    members = chart.mark_line(opacity=0.25, strokeWidth=1).encode(
        x=x, y=alt.Y("cosine:Q", title="cos(Δ(t), prediction)"), detail=["member:N", "taught:N"], color=color
    )
    mean = chart.mark_line(strokeWidth=2.5).encode(x=x, y="mean(cosine):Q", color=color)
    facets = (
        alt.layer(members, mean, data=DATA)
        .properties(width=200, height=150)
        .facet(facet=alt.Facet("condition:N", sort=conditions, title=None), columns=3)
    )
    many = f"the members (n = {run.recipe.members}" + (f" of {len(run.traits)} traits each)" if len(run.traits) > 1 else ")")
    return Figure(
        name="first_order_prediction",
        title="How far along training the first-order prediction stays useful",
        caption=(
            "cos(Δ_S(t), G Δ_T) over all parameters, no unit, of what the student has moved with the gradient step that theory "
            f"foretells from its teacher's displacement alone; thin lines are {many}, thick ones their mean. Null: its "
            f"control, a student of {run.neutral_name} from the same start, with the same prediction. Beside it the student "
            "with the prediction from the other teacher, G Δ_N. The theory is of plain gradient descent; the students' "
            "optimizer is the recipe's."
        ),
        variables=tuple(_STUDENT_AND_NULL),
        spec=chart_spec(facets),
        select={"scope": [MODEL], "condition": conditions},
        headline=True,
    )


def _self_test_figure(members: int) -> Figure:
    def log(name: str, title: str) -> dict[str, Any]:
        return {"shorthand": f"{name}:Q", "title": title, "scale": alt.Scale(type="log"), "axis": alt.Axis(format=".0e")}

    chart = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.self_test_error)")
        .mark_line(point=True)
        .encode(x=alt.X(**log("teacher_scale", "ε")), y=alt.Y(**log("self_test_error", "relative error")))
        .properties(width=300, height=180)
    )
    return Figure(
        name="first_order_self_test",
        title="Self-test: the prediction's error as the teacher's displacement shrinks",
        caption=(
            f"‖s(ε)/ε − G Δ_T‖ / ‖G Δ_T‖, no unit, over all parameters of one of the n = {members} members, in float64: s(ε) "
            f"is the measured imitation step of a teacher at θ₀ + ε Δ_T. Theory: a line of slope 1; the tolerance is "
            f"{TOLERANCE:g} at the smallest ε. At ε = 1 it is the error at the teacher's own size. There is no null: the error "
            "is 0 in theory."
        ),
        variables=("self_test_error",),
        spec=chart_spec(chart),
    )


def _sentences(run: Run, data: xr.Dataset, reasons: Mapping[CaseName, int], examples: Sequence[str]) -> list[str]:
    sentences = []
    for condition in run.conditions:
        cases = [case for case in reasons if case[0] == condition]
        eligible = [case for case in cases if reasons[case] == Missing.OK]
        why = dict.fromkeys(_WHY[reasons[case]] for case in cases if reasons[case] != Missing.OK)
        sentences += [f"{condition}: no prediction, {words}." for words in why]
        sentences += [_summarise(run, data, case) for case in eligible]
    if examples:
        sentences += [f"Self-test: {_describe_self_test(data)}.", f"Predictions of member 0 are made on {'; '.join(examples)}."]
    adapters = [name for name in run.conditions if run.student(name, run.traits[0]).spec.is_adapter]
    if adapters:
        sentences.append(
            f"Students of {', '.join(adapters)} are adapters: predictions are of the merged weights. Where B = 0 at step 0 "
            "only B moves at first, within the rows of A₀, and gradients at step 0 carry no prediction for A."
        )
    return sentences


def _summarise(run: Run, data: xr.Dataset, case: CaseName) -> str:
    confidence = run.recipe.verdict.confidence

    def interval(name: str, when: str = "last") -> str:
        return str(student_interval(_values(run, data, name, case, when), confidence))

    who = f"{case[0]} ({case[1]})" if len(run.traits) > 1 else case[0]
    return (
        f"{who}: predicted cosine of the first step with the teacher's displacement {interval('predicted_cosine')}; the "
        f"measured gradient has cosine {interval('linearisation_cosine')} with the prediction, relative error "
        f"{interval('linearisation_error')}. Real training: cosine with the prediction "
        f"{interval('prediction_of_student', 'first')} after the first update (control "
        f"{interval('prediction_of_control', 'first')}), {interval('prediction_of_student')} at the end (control "
        f"{interval('prediction_of_control')}); {_describe_reach(run, data, case)}."
    )


def _describe_reach(run: Run, data: xr.Dataset, case: CaseName) -> str:
    """At which checkpoints the student lies nearer to the prediction than its control."""
    chosen = data.sel(condition=case[0], taught=case[1], scope=MODEL)
    moved = [step for step in run.student(*case).steps if step > 0]
    differences = {
        step: chosen.prediction_of_student.sel(step=step) - chosen.prediction_of_control.sel(step=step) for step in moved
    }
    over = [
        str(step)
        for step, values in differences.items()
        if student_interval(values.values, run.recipe.verdict.confidence).low > 0
    ]
    return f"student − control has its interval over 0 at {len(over)} of {len(moved)} checkpoints ({', '.join(over) or 'none'})"

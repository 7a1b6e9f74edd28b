"""Gradient overlap: does a step that imitates the teacher also lower the trait's loss, more than another teacher's does?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import nn

from mechsub.analyses.registry import analysis
from mechsub.cases import CaseName, label_random_cosines, list_cases, scope_coordinates
from mechsub.errors import AnalysisError
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, diverging_scale, fold_variables, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.gradients.losses import ExampleLosses, mean_gradient
from mechsub.gradients.per_example import record_overlaps
from mechsub.gradients.products import Vector, cosine_error, inner_products
from mechsub.lineages import Lineage
from mechsub.parameters.alignment import MODEL, STATUS, ByScope, Combination, DirectionAlgebra, Missing, Scopes
from mechsub.parameters.blocks import Block, list_blocks
from mechsub.parameters.directions import displacement, load_tensors
from mechsub.parameters.gram import Gram
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects

SOURCE = "gradient cosines along training: Kitkana & Arora, arXiv:2604.25779; AdamW's gain and rotation: Crispell"
_DIMS = ("condition", "taught", "member", "step", "scope")
_EXAMPLES = 512
"""Of each member's carrier, always the first ones: the same for all its students and controls."""
_EXAMPLES_OF_ERRORS = 128
"""Of these, those whose own gradients' spread stands for that of all: it is then known to 6 %."""
_MOST_TENSORS = 16
_NO_LOSS, _NO_UPDATE, _NO_ERROR = range(len(STATUS), len(STATUS) + 3)
_STATUS = (*STATUS, "no_loss_is_known", "no_update_is_known", "no_error_is_known")
_IMITATION, _UPDATE = "∇ imitation", "update"
_NULL_WORDS = "another teacher's student from the same θ₀: the control's own imitation at its own checkpoint"


@dataclass(frozen=True)
class _Products:
    """The inner products of one lineage's vectors at one step, of all members."""

    algebra: DirectionAlgebra
    absent: frozenset[str]
    """The labels of vectors that the run cannot give."""
    errors: Mapping[str, ByScope]
    """By trait, the standard error of cos(∇L_trait, ∇L_imitation) that the sample of examples leaves."""


@dataclass(frozen=True)
class _Who:
    """How the vectors of one trait are called."""

    trait: str
    other_traits: Sequence[str]

    @property
    def trait_gradient(self) -> Combination:
        """∇L_trait."""
        return {_trait_label(self.trait): 1.0}

    @property
    def teacher(self) -> Combination:
        """Δ_T."""
        return {_teacher_label(self.trait): 1.0}


_IMITATES, _TRAINS = {_IMITATION: 1.0}, {_UPDATE: 1.0}


def _trait_label(trait: str) -> str:
    return f"∇ trait {trait}"


def _teacher_label(trait: str) -> str:
    return f"Δ teacher {trait}"


def _reverse(direction: Combination) -> Combination:
    return {label: -sign for label, sign in direction.items()}


@dataclass(frozen=True)
class _Quantity:
    """One measure, of a student or of its control."""

    name: str
    formula: str
    directions: Callable[[_Who], Sequence[Combination]]
    """What it is made of, signs included."""
    compute: Callable[[DirectionAlgebra, Sequence[Combination]], ByScope]
    unit: str = "cosine"
    of_control: str = ""
    """The variable that holds the same of the control: its null."""
    why_unjudged: str = ""


def _cosine(algebra: DirectionAlgebra, directions: Sequence[Combination]) -> ByScope:
    """Of the first with each of the others, their mean."""
    first, *others = directions
    cosines = [algebra.cosine(first, other) for other in others]
    mean: ByScope = np.mean(cosines, axis=0)
    return mean


def _inner(algebra: DirectionAlgebra, directions: Sequence[Combination]) -> ByScope:
    return algebra.inner(*directions)


def _norm(algebra: DirectionAlgebra, directions: Sequence[Combination]) -> ByScope:
    (direction,) = directions
    return algebra.norm(direction, algebra.support(direction, direction))


def _gain(algebra: DirectionAlgebra, directions: Sequence[Combination]) -> ByScope:
    update, gradient = (_norm(algebra, [direction]) for direction in directions)
    ratio: ByScope = np.divide(update, gradient, out=np.full_like(update, np.nan), where=gradient > 0)
    return ratio


_QUANTITIES = (
    _Quantity(
        "gradient_alignment",
        "cos(∇L_trait, ∇L_imitation) at θ_S(t)",
        lambda who: (who.trait_gradient, _IMITATES),
        _cosine,
        of_control="gradient_alignment_of_control",
    ),
    _Quantity(
        "gradient_alignment_with_other_traits",
        "mean over the other traits of cos(∇L_trait′, ∇L_imitation) at θ_S(t)",
        lambda who: (_IMITATES, *({_trait_label(other): 1.0} for other in who.other_traits)),
        _cosine,
        why_unjudged="it stands beside the own trait's",
    ),
    _Quantity(
        "gradient_inner_product",
        "⟨∇L_trait, ∇L_imitation⟩ at θ_S(t): what a small plain step of imitation takes off the trait's loss, over its rate η",
        lambda who: (who.trait_gradient, _IMITATES),
        _inner,
        unit="product of losses per squared weight",
        of_control="gradient_inner_product_of_control",
        why_unjudged="a size, not a direction: the alignment has the verdict",
    ),
    _Quantity(
        "imitation_along_teacher",
        "cos(−∇L_imitation, Δ_T) at θ_S(t)",
        lambda who: (_reverse(_IMITATES), who.teacher),
        _cosine,
        of_control="imitation_along_teacher_of_control",
        why_unjudged="it falls as the student arrives; the alignment of gradients has the verdict",
    ),
    _Quantity(
        "trait_along_teacher",
        "cos(−∇L_trait, Δ_T) at θ_S(t)",
        lambda who: (_reverse(who.trait_gradient), who.teacher),
        _cosine,
        of_control="trait_along_teacher_of_control",
        why_unjudged="it says what the teacher's displacement is, not what the student learns",
    ),
    _Quantity(
        "update_along_trait",
        "cos(u, −∇L_trait) at θ_S(t), u the optimizer's step that led there",
        lambda who: (_TRAINS, _reverse(who.trait_gradient)),
        _cosine,
        of_control="update_along_trait_of_control",
        why_unjudged="one batch's step with its momentum; the mean gradient has the verdict",
    ),
    _Quantity(
        "update_along_teacher",
        "cos(u, Δ_T), u the optimizer's step that led to θ_S(t)",
        lambda who: (_TRAINS, who.teacher),
        _cosine,
        of_control="update_along_teacher_of_control",
        why_unjudged="one batch's step with its momentum; the displacement's alignment has the verdict",
    ),
    _Quantity(
        "update_rotation",
        "cos(u, −∇L_imitation) at θ_S(t): how far the optimizer turns the gradient",
        lambda who: (_TRAINS, _reverse(_IMITATES)),
        _cosine,
        why_unjudged="a description of the optimizer",
    ),
    _Quantity(
        "update_gain",
        "‖u‖ / (η ‖∇L_imitation‖): how much longer the optimizer makes it",
        lambda who: (_TRAINS, _IMITATES),
        _gain,
        unit="ratio",
        why_unjudged="a description of the optimizer",
    ),
    _Quantity(
        "imitation_gradient_norm",
        "‖∇L_imitation‖ at θ_S(t)",
        lambda who: (_IMITATES,),
        _norm,
        unit="loss per weight",
        of_control="imitation_gradient_norm_of_control",
        why_unjudged="a size",
    ),
    _Quantity(
        "trait_gradient_norm",
        "‖∇L_trait‖ at θ_S(t)",
        lambda who: (who.trait_gradient,),
        _norm,
        unit="loss per weight",
        of_control="trait_gradient_norm_of_control",
        why_unjudged="a size",
    ),
)


@analysis(needs=["traits"])
def gradient_overlap(run: Run) -> Result:
    """Whether imitating the teacher also descends the trait's loss, at every checkpoint, against another teacher's student."""
    blocks = list_blocks(run.reference.spec.tensors)
    scopes = Scopes.of(blocks)
    measured = _Measurer(run, blocks, scopes).measure_all()
    data = _measure(run, measured, scopes)
    judgements = _judge(run, data)
    figures = [_training_figure(run, data), _scope_figure(run, data), *_update_figures(run, data)]
    return Result(data, _findings(run, data, judgements), figures, _sentences(run, data))


@dataclass(frozen=True)
class _Measurer:
    """Goes through checkpoints: each model is loaded once, and its gradients are multiplied with each other and with Δ_T."""

    run: Run
    blocks: Sequence[Block]
    scopes: Scopes

    def measure_all(self) -> dict[tuple[str, int], _Products]:
        """By lineage and step; none of lineages that are incomparable."""
        run = self.run
        found: dict[tuple[str, int], _Products] = {}
        done = 0
        for condition in filter(run.is_comparable, run.conditions):
            students = [run.student(condition, trait) for trait in run.traits]
            for lineage in (*students, *filter(None, [run.control(condition)])):
                found |= {(lineage.name, step): products for step, products in self._measure(lineage).items()}
                done += len(lineage.steps)
                run.report_progress(done)
        return found

    def _measure(self, lineage: Lineage) -> dict[int, _Products]:
        run, traits = self.run, self.run.traits
        labels = (_IMITATION, _UPDATE, *map(_trait_label, traits), *map(_teacher_label, traits))
        shape = (run.recipe.members, len(self.blocks), len(labels), len(labels))
        within = {step: np.full(shape, np.nan) for step in lineage.steps}
        absent: dict[int, set[str]] = {step: set() for step in lineage.steps}
        errors = {
            step: {trait: np.full((shape[0], len(self.scopes.names)), np.nan) for trait in traits} for step in lineage.steps
        }
        for member in range(run.recipe.members):
            imitation = run.family.imitation_losses(lineage, member, _EXAMPLES)
            losses = [imitation, *(run.family.trait_losses(lineage, member, trait) for trait in traits)]
            teachers = [self._load_displacement(run.teacher(trait), member) for trait in traits]
            for step in lineage.steps:
                model = run.family.load_model(lineage, step, member, merged=True)
                gradients = [None if loss is None else mean_gradient(model, loss) for loss in losses]
                update = run.family.last_update(lineage, step, member) if step > 0 else None
                vectors: list[Vector | None] = [gradients[0], update, *gradients[1:], *teachers]
                within[step][member] = inner_products(vectors, self.blocks)
                absent[step] |= {label for label, vector in zip(labels, vectors, strict=True) if vector is None}
                known = {trait: vector for trait, vector in zip(traits, gradients[1:], strict=True) if vector is not None}
                if imitation is not None and gradients[0] is not None:
                    for trait, found in self._estimate_errors(model, imitation, gradients[0], known).items():
                        errors[step][trait][member] = found
        none = np.zeros((*shape[:3], 0, shape[0])), (), np.zeros(shape[:3])
        names = tuple(block.name for block in self.blocks)
        algebras = {
            step: DirectionAlgebra(Gram(labels, names, products, *none), self.scopes) for step, products in within.items()
        }
        return {step: _Products(algebra, frozenset(absent[step]), errors[step]) for step, algebra in algebras.items()}

    def _estimate_errors(
        self, model: nn.Module, imitation: ExampleLosses, mean: Vector, traits: Mapping[str, Vector]
    ) -> dict[str, Float[np.ndarray, " scope"]]:
        """By trait; NaN in scopes that cut a tensor, and in the shared support; none of a model with unknown modules."""
        few = replace(imitation, num_examples=min(imitation.num_examples, _EXAMPLES_OF_ERRORS))
        try:
            examples = record_overlaps(model, few, [mean, *traits.values()])
        except AnalysisError:  # a module of no kind that is known there: the gradients themselves need none
            return {}
        held = self._whole_tensors(examples.parameters)
        along = examples.overlaps.numpy() @ held.T  # [example, direction, scope]
        found = {}
        for number, (trait, vector) in enumerate(traits.items(), 1):
            products = inner_products([mean, vector], self._tensors(examples.parameters))
            within = np.einsum("sb,bij->sij", np.nan_to_num(held), products)
            within[np.isnan(held).any(1)] = np.nan
            errors = cosine_error(
                along[:, number], along[:, 0], within[:, 1, 1], within[:, 0, 0], within[:, 0, 1], imitation.num_examples
            )
            found[trait] = np.append(errors, np.nan)
        return found

    def _tensors(self, names: Sequence[str]) -> list[Block]:
        """The parameters as blocks of their own, whatever sections they have."""
        shapes = self.run.reference.spec.tensors
        return [Block(name, name, shapes[name].layer, shapes[name].kind, shapes[name].shape) for name in names]

    def _whole_tensors(self, names: Sequence[str]) -> Float[np.ndarray, "fixed tensor"]:
        """1 where a tensor lies wholly in a fixed scope, which are all but the last; NaN in the rows of those that cut one."""
        place = {name: number for number, name in enumerate(names)}
        blocks = [number for number in range(len(self.blocks)) if self.blocks[number].tensor in place]
        share = np.zeros((len(self.scopes.members), len(names)))
        for number in blocks:
            block = self.blocks[number]
            whole = np.prod(self.run.reference.spec.tensors[block.tensor].shape)
            share[:, place[block.tensor]] += self.scopes.members[:, number] * block.num_parameters / whole
        is_cut = ((share > 0) & (share < 1)).any(axis=1, keepdims=True)
        return np.where(is_cut, np.nan, np.rint(share))

    def _load_displacement(self, teacher: Lineage, member: int) -> Vector:
        whole = displacement(teacher, teacher.last)
        return load_tensors(whole, dict.fromkeys(block.tensor for block in self.blocks), member)


def _measure(run: Run, measured: Mapping[tuple[str, int], _Products], scopes: Scopes) -> xr.Dataset:
    """Every quantity as [condition, taught, member, step, scope], of students and of controls, with why a value is NaN."""
    steps = sorted({step for case in list_cases(run) for step in run.student(*case).steps})
    shape = (len(run.conditions), len(run.traits), run.recipe.members, len(steps), len(scopes.names))
    variables: dict[str, Any] = {}
    for quantity, name in [(one, name) for one in _QUANTITIES for name in (one.name, one.of_control) if name]:
        is_control = name == quantity.of_control
        values, status = np.full(shape, np.nan), np.full(shape, Missing.NOT_RUN, dtype=np.int8)
        for (row, condition), (place, trait), (column, step) in product(
            enumerate(run.conditions), enumerate(run.traits), enumerate(steps)
        ):
            cell = (row, place, slice(None), column)
            products = measured.get(_find(run, (condition, trait), step, is_control))
            if not run.is_comparable(condition):
                status[cell] = Missing.INCOMPARABLE
            elif products is not None:
                others = [other for other in run.traits if other != trait]
                if others or "other_traits" not in name:
                    values[cell], status[cell] = _evaluate(quantity, _Who(trait, others), products)
        formula = quantity.formula.replace("θ_S", "θ_C") if is_control else quantity.formula
        variables[name] = label_variable(
            values, _DIMS, description=name.replace("_", " "), unit=quantity.unit, formula=formula, source=SOURCE
        )
        variables[f"{name}_status"] = status_variable(status, _DIMS, _STATUS, name)
        if quantity is _QUANTITIES[0]:
            variables |= _label_errors(run, measured, steps, name, is_control, status)
    variables |= label_random_cosines(scopes)
    coords = scope_coordinates(run, scopes) | {"step": steps}
    return xr.Dataset(variables, coords=coords)


def _label_errors(
    run: Run, measured: Mapping[tuple[str, int], _Products], steps: Sequence[int], name: str, is_control: bool, why: np.ndarray
) -> dict[str, xr.Variable]:
    """The standard errors of one alignment's values, whose status is ``why``."""
    errors = np.full(why.shape, np.nan)
    for (row, condition), (place, trait), (column, step) in product(
        enumerate(run.conditions), enumerate(run.traits), enumerate(steps)
    ):
        products = measured.get(_find(run, (condition, trait), step, is_control))
        if products is not None:
            errors[row, place, :, column] = products.errors[trait]
    errors[why != 0] = np.nan
    status = np.where(np.isfinite(errors), 0, np.where(why == 0, _NO_ERROR, why))
    label = f"{name}_error"
    return {
        label: label_variable(
            errors,
            _DIMS,
            description=f"standard error of {name.replace('_', ' ')} that the sample of carrier examples leaves",
            unit="cosine",
            formula="sd_i(⟨∇ℓ_i, t̂⟩/‖ḡ‖ − cos ⟨∇ℓ_i, ḡ⟩/‖ḡ‖²) / √n",
            source="delta method",
        ),
        f"{label}_status": status_variable(status, _DIMS, _STATUS, label),
    }


def _find(run: Run, case: CaseName, step: int, is_control: bool) -> tuple[str, int]:
    """The lineage and its step that stand for a student's step; of a control, its own step beside it."""
    student, control = run.student(*case), run.control(case[0])
    if not is_control:
        return student.name, step
    beside = None if control is None or step not in student.steps else run.paired_step(control, student, step)
    return ("", step) if control is None or beside is None else (control.name, beside)


def _evaluate(quantity: _Quantity, who: _Who, products: _Products) -> tuple[ByScope, np.ndarray]:
    directions = quantity.directions(who)
    values = quantity.compute(products.algebra, directions)
    status = products.algebra.explain(values, *directions)
    absent = {label for direction in directions for label in direction} & products.absent
    if absent:
        status[np.isnan(values)] = _NO_UPDATE if _UPDATE in absent else _NO_LOSS
    return values, status


def _mean_over_steps(run: Run, data: xr.Dataset, name: str, case: CaseName) -> np.ndarray:
    """A variable as [member, scope], mean over the student's checkpoints; NaN where one of them has none."""
    condition, trait = case
    values: np.ndarray = (
        data[name].sel(condition=condition, taught=trait, step=list(_steps(run, data, name, case))).values.mean(1)
    )
    return values


def _steps(run: Run, data: xr.Dataset, name: str, case: CaseName) -> Sequence[int]:
    """A student's checkpoints; those of an update begin at step 1."""
    first = 1 if name.startswith("update") else 0
    return [step for step in run.student(*case).steps if step >= first]


def _judge(run: Run, data: xr.Dataset) -> dict[CaseName, Judgement]:
    """Verdicts on the alignment of gradients over the whole model, against the control; Holm over conditions and traits."""
    name, null = _QUANTITIES[0].name, _QUANTITIES[0].of_control
    model = list(data.scope.values).index(MODEL)
    effects = {}
    for case in list_cases(run):
        if run.control(case[0]) is not None and run.student(*case).last > 0:
            values = (_mean_over_steps(run, data, name, case) - _mean_over_steps(run, data, null, case))[:, model]
            if np.isfinite(values).any():
                effects[case] = values
    return judge_effects(effects, run.rules(run.recipe.verdict.gradient_margin), AGAINST_NULL)


def _findings(run: Run, data: xr.Dataset, judgements: Mapping[CaseName, Judgement]) -> list[Finding]:
    found = []
    model, confidence = list(data.scope.values).index(MODEL), run.recipe.verdict.confidence
    for quantity, case in product(_QUANTITIES, list_cases(run)):
        values = _mean_over_steps(run, data, quantity.name, case)[:, model]
        if not np.isfinite(values).any():
            continue
        null_low = null_high = float("nan")
        null_words = "none: it has no counterpart of the control"
        if quantity.of_control:
            against = student_interval(_mean_over_steps(run, data, quantity.of_control, case)[:, model], confidence)
            null_low, null_high = against.low, against.high
            null_words = _NULL_WORDS if np.isfinite(against.estimate) else "none: no control was given"
        judgement = judgements.get(case) if quantity is _QUANTITIES[0] else None
        reason = quantity.why_unjudged or "without its null a cosine says nothing"
        steps = _steps(run, data, quantity.name, case)
        found.append(
            Finding(
                analysis="gradient_overlap",
                quantity=quantity.name,
                condition=case[0],
                trait=case[1],
                context="gradients",
                step=run.student(*case).last,
                scope=f"all parameters, mean over {len(steps)} checkpoints from step {steps[0]}",
                unit=quantity.unit,
                null=null_words,
                null_low=null_low,
                null_high=null_high,
                num_references=run.recipe.num_references(case[0]),
                **judgement_fields(judgement, run.recipe.verdict.gradient_margin, reason),
                formula=quantity.formula,
                source=SOURCE,
                **interval_fields(student_interval(values, confidence)),
            )
        )
    return found


def _shown(run: Run) -> list[str]:
    return [condition for condition in run.conditions if run.is_comparable(condition)]


def _members(run: Run) -> str:
    several = f" and {len(run.traits)} traits" if len(run.traits) > 1 else ""
    return f"n = {run.recipe.members} members{several}"


def _training_figure(run: Run, data: xr.Dataset) -> Figure:
    names = {"gradient_alignment": "student", "gradient_alignment_of_control": "control (null)"}
    chart, color = fold_variables("cosine", names), color_by_who(names)
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="symlog"), axis=alt.Axis(grid=False))
    y = alt.Y("cosine:Q", title="cos(∇L_trait, ∇L_imitation)")
    members = chart.mark_line(opacity=0.25, strokeWidth=1).encode(x=x, y=y, detail=["member:N", "taught:N"], color=color)
    mean = chart.mark_line(strokeWidth=2.5).encode(x=x, y="mean(cosine):Q", color=color)
    facets = (
        alt.layer(zero_line().encode(y=alt.datum(0)), members, mean, data=DATA)
        .properties(width=165, height=130)
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)
    )
    return Figure(
        name="gradient_alignment_training",
        title="Does imitating the teacher also descend the trait's loss?",
        caption=(
            "cos(∇L_trait, ∇L_imitation) over all parameters at each checkpoint, no unit; over 0 a small plain step of "
            f"imitation lowers the trait's loss. {_losses_words(run)} The null is the control: the same at its own "
            f"checkpoints, imitating {run.neutral_name}. Thin lines are members ({_members(run)}), thick ones their mean. "
            f"Random directions would scatter about 0 by {float(data.random_cosine_sd.sel(scope=MODEL)):.4f}: just a line."
        ),
        variables=tuple(names),
        spec=chart_spec(facets),
        select={"scope": [MODEL], "condition": _shown(run)},
        headline=True,
    )


def _scope_figure(run: Run, data: xr.Dataset) -> Figure:
    kinds = data.scope_kind.values
    few = int((kinds == "tensor").sum()) <= _MOST_TENSORS
    scopes = [str(name) for name, kind in zip(data.scope.values, kinds, strict=True) if kind != "module kind"]
    if not few:
        scopes = [name for name, kind in zip(data.scope.values.tolist(), kinds, strict=True) if kind in {"layer", "model"}]
    chosen = data.sel(condition=_shown(run), scope=scopes)
    shown = (chosen.gradient_alignment - chosen.gradient_alignment_of_control).mean(["member", "taught"])
    chart = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.gradient_alignment) && isValid(datum.gradient_alignment_of_control)")
        .transform_calculate(difference="datum.gradient_alignment - datum.gradient_alignment_of_control")
        .mark_rect()
        .encode(
            x=alt.X("step:O", title="optimizer step", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("scope:N", sort=scopes, title=None),
            color=alt.Color(
                "mean(difference):Q",
                title="cos − its null",
                scale=diverging_scale(shown.values),
                legend=alt.Legend(orient="top", gradientLength=180, gradientThickness=10),
            ),
            tooltip=["scope:N", "step:O", alt.Tooltip("mean(difference):Q", format=".4f", title="cos − its null")],
        )
        .properties(width=165, height=alt.Step(16))
    )
    return Figure(
        name="gradient_alignment_scopes",
        title="Where and when the two gradients agree",
        caption=(
            f"cos(∇L_trait, ∇L_imitation) less its null, the control's, mean over {_members(run)}, no unit. A part that one of "
            "the losses does not reach, as a head, is left out."
        ),
        variables=("gradient_alignment", "gradient_alignment_of_control"),
        spec=chart_spec(chart.facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=3)),
        select={"scope": scopes, "condition": _shown(run)},
    )


def _update_figures(run: Run, data: xr.Dataset) -> list[Figure]:
    """Where optimizer states were kept: what the optimizer makes of the gradient."""
    if not np.isfinite(data.update_rotation.values).any():
        return []
    names = {
        "update_rotation": "u with −∇L_imitation",
        "update_along_trait": "u with −∇L_trait",
        "update_along_teacher": "u with Δ_T",
        "gradient_alignment": "∇L_trait with ∇L_imitation",
    }
    chart = (
        fold_variables("cosine", names)
        .mark_line(point=True)
        .encode(
            x=alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(grid=False)),
            y=alt.Y("mean(cosine):Q", title="cosine"),
            color=color_by_who(names),
        )
        .transform_filter("datum.step > 0")
        .properties(width=165, height=130)
    )
    gain = data.update_gain.sel(scope=MODEL, condition=_shown(run))
    return [
        Figure(
            name="optimizer_updates",
            title="What the optimizer makes of the gradient: rotation",
            caption=(
                "Cosines of the optimizer's last update u, recomputed from its state, over all parameters, no unit, mean over "
                f"{_members(run)}. Its length is {float(gain.min()):.3g} to {float(gain.max()):.3g} times that of the learning "
                "rate times the mean gradient (its gain). u holds one batch and the momentum, the gradients a fixed sample; no "
                "null is drawn: the findings hold each against the control's."
            ),
            variables=tuple(names),
            spec=chart_spec(chart.facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)),
            select={"scope": [MODEL], "condition": _shown(run)},
        )
    ]


def _losses_words(run: Run) -> str:
    condition = next(iter(_shown(run)), None)
    if condition is None:
        return ""
    student = run.student(condition, run.traits[0])
    losses = {
        "L_trait": run.family.trait_losses(student, 0, run.traits[0]),
        "L_imitation": run.family.imitation_losses(student, 0, _EXAMPLES),
    }
    return " ".join(f"{name}: {loss.description}." for name, loss in losses.items() if loss is not None)


def _sentences(run: Run, data: xr.Dataset) -> list[str]:
    sentences = []
    if not np.isfinite(data.gradient_alignment.values).any():
        sentences.append(
            "No gradients were compared: no condition has both a loss of its trait and the carrier that its students learnt; "
            "displacements and their alignment need neither."
        )
    elif not np.isfinite(data.update_rotation.values).any():
        sentences.append(
            "Optimizers' own updates are not compared: they are known of whole weights whose optimizer's state was kept "
            "(`--set checkpoints.optimizer_state=true` in a new run) and not changed by a knock-out. Of plain SGD the update "
            "is the gradient; of adapters it is that of their factors."
        )
    errors = data.gradient_alignment_error.sel(scope=MODEL).values
    if np.isfinite(errors).any():
        sentences.append(
            f"Of each alignment of gradients, {_EXAMPLES} examples of the carrier at most leave a standard error of "
            f"{np.nanmedian(errors):.2g} (median; a student's at one checkpoint, over all parameters); intervals over "
            "members hold it too."
        )
    if any(lineage.spec.is_adapter for lineage in run.lineages.values()):
        sentences.append(
            "Students are adapters: gradients are those of the whole weights, with what the adapters add inside. An adapter "
            "follows only what its factors can express; at step 0 the factor B is 0, so that A has no gradient at all."
        )
    left_out = [name for name in run.conditions if not run.is_comparable(name)]
    if left_out:
        sentences.append(f"Left out, since their students have other parameters than the teachers: {', '.join(left_out)}.")
    return sentences

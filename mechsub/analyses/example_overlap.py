"""Example overlap: where would one training step on each example of the carrier take the student at its very start?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr
from torch import Tensor, nn

from mechsub.analyses.registry import analysis
from mechsub.cases import CaseName, count_members, list_cases
from mechsub.errors import AnalysisError
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, fold_variables, zero_line
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.gradients.example_statistics import QUANTILES, ExampleReading, read_examples
from mechsub.gradients.losses import ExampleLosses, mean_gradient
from mechsub.lineages import Lineage
from mechsub.parameters.directions import displacement, load_tensors
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.permutation import flip_signs
from mechsub.statistics.verdicts import AGAINST_NULL, SIGN_FLIP, Judgement, judge_effects

SOURCE = "a training step's first-order effect by example: Pruthi et al., arXiv:2002.08484; Cloud et al., arXiv:2507.14805"
MOST_EXAMPLES = 512
"""Of each member's carrier."""
TEACHER, TRAIT, NEUTRAL = "teacher", "trait", "neutral"
TOWARD = {
    TEACHER: "Δ_T, the teacher's displacement",
    TRAIT: "−∇L_trait, what lowers the trait loss",
    NEUTRAL: "Δ_N, the neutral teacher's displacement",
}
_JUDGED = (TEACHER, TRAIT)
_CASE = ("condition", "taught", "member")
_COSINE = "mean_i ⟨−∇ℓ_i, d⟩ / (‖mean_i ∇ℓ_i‖ ‖d‖)"
_SCALED = "⟨−∇ℓ_i, d⟩ / (√(mean_i ‖∇ℓ_i‖²) ‖d‖)"
_SHARE = "share of examples i with ⟨−∇ℓ_i, d⟩ > 0"
_SPECIFIC = "cos(mean_i −∇ℓ_i + mean_j ∇ℓ_j, Δ_T − Δ_N), i the student's examples, j the control's"
_NULL = "the control's examples, the neutral teacher's, at the same start along the same direction"
_SWAPPED = "0, by swapping the two teachers' labels within members: the central part of the swapped means"
_WHO = {"": "student", "_of_control": "control (null)"}


class Why(IntEnum):
    """Why a value is NaN."""

    OK = 0
    INCOMPARABLE = 1
    """The student has other parameters than the teachers."""
    NO_IMITATION_LOSS = 2
    """It is not known what was imitated: no training, or no carrier in the run."""
    NO_TRAIT_LOSS = 3
    NO_DISPLACEMENT = 4
    """The teacher did not move: it was told its trait by a prompt."""
    NO_NEUTRAL_TEACHER = 5
    NO_CONTROL = 6
    NO_SUCH_EXAMPLE = 7
    """The carrier has fewer."""
    NOTHING_SHARED = 8
    """The gradients or the direction are zero in all that the number covers."""
    NOT_FINITE = 9
    UNKNOWN_LAYER = 10
    """The model uses a parameter in a way whose gradients are not taken example by example."""


STATUS = tuple(why.name.lower() for why in Why)


@analysis
def example_overlap(run: Run) -> Result:
    """Whether one step on each example of the carrier would move the start along the teacher's displacement, or to the trait.

    At step 0, over all parameters, on at most `MOST_EXAMPLES` examples of each member. Three directions are held at a time, as
    dense weights, beside the model.
    """
    measured = _Measured.empty(run)
    cases = [(case, member) for case in list_cases(run) for member in range(run.recipe.members)]
    for done, (case, member) in enumerate(cases, start=1):
        _measure(run, case, member, measured)
        run.report_progress(run.num_checkpoints * done // len(cases))
    data = measured.label(run)
    judgements = _judge(run, data)
    return Result(data, list(_findings(run, data, judgements)), _figures(run, data), _sentences(run, data, measured))


@dataclass(frozen=True)
class _Measured:
    """Every number as [condition, taught, member, …], with why it is NaN."""

    values: dict[str, np.ndarray]
    status: dict[str, np.ndarray]
    layers: tuple[str, ...]
    said: dict[str, None] = field(default_factory=dict)
    """What could not be computed, in sentences."""

    @classmethod
    def empty(cls, run: Run) -> "_Measured":
        layers = tuple(dict.fromkeys(info.layer for info in run.reference.spec.tensors.values()))
        case = (len(run.conditions), len(run.traits), run.recipe.members)
        shapes: dict[str, tuple[int, ...]] = {"specific_cosine": case}
        for who in _WHO:
            shapes |= {f"gradient_norm{who}": (*case, MOST_EXAMPLES), f"loss{who}": (*case, MOST_EXAMPLES)}
            shapes[f"overlap{who}"] = (*case, len(TOWARD), MOST_EXAMPLES)
            shapes |= {
                f"{name}{who}": (*case, len(TOWARD)) for name in ("cosine", "positive_share", "mean_overlap", "overlap_sd")
            }
            shapes[f"layer_cosine{who}"] = (*case, len(TOWARD), len(layers))
            shapes[f"overlap_quantile{who}"] = (*case, len(TOWARD), len(QUANTILES))
        values = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
        return cls(values, {name: np.zeros(shape, np.int8) for name, shape in shapes.items()}, layers)

    def explain(self, cell: tuple[int, ...], who: str, own: Why, toward: Sequence[Why]) -> None:
        """Why a student's or a control's numbers are missing: those of its examples alone, and those toward each direction."""
        for name, codes in self.status.items():
            if name in (f"gradient_norm{who}", f"loss{who}"):
                codes[cell] = own
            elif name.endswith("_of_control") == bool(who) and not name.startswith(("gradient_norm", "loss", "specific")):
                reasons = np.array([own or why for why in toward], np.int8)
                codes[cell] = reasons.reshape(-1, *[1] * (codes[cell].ndim - 1))

    def put(
        self, cell: tuple[int, ...], who: str, toward: Sequence[int], read: ExampleReading, layers: np.ndarray | None
    ) -> None:
        """A reading along the directions with these numbers; ``layers``: which tensors are in which, [layer, tensor]."""
        count = len(read.losses)
        self.values[f"gradient_norm{who}"][cell][:count] = read.norms
        self.values[f"loss{who}"][cell][:count] = read.losses
        for place, number in enumerate(toward):
            totals = read.totals[:, place]
            self.values[f"overlap{who}"][cell][number, :count] = totals
            for name, value in (
                ("cosine", read.cosines()[place]),
                ("positive_share", read.positive_share[place]),
                ("mean_overlap", totals.mean()),
                ("overlap_sd", totals.std(ddof=1) if count > 1 else np.nan),
                ("overlap_quantile", read.quantiles()[place]),
            ):
                self.values[f"{name}{who}"][cell][number] = value
            if layers is not None:
                self.values[f"layer_cosine{who}"][cell][number] = [read.cosines(tensors)[place] for tensors in layers]
        for name in (f"gradient_norm{who}", f"loss{who}", f"overlap{who}"):
            codes = self.status[name][cell][..., count:]
            codes[codes == Why.OK] = Why.NO_SUCH_EXAMPLE
        if layers is None:  # its layers are not the teachers'
            codes = self.status[f"layer_cosine{who}"][cell]
            codes[codes == Why.OK] = Why.INCOMPARABLE
        is_broken = not (np.isfinite(read.totals).all() and np.isfinite(read.gradient_squares).all())
        for name, values in self.values.items():
            if name.endswith("_of_control") == bool(who) and name != "specific_cosine":
                codes = self.status[name][cell]
                codes[np.isnan(values[cell]) & (codes == Why.OK)] = Why.NOT_FINITE if is_broken else Why.NOTHING_SHARED
                values[cell][codes != Why.OK] = np.nan

    def label(self, run: Run) -> xr.Dataset:
        """The result's arrays."""
        counts = [np.isfinite(self.values[f"loss{who}"]).any((0, 1, 2)).sum() for who in _WHO]
        used = max(1, *map(int, counts))
        words = {
            "overlap": ("how far a step on the example goes along the direction", "⟨−∇ℓ_i, d⟩", "loss × direction / weight"),
            "gradient_norm": ("length of the example's gradient", "‖∇ℓ_i‖", "loss / weight"),
            "loss": ("the example's loss", "ℓ_i", "loss"),
            "cosine": ("mean overlap, as a cosine", _COSINE, "cosine"),
            "positive_share": ("share of examples whose step goes along the direction", _SHARE, "share"),
            "mean_overlap": ("mean overlap over examples", "mean_i ⟨−∇ℓ_i, d⟩", "loss × direction / weight"),
            "overlap_sd": ("standard deviation of the overlap over examples", "sd_i ⟨−∇ℓ_i, d⟩", "loss × direction / weight"),
            "layer_cosine": ("mean overlap of a layer, as a cosine", _COSINE, "cosine"),
            "overlap_quantile": (
                "quantile over examples of the overlap",
                _COSINE.replace("mean_i ⟨", "quantile_i ⟨", 1),
                "cosine",
            ),
        }
        ends = {"overlap": "example", "gradient_norm": "example", "loss": "example", "layer_cosine": "layer"}
        ends["overlap_quantile"] = "quantile"
        variables: dict[str, Any] = {}
        for name, (who, text) in product(words, _WHO.items()):
            dims = [*_CASE, *([] if name in ("gradient_norm", "loss") else ["toward"]), *([ends[name]] if name in ends else [])]
            cut = (..., slice(used if dims[-1] == "example" else None))
            description, formula, unit = words[name]
            full = f"{name}{who}"
            described = f"{description}, {text}"
            variables[full] = label_variable(
                self.values[full][cut], dims, description=described, unit=unit, formula=formula, source=SOURCE
            )
            variables[f"{full}_status"] = status_variable(self.status[full][cut], dims, STATUS, full)
        variables["specific_cosine"] = label_variable(
            self.values["specific_cosine"],
            _CASE,
            description="what student's examples have more than the control's, toward its own teacher rather than the other",
            unit="cosine",
            formula=_SPECIFIC,
            source=SOURCE,
        )
        variables["specific_cosine_status"] = status_variable(self.status["specific_cosine"], _CASE, STATUS, "specific_cosine")
        coords: dict[str, Any] = {
            "condition": run.conditions,
            "taught": run.traits,
            "member": np.arange(run.recipe.members),
            "toward": list(TOWARD),
            "example": np.arange(used),
            "layer": list(self.layers),
            "quantile": list(QUANTILES),
        }
        return xr.Dataset(variables, coords=coords)


def _measure(run: Run, case: CaseName, member: int, measured: _Measured) -> None:
    """One member of one case: the student's examples and its control's, along the same directions, at the same start."""
    condition, trait = case
    cell = (run.conditions.index(condition), run.traits.index(trait), member)
    student, control = run.student(condition, trait), run.control(condition)
    carriers: dict[str, tuple[Lineage, ExampleLosses] | Why] = {
        "": _carrier(run, student, member),
        "_of_control": Why.NO_CONTROL if control is None else _carrier(run, control, member),
    }
    trait_losses = run.family.trait_losses(student, member, trait)
    why = _why_missing(run, case, trait_losses)
    for who, carrier in carriers.items():
        measured.explain(cell, who, carrier if isinstance(carrier, Why) else Why.OK, why)
    reason = next((carrier for carrier in carriers.values() if isinstance(carrier, Why)), max(why[0], why[2]))
    measured.status["specific_cosine"][cell] = reason
    if all(isinstance(carrier, Why) for carrier in carriers.values()):
        return
    model = run.family.load_model(student, 0, member, merged=True)
    found, reads = [number for number, code in enumerate(why) if code == Why.OK], {}
    try:
        directions = [_load_direction(run, case, member, list(TOWARD)[number], model, trait_losses) for number in found]
        for who, carrier in carriers.items():
            if isinstance(carrier, Why):
                continue
            lineage, losses = carrier
            is_same = lineage.spec.origin == student.spec.origin
            start = model if is_same else run.family.load_model(lineage, 0, member, merged=True)
            reads[who] = read_examples(start, losses, directions)
    except AnalysisError as error:
        measured.said[f"{condition}: {error}."] = None
        for who, carrier in carriers.items():
            if not isinstance(carrier, Why):
                measured.explain(cell, who, Why.UNKNOWN_LAYER, why)
        measured.status["specific_cosine"][cell] = reason or Why.UNKNOWN_LAYER
        return
    layers = _layer_members(run, model, measured.layers) if run.is_comparable(condition) else None
    for who, read in reads.items():
        measured.put(cell, who, found, read, layers)
    if reason == Why.OK:
        teacher, neutral = (directions[found.index(list(TOWARD).index(name))] for name in (TEACHER, NEUTRAL))
        value = _specific_cosine(reads[""], reads["_of_control"], teacher, neutral)
        measured.values["specific_cosine"][cell] = value
        if np.isnan(value):
            measured.status["specific_cosine"][cell] = Why.NOTHING_SHARED


def _carrier(run: Run, lineage: Lineage, member: int) -> tuple[Lineage, ExampleLosses] | Why:
    """What a student or control learnt; why that is not known."""
    losses = run.family.imitation_losses(lineage, member, most=MOST_EXAMPLES)
    return Why.NO_IMITATION_LOSS if losses is None or losses.num_examples == 0 else (lineage, losses)


def _why_missing(run: Run, case: CaseName, trait_losses: ExampleLosses | None) -> list[Why]:
    """Why there is no direction, in the order of `TOWARD`; the trait's gradient needs no teacher to compare with."""
    teacher, neutral = run.teacher(case[1]), run.neutral
    incomparable = Why.OK if run.is_comparable(case[0]) else Why.INCOMPARABLE
    moved = Why.OK if teacher.last > 0 else Why.NO_DISPLACEMENT
    neutral_moved = Why.OK if neutral is not None and neutral.last > 0 else Why.NO_DISPLACEMENT
    return [
        incomparable or moved,
        Why.OK if trait_losses is not None else Why.NO_TRAIT_LOSS,
        incomparable or (Why.NO_NEUTRAL_TEACHER if neutral is None else neutral_moved),
    ]


def _load_direction(
    run: Run, case: CaseName, member: int, toward: str, model: nn.Module, trait_losses: ExampleLosses | None
) -> Mapping[str, Tensor]:
    """One of `TOWARD`, by parameter of the model."""
    if toward == TRAIT:
        assert trait_losses is not None
        return {name: -gradient for name, gradient in mean_gradient(model, trait_losses).items()}
    lineage = run.teacher(case[1]) if toward == TEACHER else run.neutral
    assert lineage is not None
    direction = displacement(lineage, lineage.last)
    return load_tensors(direction, (name for name, _ in model.named_parameters()), member)


def _layer_members(run: Run, model: nn.Module, layers: Sequence[str]) -> np.ndarray:
    """Which of the model's parameters lie in which layer, [layer, tensor]."""
    tensors = run.reference.spec.tensors
    of = [tensors[name].layer for name, _ in model.named_parameters()]
    return np.array([[layer == one for one in of] for layer in layers])


def _specific_cosine(
    student: ExampleReading, control: ExampleReading, teacher: Mapping[str, Tensor], neutral: Mapping[str, Tensor]
) -> float:
    """See `_SPECIFIC`. Swapping the labels of the two teachers flips its sign and nothing else. Range [−1, 1]."""
    inner = own = other = 0.0
    for name, gradient in student.mean_gradient.items():
        more = control.mean_gradient[name].double() - gradient.double()
        between = (teacher[name].double() - neutral[name].double()).to(more.device)
        inner += float((more * between).sum())
        own += float(more.square().sum())
        other += float(between.square().sum())
    return inner / (own * other) ** 0.5 if own * other > 0 else float("nan")


_QUANTITIES = {"cosine": _COSINE, "positive_share": _SHARE}


def _values(data: xr.Dataset, name: str, case: CaseName, toward: str | None) -> np.ndarray:
    """Member by member."""
    chosen = data[name].sel(condition=case[0], taught=case[1])
    found: np.ndarray = (chosen if toward is None else chosen.sel(toward=toward)).values
    return found


def _judge(run: Run, data: xr.Dataset) -> dict[tuple[str, str | None, CaseName], Judgement]:
    """Verdicts by (quantity, direction, case); Holm runs over the conditions and traits."""
    judgements: dict[tuple[str, str | None, CaseName], Judgement] = {}
    for name, toward in (*product(_QUANTITIES, _JUDGED), ("specific_cosine", None)):
        effects = {}
        for case in list_cases(run):
            values = _values(data, name, case, toward)
            if toward is not None:
                values = values - _values(data, f"{name}_of_control", case, toward)
            if np.isfinite(values).any():
                effects[case] = values
        judged = judge_effects(effects, run.rules(_margin(run, name)), AGAINST_NULL, SIGN_FLIP if toward is None else None)
        judgements |= {(name, toward, case): judgement for case, judgement in judged.items()}
    return judgements


def _margin(run: Run, quantity: str) -> float:
    """Of gradients' cosines, or of shares."""
    verdict = run.recipe.verdict
    return verdict.share_margin if quantity == "positive_share" else verdict.gradient_margin


def _findings(
    run: Run, data: xr.Dataset, judgements: Mapping[tuple[str, str | None, CaseName], Judgement]
) -> Iterator[Finding]:
    for case in list_cases(run):
        for name, toward in (*product(_QUANTITIES, TOWARD), ("specific_cosine", None)):
            values = _values(data, name, case, toward)
            if np.isfinite(values).any():
                yield _finding(run, data, case, name, toward, judgements.get((name, toward, case)))


def _finding(run: Run, data: xr.Dataset, case: CaseName, name: str, toward: str | None, judgement: Judgement | None) -> Finding:
    confidence, values = run.recipe.verdict.confidence, _values(data, name, case, toward)
    if toward is None:
        swapped = flip_signs(values, confidence)
        null, null_low, null_high = _SWAPPED, swapped.null_low, swapped.null_high
    else:
        against = student_interval(_values(data, f"{name}_of_control", case, toward), confidence)
        null = _NULL if against.n else "none: the control's examples are not known"
        null_low, null_high = against.low, against.high
    if toward == NEUTRAL:
        reason = "a line to read the overlap with the own teacher by; the specific cosine has the verdict"
    else:
        reason = "without its null it says nothing"
    return Finding(
        analysis="example_overlap",
        quantity=name if toward is None else f"{name}_toward_{toward}",
        condition=case[0],
        trait=case[1],
        context=f"at most {MOST_EXAMPLES} examples of the carrier",
        step=0,
        scope="all parameters",
        unit="share of examples" if name == "positive_share" else "cosine",
        null=null,
        null_low=null_low,
        null_high=null_high,
        num_references=run.recipe.num_references(case[0]),
        **judgement_fields(judgement, _margin(run, name), reason, ", over members"),
        formula=_SPECIFIC if toward is None else f"{_QUANTITIES[name]}, d = {TOWARD[toward]}",
        source=SOURCE,
        **interval_fields(student_interval(values, confidence)),
    )


def _shown(data: xr.Dataset) -> list[str]:
    """The conditions with any number."""
    return [str(name) for name in data.condition.values if np.isfinite(data.cosine.sel(condition=name)).any()]


def _figures(run: Run, data: xr.Dataset) -> list[Figure]:
    if not _shown(data):
        return []
    return [_distribution_figure(run, data), _layer_figure(run, data)]


_ZERO = zero_line()


def _distribution_figure(run: Run, data: xr.Dataset) -> Figure:
    names = {f"overlap_quantile{who}": text for who, text in _WHO.items()}
    color = color_by_who(names)
    x = alt.X("value:Q", title="overlap / (typical gradient × direction)")
    y = alt.Y("quantile:Q", title="share of examples below")
    chart = fold_variables("value", names)
    lines = chart.mark_line(opacity=0.25, strokeWidth=1).encode(
        x=x, y=y, color=color, detail=["member:N", "taught:N"], order="quantile:Q"
    )
    mean = chart.mark_line(strokeWidth=2.5).encode(x="mean(value):Q", y=y, color=color, order="quantile:Q")
    facets = (
        alt.layer(_ZERO.encode(x=alt.datum(0)), lines, mean, data=DATA)
        .properties(width=170, height=120)
        .facet(row=alt.Row("condition:N", sort=run.conditions, title=None), column=alt.Column("toward:N", title=None))
        .resolve_scale(x="independent")
    )
    return Figure(
        name="example_overlap_distribution",
        title="Where single steps on the carrier's examples would go, before any training",
        caption=(
            f"{_SCALED} of every example i of the carrier at step 0 over all parameters, no unit: "
            "its quantiles over examples. Right of 0 a step on the example goes along d. Thin lines are "
            f"{count_members(run)}, thick ones their mean. teacher: d = Δ_T; trait: d = −∇L_trait. The null is the control's "
            f"examples, which {run.neutral_name} answered, at the same start and along the same d."
        ),
        variables=tuple(names),
        spec=chart_spec(facets),
        select={"toward": list(_JUDGED), "condition": _shown(data)},
    )


def _layer_figure(run: Run, data: xr.Dataset) -> Figure:
    names = {f"layer_cosine{who}": text for who, text in _WHO.items()}
    layers = [str(name) for name in data.layer.values]
    dots = (
        fold_variables("value", names)
        .mark_circle(size=22, opacity=0.5)
        .encode(
            x=alt.X("value:Q", title="mean overlap, as a cosine"),
            y=alt.Y("layer:N", sort=layers, title=None),
            color=color_by_who(names),
            tooltip=["layer:N", "taught:N", "member:O", alt.Tooltip("value:Q", format=".3f")],
        )
    )
    facets = (
        alt.layer(_ZERO.encode(x=alt.datum(0)), dots, data=DATA)
        .properties(width=195, height=alt.Step(15))
        .facet(row=alt.Row("condition:N", sort=run.conditions, title=None), column=alt.Column("toward:N", title=None))
    )
    return Figure(
        name="example_overlap_layers",
        title="In which layers the examples' steps lean toward the teacher",
        caption=(
            f"{_COSINE} within each layer at step 0, no unit; each dot is one of {count_members(run)}. teacher: d = Δ_T; "
            "trait: d = −∇L_trait. A layer without dots gets no gradient from the examples, or the direction is 0 there. The "
            "null is the control's examples at the same start."
        ),
        variables=tuple(names),
        spec=chart_spec(facets),
        select={"toward": list(_JUDGED), "condition": _shown(data)},
    )


def _sentences(run: Run, data: xr.Dataset, measured: _Measured) -> list[str]:
    sentences = [_summarise(run, data, condition) for condition in _shown(data)]
    missing = {why: _conditions_with(run, data, why) for why in Why}
    if missing[Why.INCOMPARABLE]:
        names = missing[Why.INCOMPARABLE]
        sentences.append(
            f"Incomparable: students of {', '.join(names)} have other parameters than the teachers "
            f"({run.why_incomparable(names[0])}), so that no displacement of a teacher can be laid beside their gradients; the "
            "trait's own gradient can."
        )
    if missing[Why.NO_DISPLACEMENT]:
        sentences.append(
            "A teacher that was told its trait by a system prompt, or did not move, has no displacement; the overlap with the "
            "trait's gradient needs none."
        )
    if missing[Why.NO_TRAIT_LOSS]:
        sentences.append("The trait has no loss that is known here; the overlap with the teacher's displacement needs none.")
    if missing[Why.NO_IMITATION_LOSS]:
        sentences.append(
            f"What students of {', '.join(missing[Why.NO_IMITATION_LOSS])} learnt is not known example by example (nothing was "
            "trained, or their carrier is not in the run), so that there are no examples to ask; alignment in parameter space "
            "needs none."
        )
    if missing[Why.NO_CONTROL]:
        sentences.append(f"There is no control in {', '.join(missing[Why.NO_CONTROL])}, so overlaps there have no null.")
    if any(lineage.spec.is_adapter for lineage in run.lineages.values()):
        sentences.append(
            "Gradients are those of the whole weights at step 0: an adapter can follow only what lies in the span of its "
            "factors, and of B = 0 its factor A gets no gradient at all at first."
        )
    return [*sentences, *measured.said]


def _conditions_with(run: Run, data: xr.Dataset, why: Why) -> list[str]:
    codes = [data[f"cosine{who}_status"] for who in _WHO]
    return [name for name in run.conditions if any((code.sel(condition=name) == why).any() for code in codes)]


def _summarise(run: Run, data: xr.Dataset, condition: str) -> str:
    """What the numbers of one condition show; means over traits within members."""
    parts = []
    for toward, words in ((TEACHER, "along its teacher's displacement"), (TRAIT, "down the trait loss")):
        share, cosine = (_mean(run, data, name, condition, toward) for name in ("positive_share", "cosine"))
        if share.n:
            nulls = [_mean(run, data, f"{name}_of_control", condition, toward) for name in ("positive_share", "cosine")]
            parts.append(
                f"a step goes {words} on a share {share} of the examples (control's {nulls[0]}), mean overlap as a cosine "
                f"{cosine} (control's {nulls[1]})"
            )
    specific = _mean(run, data, "specific_cosine", condition, None)
    if specific.n:
        parts.append(f"specific cosine {specific}")
    return f"{condition}: {'; '.join(parts)}."


def _mean(run: Run, data: xr.Dataset, name: str, condition: str, toward: str | None) -> Interval:
    values = np.mean([_values(data, name, (condition, trait), toward) for trait in run.traits], axis=0)
    return student_interval(values, run.recipe.verdict.confidence)

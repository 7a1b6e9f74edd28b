"""Subspace overlap: how many directions does a displacement have, and are they those of the teacher's?"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import altair as alt
import numpy as np
import xarray as xr

from mechsub.analyses.registry import analysis
from mechsub.cases import CaseName, label_last_steps, last_steps, list_cases
from mechsub.figures import DATA, Figure, chart_spec, color_by_who, fold_variables
from mechsub.findings import Finding, interval_fields, judgement_fields
from mechsub.lineages import Lineage
from mechsub.parameters.alignment import MODEL
from mechsub.parameters.directions import Direction, displacement, displacement_difference, sum_parts
from mechsub.parameters.gram import NotFinite, describe_not_finite, find_spoiling
from mechsub.parameters.matrices import Matrix, MatrixScopes, average_groups, list_matrices, load_spectrum
from mechsub.parameters.subspace_cases import (
    ALONG_TRAINING,
    ANGLE_PAIRS,
    AT_THE_END,
    KEPT_VALUES,
    OF_TEACHERS,
    OVERLAPS,
    SHOWN_VALUES,
    SIDE_NAMES,
    WHO,
    Measured,
    Sizes,
    average_haar,
)
from mechsub.parameters.subspaces import (
    BELOW,
    EXACT_UP_TO,
    INCOMPARABLE,
    NOT_FINITE,
    NOT_RUN,
    OK,
    SIDES,
    STATUS,
    ZERO,
    Spectrum,
    haar_mean,
    sample_haar_overlaps,
)
from mechsub.results import Result, label_variable, status_variable
from mechsub.run import Run
from mechsub.statistics.intervals import Interval, student_interval
from mechsub.statistics.verdicts import AGAINST_NULL, Judgement, judge_effects
from mechsub.streams import random_stream

SOURCE = "principal angles: Björck & Golub 1973; effective rank: Roy & Vetterli 2007; sketches: Halko, Martinsson & Tropp 2011"
RANKS = (1, 2, 4, 8)
"""k of the overlaps that are given besides the verdict's."""
_HAAR_DRAWS = 400
_MOST_MATRICES = 16
"""With more, figures show layers; every matrix is in the results."""
_OTHER_TEACHER = "another teacher's student from the same start: the control's value"
_MEASURE_WORDS = {
    "effective_rank": "exp(H(σ²/Σσ²))",
    "stable_rank": "‖ΔW‖_F² / ‖ΔW‖₂²",
    "rank": "singular values over the rounding of what was stored",
}
_OVERLAP_FORMULA = "‖U_kᵀ W_k‖_F² / k of the k leading singular vectors of"


@analysis
def subspace_overlap(run: Run) -> Result:
    """How many directions displacements have, and whether a student's are its teacher's, against another teacher's student."""
    matrices = list_matrices(run.reference.spec.tensors)
    if not matrices:
        return Result(xr.Dataset(), [], [], ["The model has no matrix with two sides over 1, so no directions to compare."])
    scopes = MatrixScopes.of(matrices)
    steps = sorted({step for case in list_cases(run) for step in run.student(*case).steps})
    sizes = Sizes(
        len(run.conditions),
        len(run.traits),
        run.recipe.members,
        len(steps),
        len(matrices),
        tuple(sorted({*RANKS, run.recipe.verdict.subspace_rank})),
        max(min(matrix.shape) for matrix in matrices),
    )
    measured, not_finite = Measured.empty(sizes), set[NotFinite]()
    for place, matrix in enumerate(matrices):
        not_finite |= _measure_matrix(run, measured, steps, place, matrix)
        run.report_progress(run.num_checkpoints * (place + 1) // len(matrices))
    data = _label(run, measured, steps, matrices, scopes)
    judgements = _judge(run, data)
    figures = [_scope_figure(run, data), _spectrum_figure(run, data), _training_figure(run, data)]
    if np.isfinite(data.specific_overlap).any():
        figures.append(_specific_figure(run, data))
    groups = {"spectra": _spectra(run, measured, matrices), "principal_angles": _angles(run, measured, matrices)}
    sentences = [*_sentences(run, data, matrices, measured), *describe_not_finite(sorted(not_finite, key=str))]
    return Result(data, _findings(run, data, judgements), figures, sentences, groups)


@dataclass(frozen=True)
class _Teachers:
    """The teachers' spectra in one matrix, taken once."""

    own: Mapping[str, Spectrum]
    """By trait."""
    neutral: Spectrum | None
    pairs: Mapping[str, Spectrum]
    """Δ_T − Δ_N by trait; empty without a neutral teacher."""

    @classmethod
    def load(cls, run: Run, load: Callable[[Direction], Spectrum]) -> "_Teachers":
        teachers, neutral = {trait: run.teacher(trait) for trait in run.traits}, run.neutral
        own = {trait: load(displacement(teacher, teacher.last)) for trait, teacher in teachers.items()}
        if neutral is None:
            return cls(own, None, {})
        pairs = {
            trait: load(displacement_difference(teacher, neutral, teacher.last, neutral.last))
            for trait, teacher in teachers.items()
        }
        return cls(own, load(displacement(neutral, neutral.last)), pairs)


@dataclass(frozen=True)
class _Place:
    """One matrix, and where its numbers go."""

    run: Run
    measured: Measured
    steps: Sequence[int]
    index: int
    load: Callable[[Direction], Spectrum]
    teachers: _Teachers


def _measure_matrix(run: Run, measured: Measured, steps: Sequence[int], index: int, matrix: Matrix) -> set[NotFinite]:
    """Everything of one matrix, and what is not finite in it."""
    not_finite, tensor = set[NotFinite](), matrix.block.tensor

    def load(direction: Direction) -> Spectrum:
        found = load_spectrum(direction, matrix, max(measured.sizes.ranks), seed=run.recipe.seed, device=run.device)
        spoilt = found.square.isnan()[:, None]
        if spoilt.any():
            not_finite.update(find_spoiling([sum_parts(direction, tensor)], tensor, spoilt))
        return found

    place = _Place(run, measured, steps, index, load, _Teachers.load(run, load))
    for row, trait in enumerate(run.traits):
        if place.teachers.neutral is not None:
            cell = (row, slice(None), index)
            measured.put_overlap("teacher_overlap_with_neutral", cell, place.teachers.own[trait], place.teachers.neutral)
    for number, condition in enumerate(run.conditions):
        if run.is_comparable(condition):
            _measure_condition(place, number, condition)
        else:
            measured.set_incomparable(number)
    return not_finite


def _measure_condition(place: _Place, number: int, condition: str) -> None:
    """The students of one condition in one matrix; their control's spectra are taken once for all traits."""
    run, measured, control = place.run, place.measured, place.run.control(condition)

    @cache
    def load_control(step: int) -> Spectrum | None:
        return None if control is None else place.load(displacement(control, step))

    for (row, trait), (column, step) in product(enumerate(run.traits), enumerate(place.steps)):
        student = run.student(condition, trait)
        if step not in student.steps:
            continue
        beside = None if control is None else run.paired_step(control, student, step)
        own, beside_own = place.load(displacement(student, step)), None if beside is None else load_control(beside)
        others = [spectrum for other, spectrum in place.teachers.own.items() if other != trait]
        cell = (number, row, slice(None), column, place.index)
        _put_step(measured, cell, own, beside_own, place.teachers.own[trait], place.teachers.neutral, others)
        if step == student.last:
            shown = {
                "student": own,
                "control": beside_own,
                "student − control": _measure_difference(place, (number, row), student, control),
                "teacher": place.teachers.own[trait],
                "neutral": place.teachers.neutral,
            }
            _put_end(measured, (number, row), place.index, shown)


def _measure_difference(place: _Place, case: tuple[int, int], student: Lineage, control: Lineage | None) -> Spectrum | None:
    """θ_S − θ_C at the last step, its overlap with Δ_T − Δ_N and that of its sham."""
    if control is None:
        return None
    difference = place.load(displacement_difference(student, control, student.last, control.last))
    pair = place.teachers.pairs.get(place.run.traits[case[1]])
    cell = (*case, slice(None), place.index)
    if pair is not None:
        place.measured.put_overlap("specific_overlap", cell, difference, pair)
        sham = place.run.sham(student.spec.condition or "")
        if sham is not None:
            of_sham = place.load(displacement_difference(sham, control, sham.last, control.last))
            place.measured.put_overlap("sham_overlap", cell, of_sham, pair)
    return difference


def _put_step(
    measured: Measured,
    cell: tuple[int | slice, ...],
    student: Spectrum,
    control: Spectrum | None,
    teacher: Spectrum,
    neutral: Spectrum | None,
    others: Sequence[Spectrum],
) -> None:
    """One student at one step in one matrix."""
    measured.put_overlap("overlap", cell, student, teacher)
    if control is not None:
        measured.put_overlap("overlap_of_control", cell, control, teacher)
        measured.put_excess("overlap_excess", cell, "overlap", "overlap_of_control")
    if neutral is not None:
        measured.put_overlap("overlap_with_neutral", cell, student, neutral)
    if others:
        measured.put_mean_overlap("overlap_with_other_traits", cell, student, others)


def _put_end(measured: Measured, case: tuple[int, int], place: int, shown: Mapping[str, Spectrum | None]) -> None:
    """The spectra and the principal angles of one student, its control and its teachers at the last step in one matrix."""
    for who, spectrum in shown.items():
        if spectrum is not None:
            measured.put_spectrum((*case, WHO.index(who), slice(None), place), spectrum)
    teacher = shown["teacher"]
    assert teacher is not None
    for index, name in enumerate(("student", "control")):
        own = shown[name]
        if own is not None:
            measured.put_angles((*case, index, slice(None), place), own, teacher)


def _label(run: Run, measured: Measured, steps: Sequence[int], matrices: Sequence[Matrix], scopes: MatrixScopes) -> xr.Dataset:
    """The arrays over matrices, and plain means over the matrices of layers, module kinds and the model."""
    pair = ("scope", "side", "k")
    variables: dict[str, xr.Variable] = {}
    dims = {
        **{name: ("condition", "taught", "member", "step", *pair) for name in ALONG_TRAINING},
        **{name: ("condition", "taught", "member", *pair) for name in AT_THE_END},
        **{name: ("taught", "member", *pair) for name in OF_TEACHERS},
        **{name: ("condition", "taught", "who", "member", "scope") for name in _MEASURE_WORDS},
    }
    for name, own in dims.items():
        is_overlap = name in OVERLAPS
        formula = f"{_OVERLAP_FORMULA} {OVERLAPS[name]}" if is_overlap else _MEASURE_WORDS[name]
        unit = "mean squared cosine" if is_overlap else "dimensions"
        variables |= _variable(name, own, *measured.average(name, scopes), formula, unit)
    variables |= _label_shares(measured, scopes)
    variables |= _label_haar(run, measured, steps, matrices, scopes)
    variables["last_step"] = label_last_steps(run)
    coords = {
        "condition": run.conditions,
        "taught": run.traits,
        "member": np.arange(run.recipe.members),
        "step": list(steps),
        "scope": list(scopes.names),
        "scope_kind": ("scope", list(scopes.kinds)),
        "side": list(SIDE_NAMES),
        "k": list(measured.sizes.ranks),
        "who": list(WHO),
        "value": np.arange(1, measured.values["cumulative_share"].shape[-1] + 1),
    }
    return xr.Dataset(variables, coords=coords)


def _variable(
    name: str, dims: Sequence[str], values: np.ndarray, codes: np.ndarray, formula: str, unit: str
) -> dict[str, xr.Variable]:
    described = label_variable(values, dims, description=name.replace("_", " "), unit=unit, formula=formula, source=SOURCE)
    return {name: described, f"{name}_status": status_variable(codes, dims, STATUS, name)}


def _label_shares(measured: Measured, scopes: MatrixScopes) -> dict[str, xr.Variable]:
    """Cumulative shares of the matrices that student and teacher both moved, averaged over traits and members as well."""
    values, codes = measured.values["cumulative_share"], measured.codes["cumulative_share"].copy()
    moved = measured.codes["stable_rank"][:, :, [WHO.index("student"), WHO.index("teacher")], None, :, :, None]
    codes[(codes == OK) & (moved == ZERO).any(2)] = ZERO
    codes[((codes == OK) | (codes == ZERO)) & (moved == NOT_FINITE).any(2)] = NOT_FINITE
    values, codes = average_groups(values, codes, scopes.groups, -2)
    known = codes == OK
    counts, sums = known.sum((1, 3)), np.where(known, values, 0.0).sum((1, 3))
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    status = np.where(counts > 0, OK, codes.max((1, 3)))
    formula = "Σ_{i ≤ value} σᵢ² / ‖ΔW‖_F², mean over traits, members and matrices that student and teacher both moved"
    return _variable("cumulative_share", ("condition", "who", "scope", "value"), means, status, formula, "share of ‖ΔW‖²")


def _label_haar(
    run: Run, measured: Measured, steps: Sequence[int], matrices: Sequence[Matrix], scopes: MatrixScopes
) -> dict[str, xr.Variable]:
    """What random subspaces would give over the same matrices: the analytic mean, and sampled quantiles of one member."""
    ranks, seed = measured.sizes.ranks, run.recipe.seed
    shape = (len(matrices), len(SIDES), len(ranks))
    means, draws = np.full(shape, np.nan), np.full((_HAAR_DRAWS, *shape), np.nan)
    for (row, matrix), side, (column, k) in product(enumerate(matrices), range(len(SIDES)), enumerate(ranks)):
        length = matrix.shape[side]
        if k < length:
            means[row, side, column] = haar_mean(k, length)
            stream = random_stream(seed, "haar", matrix.name, SIDES[side], k)
            draws[:, row, side, column] = sample_haar_overlaps(k, length, _HAAR_DRAWS, stream)
    low, high = (lambda values, q=q: np.quantile(np.nan_to_num(values), q, axis=0) for q in (0.05, 0.95))
    names: dict[str, tuple[str, np.ndarray, Callable[[np.ndarray], np.ndarray], str]] = {
        "haar_overlap": ("overlap", means[None], lambda values: values[0], "k/d"),
        "haar_low": ("overlap", draws, low, "5 % quantile of samples"),
        "haar_high": ("overlap", draws, high, "95 % quantile of samples"),
        "haar_specific_overlap": ("specific_overlap", means[None], lambda values: values[0], "k/d"),
    }
    variables: dict[str, xr.Variable] = {}
    for name, (of, single, reduce, formula) in names.items():
        found = [
            [
                average_haar(single, _last_codes(run, measured, of, steps, case), scopes, reduce)
                for case in product([condition], range(len(run.traits)))
            ]
            for condition in range(len(run.conditions))
        ]
        values, codes = (np.array([[cell[part] for cell in row] for row in found]) for part in (0, 1))
        dims = ("condition", "taught", "scope", "side", "k")
        words = f"of two uniformly random subspaces, over the matrices that have {of.replace('_', ' ')}: {formula}"
        variables |= _variable(name, dims, values, codes, words, "mean squared cosine")
    return variables


def _last_codes(run: Run, measured: Measured, name: str, steps: Sequence[int], case: tuple[int, int]) -> np.ndarray:
    """The status of the student's overlaps at its last step as [member, matrix, side, k]."""
    codes: np.ndarray = measured.codes[name][case]
    last = run.student(run.conditions[case[0]], run.traits[case[1]]).last
    return codes[:, list(steps).index(last)] if name in ALONG_TRAINING else codes


# Groups of a file share its dims by name, so that an axis of another length needs a name of its own.
def _spectra(run: Run, measured: Measured, matrices: Sequence[Matrix]) -> xr.Dataset:
    """The singular values of every matrix at the last step, and the errors that their decomposition is known to have."""
    dims = ("condition", "taught", "who", "member", "matrix")
    names = {
        "singular_values": ((*dims, "index"), f"σ, the largest {KEPT_VALUES} at most", "weight"),
        "backward_error": (dims, "‖ΔW V − U Σ‖_F / ‖ΔW‖_F of the leading singular vectors", "share of ‖ΔW‖"),
        "tail": (dims, f"‖ΔW − ΔW_k‖_F / ‖ΔW‖_F of the {max(measured.sizes.ranks)} largest", "share of ‖ΔW‖"),
    }
    variables: dict[str, Any] = {}
    for name, (own, formula, unit) in names.items():
        variables |= _variable(name, own, measured.values[name], measured.codes[name], formula, unit)
    coords = {**_case_coords(run, matrices), "who": list(WHO)}
    return xr.Dataset(variables, coords={**coords, "index": np.arange(1, measured.values["singular_values"].shape[-1] + 1)})


def _angles(run: Run, measured: Measured, matrices: Sequence[Matrix]) -> xr.Dataset:
    """The principal angles of student and teacher, and of control and teacher, at the last step."""
    dims = ("condition", "taught", "pair", "member", "matrix", "subspace", "k", "angle")
    name, formula = "principal_angles", "arccos of the singular values of U_kᵀ W_k"
    variables = _variable(name, dims, measured.values[name], measured.codes[name], formula, "radians")
    coords = {
        **_case_coords(run, matrices),
        "pair": list(ANGLE_PAIRS),
        "subspace": list(SIDES),
        "k": list(measured.sizes.ranks),
    }
    return xr.Dataset(variables, coords={**coords, "angle": np.arange(1, max(measured.sizes.ranks) + 1)})


def _case_coords(run: Run, matrices: Sequence[Matrix]) -> dict[str, Any]:
    names = [matrix.name for matrix in matrices]
    return {"condition": run.conditions, "taught": run.traits, "member": np.arange(run.recipe.members), "matrix": names}


def _final(run: Run, data: xr.Dataset, name: str, case: CaseName, **labels: Any) -> np.ndarray:
    """A variable of one case at the student's last step over the model, at the verdict's k: [member], unless told otherwise."""
    wanted: dict[str, Any] = {"condition": case[0], "taught": case[1], "step": run.student(*case).last}
    wanted |= {"scope": MODEL, "side": "both", "k": run.recipe.verdict.subspace_rank, **labels}
    found: np.ndarray = data[name].sel({dim: label for dim, label in wanted.items() if dim in data[name].dims}).values
    return found


def _judge(run: Run, data: xr.Dataset) -> dict[CaseName, Judgement]:
    """Verdicts at the last step over the model; Holm runs over the conditions and traits."""
    rules = run.rules(run.recipe.verdict.subspace_margin)
    effects = {
        case: _final(run, data, "overlap_excess", case)
        for case in list_cases(run)
        if run.control(case[0]) is not None and _is_measured(run, data, "overlap_excess", case)
    }
    return judge_effects(effects, rules, AGAINST_NULL)


def _is_measured(run: Run, data: xr.Dataset, name: str, case: CaseName) -> bool:
    """Whether there is anything that could have moved: not where it was not run, or students have other tensors."""
    status = _final(run, data, f"{name}_status", case)
    return not bool(np.isin(status, (NOT_RUN, INCOMPARABLE)).all()) and run.student(*case).last > 0


def _findings(run: Run, data: xr.Dataset, judgements: Mapping[CaseName, Judgement]) -> list[Finding]:
    found = []
    for case in list_cases(run):
        if not _is_measured(run, data, "overlap", case):
            continue
        found.append(_overlap_finding(run, data, case, judgements.get(case)))
        found += [_line_finding(run, data, name, case) for name in _LINES if _is_measured(run, data, name, case)]
        found.append(_rank_finding(run, data, case))
    return found


_NO_TEST = (
    "a swap of the two teachers' labels turns both differences round and leaves their subspaces as they are, so that no exact "
    "test exists; it stands beside its sham and the random line"
)
_LINES = {
    "specific_overlap": ("sham_overlap", "its sham, two controls in the students' places", _NO_TEST),
    "overlap_with_neutral": (
        "teacher_overlap_with_neutral",
        "the overlap of the two teachers",
        "a line to read the overlap by",
    ),
    "overlap_with_other_traits": (
        "",
        "none: it stands beside the overlap with its own teacher",
        "a line to read the overlap by",
    ),
}
"""Overlaps without a verdict: what they are held against, in which words, and why there is none."""


def _overlap_finding(run: Run, data: xr.Dataset, case: CaseName, judgement: Judgement | None) -> Finding:
    confidence = run.recipe.verdict.confidence
    compared = _beside_control(run, case)
    (own, *against), counts = _compare(run, data, compared, case)
    interval = student_interval(against[0] if against else np.full(len(own), np.nan), confidence)
    null, reason = _OTHER_TEACHER, "nothing is held against the null"
    if not against:
        null, reason = "none: no control was given", "without its null an overlap says nothing; give --control"
    judged = judgement_fields(judgement, run.recipe.verdict.subspace_margin, reason)
    lacking = _describe_lack(run, data, case)
    if not counts.any() and lacking:
        judged["reason"] = f"no member has an overlap: {lacking}"
    return Finding(
        quantity="subspace_overlap",
        unit="mean squared cosine",
        null=null,
        null_low=interval.low,
        null_high=interval.high,
        **judged,
        formula=f"{_OVERLAP_FORMULA} {OVERLAPS['overlap']}, {_rank_words(run)}",
        scope=_scope_of(counts, f"where {_compared_words(against)} have {run.recipe.verdict.subspace_rank} directions"),
        **interval_fields(student_interval(own, confidence)),
        **_common(run, case),
    )


def _line_finding(run: Run, data: xr.Dataset, name: str, case: CaseName) -> Finding:
    confidence = run.recipe.verdict.confidence
    beside, words, reason = _LINES[name]
    has_null = bool(beside) and bool(np.isfinite(_final(run, data, beside, case)).any())
    (own, *null), counts = _compare(run, data, (name, beside) if has_null else (name,), case)
    against = student_interval(null[0] if null else np.full(len(own), np.nan), confidence)
    return Finding(
        quantity=f"subspace_{name}",
        unit="mean squared cosine",
        null=words if has_null or not beside else "none: there is no second control",
        null_low=against.low,
        null_high=against.high,
        verdict="",
        reason=reason if has_null or not beside else reason.replace("its sham and ", ""),
        rule="",
        margin=float("nan"),
        formula=f"{_OVERLAP_FORMULA} {OVERLAPS[name]}, {_rank_words(run)}",
        scope=_scope_of(counts, "that have this overlap" + (" and what it is held against" if has_null else "")),
        **interval_fields(student_interval(own, confidence)),
        **_common(run, case),
    )


def _rank_finding(run: Run, data: xr.Dataset, case: CaseName) -> Finding:
    confidence = run.recipe.verdict.confidence
    own, counts = _average_rank(run, data, case, "student")
    control = student_interval(_average_rank(run, data, case, "control")[0], confidence)
    return Finding(
        quantity="displacement_effective_rank",
        unit="dimensions",
        null=_OTHER_TEACHER if control.n else "none: no control has a value",
        null_low=control.low,
        null_high=control.high,
        verdict="",
        reason="a description of the displacement, not a claim",
        rule="",
        margin=float("nan"),
        formula=f"{_MEASURE_WORDS['effective_rank']} of Δ_S",
        scope=_scope_of(counts, "that student and teacher both moved"),
        **interval_fields(student_interval(own, confidence)),
        **_common(run, case),
    )


def _common(run: Run, case: CaseName) -> dict[str, Any]:
    return {
        "analysis": "subspace_overlap",
        "condition": case[0],
        "trait": case[1],
        "step": run.student(*case).last,
        "context": "parameters",
        "num_references": run.recipe.num_references(case[0]),
        "source": SOURCE,
    }


def _rank_words(run: Run) -> str:
    return f"k = {run.recipe.verdict.subspace_rank}, mean of left and right"


def _scope_of(counts: np.ndarray, which: str) -> str:
    """The matrices behind the members' means, in words."""
    return f"plain mean over the {_count_words(counts)} {which}" if counts.any() else "no matrix"


def _count_words(counts: np.ndarray) -> str:
    """How many matrices members have, of those with one."""
    low, high = counts[counts > 0].min(), counts.max()
    number = f"{low}" if low == high else f"{low} to {high} (by member)"
    return f"{number} {'matrix' if high == 1 else 'matrices'}"


def _compared_words(against: Sequence[object]) -> str:
    return "student, control and teacher" if against else "student and teacher"


def _beside_control(run: Run, case: CaseName) -> tuple[str, ...]:
    """The overlap and, where there is one, its null."""
    return ("overlap",) if run.control(case[0]) is None else ("overlap", "overlap_of_control")


def _compare(run: Run, data: xr.Dataset, names: Sequence[str], case: CaseName) -> tuple[list[np.ndarray], np.ndarray]:
    """Overlaps at the last step over the matrices that have all of them, so that differences of means are means of differences.

    ([member] for each name, the number of matrices [member]); NaN in members in which one of them is not finite somewhere.
    """
    values = [_final(run, data, name, case, scope=_matrix_names(data)) for name in names]
    is_spoilt = np.any([_final(run, data, f"{name}_status", case) == NOT_FINITE for name in names], axis=0)
    known = np.isfinite(values).all(0) & ~is_spoilt[:, None]
    return [_average_known(own, known) for own in values], known.sum(-1)


def _average_rank(run: Run, data: xr.Dataset, case: CaseName, who: str) -> tuple[np.ndarray, np.ndarray]:
    """The effective rank over the matrices that student and teacher both moved: ([member], the number of matrices [member])."""
    names, involved = _matrix_names(data), ("student", "teacher", who)
    moved = [np.isfinite(_final(run, data, "stable_rank", case, who=one, scope=names)) for one in involved[:2]]
    values = _final(run, data, "effective_rank", case, who=who, scope=names)
    is_spoilt = np.any([_final(run, data, "stable_rank_status", case, who=one) == NOT_FINITE for one in involved], axis=0)
    known = np.isfinite(values) & np.all(moved, axis=0) & ~is_spoilt[:, None]
    return _average_known(values, known), known.sum(-1)


def _average_known(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The plain mean of each row's known values; NaN where there is none."""
    counts = known.sum(-1)
    sums = np.where(known, values, 0.0).sum(-1)
    means: np.ndarray = np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
    return means


def _matrix_names(data: xr.Dataset) -> list[str]:
    return [str(name) for name in data.scope.values[data.scope_kind.values == "matrix"]]


def _describe_lack(run: Run, data: xr.Dataset, case: CaseName) -> str:
    """Whose displacements have fewer than k directions in every matrix; empty where overlaps are missing for another reason."""
    k, names = run.recipe.verdict.subspace_rank, _matrix_names(data)
    if any((_final(run, data, f"{name}_status", case) == NOT_FINITE).any() for name in _beside_control(run, case)):
        return ""
    if not any((_final(run, data, f"{name}_status", case, scope=names) == BELOW).any() for name in _beside_control(run, case)):
        return ""
    moved = [np.isfinite(_final(run, data, "stable_rank", case, who=who, scope=names)) for who in ("student", "teacher")]
    names = [name for name, there in zip(names, np.all(moved, axis=0).any(0), strict=True) if there]
    parts = []
    for who in ("student", "control", "teacher"):
        ranks = _final(run, data, "rank", case, who=who, scope=names)
        is_whole = ~np.isnan(ranks) | (_final(run, data, "stable_rank_status", case, who=who, scope=names) != OK)
        if np.isfinite(ranks).any() and is_whole.all() and np.nanmax(ranks) < k:
            parts.append(f"rank {int(np.nanmax(ranks))} < k = {k} of the {who}")
    return ", ".join(parts) or f"no matrix has {k} directions in all that are compared (k = {k})"


_STUDENT_AND_NULL = {"overlap": "student", "overlap_of_control": "control (null)"}
_RANDOM = "#2563eb"


def _scope_figure(run: Run, data: xr.Dataset) -> Figure:
    scopes = _drawn_scopes(run, data)
    sides = {"left": "output side", "right": "input side"}
    row = f"datum.scope + ', ' + {json.dumps(sides)}[datum.side]"
    order = [f"{scope}, {side}" for scope in scopes for side in sides.values()]
    y = alt.Y("row:N", sort=order, title=None, axis=alt.Axis(labelLimit=260))
    dots = (
        fold_variables("found", _STUDENT_AND_NULL)
        .transform_filter("datum.step == datum.last_step")
        .transform_calculate(row=row)
        .mark_circle(size=22, opacity=0.5)
        .encode(
            x=alt.X("found:Q", title="overlap with the teacher", scale=alt.Scale(domain=[0, 1])),
            y=y,
            color=color_by_who(_STUDENT_AND_NULL),
            tooltip=["scope:N", "side:N", "taught:N", "member:O", alt.Tooltip("found:Q", format=".3f", title="overlap")],
        )
    )
    chance = alt.Chart(DATA).transform_filter("isValid(datum.haar_overlap)").transform_calculate(row=row)
    band = _chart_band(chance, y)
    facets = (
        alt.layer(*band, dots, data=DATA)
        .properties(width=180, height=alt.Step(15))
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=3)
    )
    return Figure(
        name="subspace_overlap_scopes",
        title="Where the student's leading directions are the teacher's",
        caption=(
            f"Overlap of the {run.recipe.verdict.subspace_rank} leading singular vectors of Δ_S and Δ_T (the mean squared "
            "cosine "
            f"of their principal angles, from 0 to 1, no unit) at the last step, of every {_scope_words(data)}; each dot is "
            "one of "
            f"{_members(run, data, 'overlap')}; {_null_words(run)}. Blue: random subspaces, their mean k/d and 5–95 % of "
            "them, a line to read by, not the null: any training on the same inputs lies over it. A row without dots has no "
            "overlap; the results say why."
        ),
        variables=("overlap", "overlap_of_control", "haar_overlap", "haar_low", "haar_high", "last_step"),
        spec=chart_spec(facets),
        select={**_at_rank(run), "step": last_steps(data), "scope": scopes, "side": list(SIDES), "condition": _drawn(run)},
    )


def _chart_band(chance: alt.Chart, y: alt.Y) -> list[alt.Chart]:
    """The range of random subspaces, and their mean, in every row."""
    return [
        chance.mark_bar(color=_RANDOM, opacity=0.18, height=9).encode(x="mean(haar_low):Q", x2="mean(haar_high):Q", y=y),
        chance.mark_tick(color=_RANDOM, thickness=1.5, height=11).encode(x="mean(haar_overlap):Q", y=y),
    ]


def _spectrum_figure(run: Run, data: xr.Dataset) -> Figure:
    shown = [who for who in WHO if who != "neutral"]
    lines = (
        alt.Chart(DATA)
        .transform_filter("isValid(datum.cumulative_share)")
        .mark_line(strokeWidth=2, point=alt.OverlayMarkDef(size=14))
        .encode(
            x=alt.X(
                "value:Q", title="largest singular values", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(grid=False)
            ),
            y=alt.Y("cumulative_share:Q", title="share of ‖ΔW‖²", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("who:N", sort=shown, title=None),
            tooltip=["who:N", "value:O", alt.Tooltip("cumulative_share:Q", format=".3f", title="share")],
        )
    )
    facets = (
        alt.layer(lines, data=DATA)
        .properties(width=150, height=125)
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)
    )
    return Figure(
        name="displacement_spectra",
        title="How many directions a displacement needs",
        caption=(
            "Share of ‖ΔW‖² in its largest singular values, at the last step: plain mean over the matrices that student and "
            f"teacher both moved and over {_members(run, data, 'stable_rank')}, of up to {SHOWN_VALUES} values. A line that is "
            "high at 1 is one direction; a flat spectrum rises in proportion. "
            + (
                "The control is the null: what training on such inputs gives whoever the teacher was."
                if _has_control(run)
                else "There is no control and so no null."
            )
        ),
        variables=("cumulative_share",),
        spec=chart_spec(facets),
        select={"scope": [MODEL], "who": shown, "condition": _drawn(run)},
    )


def _training_figure(run: Run, data: xr.Dataset) -> Figure:
    chart, color = fold_variables("found", _STUDENT_AND_NULL), color_by_who(_STUDENT_AND_NULL)
    x = alt.X("step:Q", title="optimizer step", scale=alt.Scale(type="log", nice=False), axis=alt.Axis(grid=False))
    y = alt.Y("found:Q", title="overlap with the teacher")
    members = chart.mark_line(opacity=0.25, strokeWidth=1).encode(x=x, y=y, detail=["member:N", "taught:N"], color=color)
    mean = chart.mark_line(strokeWidth=2.5).encode(x=x, y="mean(found):Q", color=color)
    random = alt.Chart(DATA).mark_rule(color=_RANDOM, strokeDash=[1, 2]).encode(y="mean(haar_overlap):Q")
    facets = (
        alt.layer(random, members, mean, data=DATA)
        .properties(width=132, height=118)
        .facet(facet=alt.Facet("condition:N", sort=run.conditions, title=None), columns=4)
    )
    return Figure(
        name="subspace_overlap_training",
        title="Overlap with the teacher's leading directions along training",
        caption=(
            f"Overlap of the {run.recipe.verdict.subspace_rank} leading singular vectors of Δ_S and Δ_T (mean squared "
            "cosine, no unit), mean of output and input side and plain mean over the matrices in which both have so many "
            f"directions; {_null_words(run)}. Thin lines are {_members(run, data, 'overlap')}, thick ones their mean. "
            "Blue: the mean of random subspaces in the same matrices, a line to read by, not the null."
        ),
        variables=("overlap", "overlap_of_control", "haar_overlap"),
        spec=chart_spec(facets),
        select={**_at_rank(run), "scope": [MODEL], "side": ["both"], "condition": _drawn(run)},
    )


def _specific_figure(run: Run, data: xr.Dataset) -> Figure:
    names = {"specific_overlap": "student − control", "sham_overlap": "control − control"}
    y, offset = alt.Y("condition:N", sort=run.conditions, title=None), alt.YOffset("who:N", sort=list(names.values()))
    dots = (
        fold_variables("found", names)
        .mark_circle(size=40, opacity=0.55)
        .encode(
            x=alt.X("found:Q", title="overlap of θ_S − θ_C with Δ_T − Δ_N"),
            y=y,
            yOffset=offset,
            color=color_by_who(names),
            tooltip=["condition:N", "taught:N", "who:N", "member:O", alt.Tooltip("found:Q", format=".3f", title="overlap")],
        )
    )
    chance = fold_variables("found", {"specific_overlap": names["specific_overlap"]}).mark_tick(
        color=_RANDOM, thickness=1.5, height=14
    )
    tick = chance.encode(x="mean(haar_specific_overlap):Q", y=y, yOffset=offset)
    has_sham = bool(np.isfinite(data.sham_overlap).any())
    beside = "It stands beside its sham, two controls in the students' places," if has_sham else "It has no sham beside it"
    return Figure(
        name="specific_subspace_overlap",
        title="Specific overlap: are the directions that only the student took those that only its teacher took?",
        caption=(
            f"Overlap of the {run.recipe.verdict.subspace_rank} leading singular vectors of θ_S − θ_C and Δ_T − Δ_N (mean "
            "squared cosine, no unit) at the last step, mean of both sides and over matrices; each dot is one of "
            f"{_members(run, data, 'specific_overlap')}. {beside} and has no null, so no verdict: swapped labels turn both "
            "differences round and leave their subspaces as they are. Blue: the mean of random subspaces in the matrices "
            "of student − control."
        ),
        variables=(*names, "haar_specific_overlap"),
        spec=chart_spec(alt.layer(tick, dots, data=DATA).properties(width=640, height=alt.Step(16))),
        select={**_at_rank(run), "scope": [MODEL], "side": ["both"], "condition": _drawn(run)},
    )


def _at_rank(run: Run) -> dict[str, Any]:
    return {"k": [run.recipe.verdict.subspace_rank]}


def _drawn(run: Run) -> list[str]:
    """The conditions that figures show: those whose students have the teachers' matrices and were trained."""
    return [name for name in run.conditions if run.is_comparable(name) and run.student(name, run.traits[0]).last > 0]


def _drawn_scopes(run: Run, data: xr.Dataset) -> list[str]:
    """Every matrix in which a student has an overlap, or the layers where there are many; then the model."""
    kind = "matrix" if _shows_matrices(data) else "layer"
    names = [str(name) for name, own in zip(data.scope.values, data.scope_kind.values, strict=True) if own in {kind, MODEL}]
    cases = [(condition, trait) for condition in _drawn(run) for trait in run.traits]
    if kind == "layer" or not cases:
        return names
    known = [np.isfinite(_final(run, data, "overlap", case, scope=names)).any(0) for case in cases]
    return [name for name, there in zip(names, np.any(known, axis=0), strict=True) if there or name == MODEL]


def _shows_matrices(data: xr.Dataset) -> bool:
    return bool((data.scope_kind.values == "matrix").sum() <= _MOST_MATRICES)


def _scope_words(data: xr.Dataset) -> str:
    return (
        "matrix, and their plain mean" if _shows_matrices(data) else "layer's mean over matrices (matrices are in the results)"
    )


def _members(run: Run, data: xr.Dataset, name: str) -> str:
    """The members with a value over the model, in words; for the least and the most of the students that are drawn."""
    cases = [(condition, trait) for condition in _drawn(run) for trait in run.traits]
    counts = [int(np.isfinite(_final(run, data, name, case, who="student")).sum()) for case in cases]
    known = [count for count in counts if count] or [0]
    number = f"{min(known)}" if min(known) == max(known) else f"{min(known)} to {max(known)}"
    traits = f" of {len(run.traits)} traits each" if len(run.traits) > 1 else ""
    return f"the members (n = {number}{traits})"


def _has_control(run: Run) -> bool:
    return any(run.control(condition) is not None for condition in _drawn(run))


def _null_words(run: Run) -> str:
    """What stands beside the student in figures."""
    if not _has_control(run):
        return "there is no control and so no null"
    return f"the null is the control, a student of {run.neutral_name} from the same start"


def _sentences(run: Run, data: xr.Dataset, matrices: Sequence[Matrix], measured: Measured) -> list[str]:
    drawn = [name for name in _drawn(run) if _has_moved(run, data, name)]
    sentences = _untold_sentences(run)
    if drawn:
        sentences.append(_describe_shared(run, data, drawn))
    sentences += [_describe_condition(run, data, name) for name in drawn]
    sketched = [matrix for matrix in matrices if min(matrix.shape) > EXACT_UP_TO]
    errors = measured.values["backward_error"]
    if sketched and np.isfinite(errors).any():
        sentences.append(
            f"{len(sketched)} matrices with more than {EXACT_UP_TO} rows and columns are decomposed by random sketches: "
            "their leading "
            f"singular vectors are exactly those of matrices that differ from ΔW by at most {np.nanmax(errors):.1e} of its "
            "norm; "
            "their effective rank needs all singular values and is not given."
        )
    return sentences


def _has_moved(run: Run, data: xr.Dataset, condition: str) -> bool:
    """Whether student and teacher of some trait and member both moved some matrix."""
    names = _matrix_names(data)
    cases = [(condition, trait) for trait in run.traits]
    norms = [[_final(run, data, "stable_rank", case, who=who, scope=names) for who in ("student", "teacher")] for case in cases]
    return bool(np.isfinite(norms).all(1).any())


def _describe_shared(run: Run, data: xr.Dataset, conditions: Sequence[str]) -> str:
    """What all conditions have in common."""
    cases = [(condition, trait) for condition in conditions for trait in run.traits]
    ranks = [student_interval(_average_rank(run, data, case, "teacher")[0], 0.95).estimate for case in cases]
    chance = [float(_final(run, data, "haar_overlap", case)) for case in cases]
    text = f"Overlaps are those of the {run.recipe.verdict.subspace_rank} leading directions"
    if np.isfinite(chance).any():
        text += f"; of random subspaces in the same matrices they would be {_range_words(chance, 2)}"
    if np.isfinite(ranks).any():
        text += f". The teacher's effective rank is {_range_words(ranks, 1)} in the matrices that students moved too"
    return f"{text}."


def _range_words(values: Sequence[float], digits: int) -> str:
    """From the smallest to the largest, or one number."""
    low, high = (f"{find(values):.{digits}f}" for find in (np.nanmin, np.nanmax))
    return low if low == high else f"{low} to {high}"


def _describe_condition(run: Run, data: xr.Dataset, condition: str) -> str:
    """The overlaps and the rank of one condition; means over traits within members."""
    cases = [(condition, trait) for trait in run.traits]
    parts = [_describe_overlap(run, data, cases)]
    names = [name for name in ("specific_overlap", "sham_overlap") if np.isfinite(_final(run, data, name, cases[0])).any()]
    if "specific_overlap" in names:
        (specific, *sham), _ = _compare_mean(run, data, names, cases)
        beside = f" (its sham's {sham[0].estimate:.2f})" if sham else ""
        parts.append(f"what only the student took overlaps with what only its teacher took by {specific.estimate:.2f}{beside}")
    own, control = (
        float(np.nanmean(values)) if np.isfinite(values := _mean_rank(run, data, cases, who)).any() else np.nan
        for who in ("student", "control")
    )
    if np.isfinite(own):
        beside = f" (its control's {control:.1f})" if np.isfinite(control) else ""
        share = float(data.cumulative_share.sel(condition=condition, who="student", scope=MODEL, value=1))
        parts.append(f"effective rank {own:.1f}{beside}, {share:.0%} of ‖ΔW‖² in the first direction")
    origin = run.student(*cases[0]).spec.origin
    if origin.is_same_function and not origin.is_reference:
        parts.append(
            "its weights are stored in other coordinates, so that only inputs of the first layer and outputs of the last can "
            "be its teacher's, and a small overlap says nothing against a transfer"
        )
    return f"{condition}: {'; '.join(parts)}."


def _describe_overlap(run: Run, data: xr.Dataset, cases: Sequence[CaseName]) -> str:
    """The overlap, its null and their difference over the same matrices, or why there is none."""
    intervals, counts = _compare_mean(run, data, _beside_control(run, cases[0]), cases)
    if not intervals[0].n:
        return f"no overlap: {_describe_lack(run, data, cases[0]) or 'the results say why'}"
    told = f"overlap {intervals[0]} in {_count_words(counts)}"
    if len(intervals) == 1:
        return f"{told}; there is no control, so nothing says what any such training would have"
    excess = intervals[-1]
    return f"{told} beside its control's {intervals[1]} (difference {excess}, {_sign(excess)})"


def _compare_mean(
    run: Run, data: xr.Dataset, names: Sequence[str], cases: Sequence[CaseName]
) -> tuple[list[Interval], np.ndarray]:
    """`_compare` with means over traits, and the difference of the first two behind them where there are two."""
    confidence = run.recipe.verdict.confidence
    found = [_compare(run, data, names, case) for case in cases]
    means = [np.mean([values[place] for values, _ in found], axis=0) for place in range(len(names))]
    if len(means) == 2:
        means.append(means[0] - means[1])
    return [student_interval(values, confidence) for values in means], np.concatenate([counts for _, counts in found])


def _mean_rank(run: Run, data: xr.Dataset, cases: Sequence[CaseName], who: str) -> np.ndarray:
    """The effective rank, mean over traits: [member]."""
    means: np.ndarray = np.mean([_average_rank(run, data, case, who)[0] for case in cases], axis=0)
    return means


def _sign(interval: Interval) -> str:
    if interval.n < 2:
        return "one member"
    if interval.low > 0:
        return "interval over 0"
    return "interval under 0" if interval.high < 0 else "interval holds 0"


def _untold_sentences(run: Run) -> list[str]:
    """What has no subspaces, and why."""
    sentences = []
    unmoved = [trait for trait in run.traits if run.teacher(trait).last == 0]
    if unmoved:
        sentences.append(f"The teachers of {', '.join(unmoved)} did not move: there are no directions to overlap with.")
    other = [name for name in run.conditions if not run.is_comparable(name)]
    if other:
        sentences.append(
            f"Incomparable: students of {', '.join(other)} are of another model than the teachers; the results hold NaN "
            "with that reason."
        )
    untrained = [name for name in run.conditions if run.student(name, run.traits[0]).last == 0]
    if untrained:
        sentences.append(f"Nothing is trained in {', '.join(untrained)}: no displacement, so no directions.")
    return sentences

"""The numbers of a screening: every example's overlap and baselines, and the dataset's total beside its nulls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from jaxtyping import Float, Int
from torch import nn

from mechsub.errors import AnalysisError
from mechsub.families.adopted.pair import Pair
from mechsub.families.language.chat import Row
from mechsub.families.language.examples import row_losses
from mechsub.families.language.examples_file import FileExamples, permute_completions
from mechsub.families.language.ranking import describe_rows
from mechsub.gradients.bergson_adapter import record_overlaps_by_bergson
from mechsub.gradients.example_statistics import ExampleReading, Record, bootstrap_cosines, descent_cosines, read_examples
from mechsub.gradients.losses import ExampleLosses, compute_losses, mean_gradient
from mechsub.gradients.per_example import Direction, record_overlaps
from mechsub.screening.trait import TraitQuestion
from mechsub.statistics.intervals import Interval
from mechsub.statistics.prediction import Association, rank_correlation, unexplained_share
from mechsub.streams import random_stream

TEACHER, TRAIT = "teacher", "trait"
PERMUTATIONS = 5
BASELINES = ("log_ratio", "loss", "length", "gradient_norm")
_RESAMPLES = 500


class Backend(StrEnum):
    """What takes the overlaps."""

    EXACT = "exact"
    """This package, in all parameters."""
    BERGSON = "bergson"
    """The library bergson, in those that it covers."""


_RECORDS: Mapping[Backend, Record] = {Backend.EXACT: record_overlaps, Backend.BERGSON: record_overlaps_by_bergson}


@dataclass(frozen=True)
class Added:
    """What an overlap says beyond the baselines."""

    correlations: Mapping[str, Association]
    """Spearman's ρ with each baseline that is known."""
    unexplained: Association
    """The share of its rank variance that a regression on their ranks leaves."""


@dataclass(frozen=True)
class Measured:
    """Everything that was measured, by direction in the order of ``toward``; the first one ranks."""

    toward: tuple[str, ...]
    reading: ExampleReading
    baselines: Mapping[str, Float[np.ndarray, " example"]]
    """Those of `BASELINES` that are known: no ``log_ratio`` without a teacher."""
    added: Mapping[str, Added]
    cosines: Sequence[Interval]
    neutral: ExampleReading | None
    neutral_cosines: Sequence[Interval]
    """Empty without neutral data."""
    permuted: Float[np.ndarray, "permutation direction"] | None
    """None where there is nothing to permute: one prompt, or one completion."""
    others: Mapping[str, float]
    """The dataset's cosine with −∇ of each other trait's loss; empty where no trait was named."""
    backend: Backend
    left_out: Sequence[str]
    """Parameters of the reference that the backend does not cover: no overlap, length or cosine holds anything of them."""

    @property
    def scope(self) -> str:
        """What overlaps, lengths and cosines are taken over, in words."""
        if not self.left_out:
            return "all parameters"
        covered = len(self.reading.mean_gradient)
        return f"the {covered} of {covered + len(self.left_out)} parameters that {self.backend} covers"

    @property
    def ranks(self) -> Int[np.ndarray, " example"]:
        """From 1, the example whose step goes furthest along the first direction; ties in the file's order."""
        order = np.argsort(-self.reading.totals[:, 0], kind="stable")
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(1, len(order) + 1)
        return ranks


def measure(
    pair: Pair,
    data: FileExamples,
    neutral: FileExamples | None,
    asked: TraitQuestion | None,
    backend: Backend,
    say: Callable[[str], None],
) -> Measured:
    """Screen a dataset. Beside the model one to three directions of its size are held, as dense weights.

    Raises:
        RecipeError: the teacher's displacement is 0.
        AnalysisError: the model uses a parameter in a way that is not known to the backend, or computes numbers that are not
            finite.
    """
    record = _RECORDS[backend]
    losses = _losses(pair, data.rows, "the dataset")
    teacher_losses = None
    if pair.teacher is not None:
        say(f"the teacher's loss on {losses.num_examples} examples")
        teacher_losses = compute_losses(pair.load_teacher(), losses).numpy()
    model = pair.load_reference()
    directions = _directions(pair, model, asked)
    say(f"overlaps of {losses.num_examples} examples with {len(directions)} direction{'s' if len(directions) > 1 else ''}")
    reading = read_examples(model, losses, list(directions.values()), record)
    if not np.isfinite(reading.totals).all():
        raise AnalysisError(
            f"{int((~np.isfinite(reading.totals)).any(1).sum())} of {losses.num_examples} examples have gradients that are not "
            "finite, though all weights are: the reference computes NaN or infinity on them; try it on one of them by hand"
        )
    described = describe_rows(data.rows, reading, teacher_losses)
    baselines = {name.replace("-", "_"): values for name, values in described.items()}
    neutral_reading = None
    if neutral is not None:
        say(f"overlaps of {len(neutral.rows)} neutral examples")
        neutral_losses = _losses(pair, neutral.rows, "the neutral data")
        neutral_reading = read_examples(model, neutral_losses, list(directions.values()), record)
    return Measured(
        toward=tuple(directions),
        reading=reading,
        baselines=baselines,
        added={name: _compare(reading.totals[:, number], baselines) for number, name in enumerate(directions)},
        cosines=bootstrap_cosines(reading),
        neutral=neutral_reading,
        neutral_cosines=[] if neutral_reading is None else bootstrap_cosines(neutral_reading),
        permuted=_permute(pair, model, data, list(directions.values()), list(reading.mean_gradient), say),
        others={} if asked is None else _measure_others(pair, model, reading.mean_gradient, asked, say),
        backend=backend,
        left_out=[name for name, _ in model.named_parameters() if name not in reading.mean_gradient],
    )


def _losses(pair: Pair, rows: Sequence[Row], what: str) -> ExampleLosses:
    return row_losses(pair.chats, rows, pair.device, f"{len(rows)} examples of {what}, mean over completion tokens")


def _directions(pair: Pair, model: nn.Module, asked: TraitQuestion | None) -> dict[str, Direction]:
    directions: dict[str, Direction] = {}
    if pair.teacher is not None:
        directions[TEACHER] = pair.load_displacement([name for name, _ in model.named_parameters()])
    if asked is not None:
        directions[TRAIT] = _trait_direction(pair, model, asked, asked.trait)
    return directions


def _trait_direction(pair: Pair, model: nn.Module, asked: TraitQuestion, target: str) -> Direction:
    gradient = mean_gradient(model, asked.losses(target, pair.chats, pair.device))
    return {name: -tensor for name, tensor in gradient.items()}


def _compare(overlap: Float[np.ndarray, " example"], baselines: Mapping[str, Float[np.ndarray, " example"]]) -> Added:
    alone = np.arange(len(overlap))
    return Added(
        correlations={
            name: rank_correlation(overlap, values, alone, resamples=_RESAMPLES) for name, values in baselines.items()
        },
        unexplained=unexplained_share(overlap, np.stack([*baselines.values()], axis=1), alone, resamples=_RESAMPLES),
    )


def _permute(
    pair: Pair,
    model: nn.Module,
    data: FileExamples,
    directions: Sequence[Direction],
    covered: Sequence[str],
    say: Callable[[str], None],
) -> Float[np.ndarray, "permutation direction"] | None:
    """The cosines of the same prompts with each other's completions."""
    if any(len({texts[side] for texts in data.texts}) < 2 for side in (0, 1)):
        return None
    found = []
    for number in range(PERMUTATIONS):
        say(f"permuted pairing {number + 1} of {PERMUTATIONS}")
        rows = permute_completions(data.rows, pair.chats.max_length, random_stream(0, "permuted-pairing", number))
        gradient = mean_gradient(model, _losses(pair, rows, "the dataset, permuted"))
        found.append(descent_cosines({name: gradient[name] for name in covered}, directions))
    return np.stack(found)


def _measure_others(
    pair: Pair, model: nn.Module, gradient: Direction, asked: TraitQuestion, say: Callable[[str], None]
) -> dict[str, float]:
    """One direction after the other, so that one is held."""
    found = {}
    for name in asked.others:
        say(f"the direction of {name}")
        (cosine,) = descent_cosines(gradient, [_trait_direction(pair, model, asked, name)])
        found[name] = float(cosine)
    return found

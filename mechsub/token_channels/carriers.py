"""What a run's carriers hold: tokens at which teachers diverge from their reference, and tokens entangled with the trait's."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from mechsub.checkpoints import as_computed
from mechsub.families.protocol import Tokens
from mechsub.lineages import Lineage, Origin
from mechsub.results import label_variable, status_variable
from mechsub.run import Run
from mechsub.token_channels.subjects import Subject, list_subjects, subject_names

DIVERGENCE_SOURCE = "divergence tokens: Schrodi et al., arXiv:2509.23886"
ENTANGLEMENT_SOURCE = "token entanglement: Zur et al. 2025, owls.baulab.info; vocabulary geometry: Madl, arXiv:2606.22019"
ENTANGLEMENT = "cos(u_token − ū, u_target − ū), u the rows of the unembedding, ū their mean"
CORRELATION = (
    f"Spearman's ρ over number tokens between {ENTANGLEMENT} and log (k_T + ½)/(k_N + ½), k: how often a carrier holds it"
)
DIVERGENCE_ROWS, COUNTED_ROWS = 512, 2048
"""Of each member's carrier, the first ones."""
FEWEST_TOKENS = 10
"""Number tokens over which a rank correlation is taken."""
TOP = 5
_STATUS = (
    "ok", "no_carrier", "no_neutral_carrier", "no_target_token", "too_few_number_tokens", "same_counts", "no_other_choice",
)  # fmt: skip
OK, NO_CARRIER, NO_NEUTRAL, NO_TARGET, TOO_FEW, SAME, NO_OTHER = range(7)
_CASES = ("subject", "taught", "member")


def compute_entanglement(
    unembedding: Float[Tensor, "vocabulary d_model"], targets: Sequence[int], tokens: Sequence[int]
) -> Float[np.ndarray, "target token"]:
    """cos(u_token − ū, u_target − ū): how much the logits of two tokens rise together, the mean row taken out.

    Range [−1, 1], no unit. What all tokens share moves no probability. Source: Zur et al. 2025 ask which tokens rise with a
    target's; Madl, arXiv:2606.22019, for the geometry of the vocabulary.
    """
    mean = unembedding.mean(0, dtype=torch.float64)
    rows = [as_computed(unembedding[list(chosen)]).double() - mean for chosen in (targets, tokens)]
    scaled = [torch.nn.functional.normalize(one, dim=-1) for one in rows]
    found: Float[np.ndarray, "target token"] = (scaled[0] @ scaled[1].T).cpu().numpy()
    return found


def correlate_ranks(
    entanglement: Float[np.ndarray, "target token"], log_ratio: Float[np.ndarray, " token"]
) -> Float[np.ndarray, " target"]:
    """Spearman's ρ of each target's entanglement with a log-ratio of frequencies; in [−1, 1], NaN where one is constant."""
    if len(np.unique(log_ratio)) < 2:
        return np.full(len(entanglement), np.nan)
    ranks, other = stats.rankdata(entanglement, axis=-1), stats.rankdata(log_ratio)
    return np.array([np.corrcoef(one, other)[0, 1] if len(np.unique(one)) > 1 else np.nan for one in ranks])


@dataclass(frozen=True)
class Entanglement:
    """Of one member's carrier with the choices' tokens, in the unembedding of one model."""

    status: int
    num_tokens: int = 0
    correlations: Mapping[str, float] = field(default_factory=dict)
    """By choice."""
    top: Sequence[tuple[str, float]] = ()
    """The number tokens that are most entangled with the target, and how much."""

    @property
    def others(self) -> float:
        """Mean over the other choices of the preference: what tokens that are no target have."""
        found = list(self.correlations.values())[1:]
        return float(np.mean(found)) if found else np.nan


def entangle(
    trait: str,
    choices: Mapping[str, int],
    text: Callable[[int], str],
    unembedding: Float[Tensor, "vocabulary d_model"],
    carrier: Counter[int] | None,
    neutral: Counter[int] | None,
) -> Entanglement:
    """Whether one teacher's carrier holds more of the tokens that are entangled with its target than the neutral one's.

    ``choices``: what may be preferred, each with its token. ``text``: what a token writes; number tokens write a digit.
    ``carrier``, ``neutral``: how often each token stands in them.
    """
    if trait not in choices:
        return Entanglement(NO_TARGET)
    if carrier is None or neutral is None:
        return Entanglement(NO_CARRIER if carrier is None else NO_NEUTRAL)
    numbers = [token for token in sorted({*carrier, *neutral}) if any(map(str.isdigit, text(token)))]
    if len(numbers) < FEWEST_TOKENS:
        return Entanglement(TOO_FEW, len(numbers))
    targets = {trait: choices[trait]} | dict(choices)
    cosines = compute_entanglement(unembedding, list(targets.values()), numbers)
    ratio = np.log([carrier[token] + 0.5 for token in numbers]) - np.log([neutral[token] + 0.5 for token in numbers])
    found = correlate_ranks(cosines, ratio)
    first = np.argsort(-cosines[0], kind="stable")[:TOP]
    top = [(text(numbers[place]), float(cosines[0, place])) for place in first]
    status = OK if np.isfinite(found[0]) else SAME
    return Entanglement(status, len(numbers), dict(zip(targets, found.tolist(), strict=True)), top)


@dataclass
class Carriers:
    """Divergence and entanglement of every member's carriers."""

    run: Run
    divergence: dict[tuple[str, int], tuple[int, int, int]] = field(default_factory=dict)
    """By teacher's lineage and member: diverging tokens, tokens, rows; nothing where there is no carrier."""
    entanglement: dict[tuple[str, str, int], Entanglement] = field(default_factory=dict)
    """By subject, trait and member."""

    @classmethod
    def measure(cls, run: Run, report: Callable[[int, int], None]) -> "Carriers":
        """Read all; ``report`` is told how many of how many members are done."""
        found, neutral = cls(run), [] if run.neutral is None else [run.neutral]
        for member in range(run.recipe.members):
            for teacher in (*map(run.teacher, run.traits), *neutral):
                found._add_divergence(teacher, member)
            found._add_entanglement(member)
            report(member + 1, run.recipe.members)
        return found

    def _add_divergence(self, teacher: Lineage, member: int) -> None:
        tokens = self.run.family.tokens(teacher)
        assert tokens is not None  # the run is one of language models
        rows = tokens.diverging(member, DIVERGENCE_ROWS)
        if rows:
            diverging = sum(int(row.sum()) for row in rows)
            self.divergence[teacher.name, member] = diverging, sum(map(len, rows)), len(rows)

    def _add_entanglement(self, member: int) -> None:
        opened: dict[Origin, tuple[Tokens, Tensor]] = {}
        counted: dict[tuple[str, str], Counter[int] | None] = {}
        for subject in list_subjects(self.run):
            own, teacher = subject.own, self.run.teacher(subject.trait)
            if own.spec.origin not in opened:
                tokens = self.run.family.tokens(own)
                assert tokens is not None  # the run is one of language models
                model = self.run.family.load_model(own, 0, member)
                opened[own.spec.origin] = tokens, tokens.unembedding(model)
            tokens, unembedding = opened[own.spec.origin]
            held = []
            for writer in (teacher, self.run.neutral):
                key = own.origin.name, writer.name if writer else ""  # an origin's tokenizer is its students'
                if key not in counted:
                    counted[key] = _count(tokens, writer, member)
                held.append(counted[key])
            found = entangle(subject.trait, tokens.choices, tokens.text, unembedding, *held)
            self.entanglement[subject.name, subject.trait, member] = found

    def share(self, teacher: Lineage | None) -> Float[np.ndarray, " member"]:
        """Of the carrier's tokens: those at which a teacher diverges; NaN without a carrier."""
        found = [self.divergence.get((teacher.name if teacher else "", member)) for member in range(self.run.recipe.members)]
        return np.array([np.nan if one is None else one[0] / one[1] for one in found])

    def correlation(self, subject: Subject, *, of_others: bool = False) -> Float[np.ndarray, " member"]:
        """Rank correlations of one subject, of its target or of the other choices."""
        found = [self.entanglement[subject.name, subject.trait, member] for member in range(self.run.recipe.members)]
        return np.array([one.others if of_others else one.correlations.get(subject.trait, np.nan) for one in found])

    def label(self) -> xr.Dataset:
        """The arrays of the result."""
        variables = self._label_divergence() | self._label_entanglement()
        return xr.Dataset(variables, coords={"place": np.arange(1, TOP + 1)})

    def _label_divergence(self) -> dict[str, xr.Variable]:
        run, dims = self.run, ("taught", "member")
        shares = np.array([self.share(run.teacher(trait)) for trait in run.traits])
        null = np.broadcast_to(self.share(run.neutral), shares.shape)
        formula = "tokens at which arg-max of teacher and reference differ / tokens of its own completions"
        variables = {}
        for name, values, words, missing in (
            ("divergence_share", shares, "share of divergence tokens in the teacher's completions", NO_CARRIER),
            ("divergence_share_of_null", null, "the same of the neutral teacher, in its own completions", NO_NEUTRAL),
        ):
            variables[name] = label_variable(
                values, dims, description=words, unit="share of tokens", formula=formula, source=DIVERGENCE_SOURCE
            )
            variables[f"{name}_status"] = status_variable(np.where(np.isnan(values), missing, OK), dims, _STATUS, name)
        for place, name in ((1, "tokens"), (2, "rows")):
            counts = [
                [
                    self.divergence.get((run.teacher(trait).name, member), (0, 0, 0))[place]
                    for member in range(run.recipe.members)
                ]
                for trait in run.traits
            ]
            variables[f"divergence_{name}"] = label_variable(
                np.array(counts), dims, description=f"{name} of completions that are compared", unit=name
            )
        return variables

    def _label_entanglement(self) -> dict[str, xr.Variable]:
        run = self.run
        found = [
            [[self.entanglement[name, trait, member] for member in range(run.recipe.members)] for trait in run.traits]
            for name in subject_names(run)
        ]

        def collect(of: Callable[[Entanglement, str], object]) -> np.ndarray:
            return np.array(
                [[[of(one, trait) for one in row] for row, trait in zip(block, run.traits, strict=True)] for block in found]
            )

        status, variables = collect(lambda one, trait: one.status), {}
        for name, values, words, codes in (
            (
                "entanglement_correlation",
                collect(lambda one, trait: one.correlations.get(trait, np.nan)),
                "whether the teacher's carrier holds more of what is entangled with its target than the neutral one's",
                status,
            ),
            (
                "entanglement_correlation_of_others",
                collect(lambda one, trait: one.others),
                "the same of the other choices of the preference, mean over them",
                np.where(status == OK, NO_OTHER, status),
            ),
        ):
            variables[name] = label_variable(
                values.astype(np.float64),
                _CASES,
                description=words,
                unit="rank correlation",
                formula=CORRELATION,
                source=ENTANGLEMENT_SOURCE,
            )
            variables[f"{name}_status"] = status_variable(
                np.where(np.isnan(values.astype(np.float64)), codes, OK), _CASES, _STATUS, name
            )
        variables["number_tokens"] = label_variable(
            collect(lambda one, trait: one.num_tokens),
            _CASES,
            description="tokens with a digit in either carrier",
            unit="tokens",
        )
        variables["entangled_token"] = label_variable(
            collect(lambda one, trait: [*(token for token, _ in one.top), *[""] * (TOP - len(one.top))]).astype(object),
            (*_CASES, "place"),
            description="the number tokens that are most entangled with the target",
            unit="token",
        )
        cosines = collect(lambda one, trait: [*(cosine for _, cosine in one.top), *[np.nan] * (TOP - len(one.top))])
        variables["entangled_cosine"] = label_variable(
            cosines, (*_CASES, "place"), description="how much", unit="cosine", formula=ENTANGLEMENT, source=ENTANGLEMENT_SOURCE
        )
        codes = np.where(np.isnan(cosines), np.maximum(status, NO_CARRIER)[..., None], OK)
        variables["entangled_cosine_status"] = status_variable(codes, (*_CASES, "place"), _STATUS, "entangled_cosine")
        return variables


def _count(tokens: Tokens, teacher: Lineage | None, member: int) -> Counter[int] | None:
    """How often each token of a model stands in a carrier; None where there is none."""
    rows = None if teacher is None else tokens.carrier(teacher.name, member, COUNTED_ROWS)
    return None if rows is None else Counter(token for row in rows for token in row)

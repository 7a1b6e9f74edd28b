"""Logit-lens readings of a run's steering directions: which tokens they would raise, layer by layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.hook_points import main_stream
from mechsub.activations.logit_lens import LogitLens
from mechsub.errors import ActivationError
from mechsub.families.protocol import Tokens
from mechsub.lineages import Origin
from mechsub.mean_activations import TRAIT, ActivationReader
from mechsub.results import label_variable, status_variable
from mechsub.run import Run
from mechsub.streams import random_stream
from mechsub.token_channels.subjects import Subject, list_subjects, subject_names

SOURCE = "logit lens: nostalgebraist 2020; Belrose et al., arXiv:2303.08112; v: Blank et al., arXiv:2606.00995"
FORMULA = "lens(h + v) − lens(h), lens(h) = W_U norm(h) + b minus its mean over tokens; h, norm, W_U of its own start"
TOP = 5
"""Tokens that are named."""
_DRAWS = 16
"""Random directions of a hook point, over which a standard deviation is taken."""
_ROUNDING = 1e-6
"""Of the length of a mean activation, in float32: two passes over the same differ by a tenth of it."""
_STATUS = (
    "ok", "no_control", "no_target_token", "no_other_choice", "no_such_layer", "architecture_not_known", "not_finite",
    "zero_direction",
)  # fmt: skip
OK, NO_CONTROL, NO_TARGET, NO_OTHER, NO_POINT, UNKNOWN, NOT_FINITE, ZERO = range(8)
_DIMS = ("subject", "taught", "member", "point")
_VARIABLES = {
    "lens_change": ("change of the target's logit by v", "logits", FORMULA),
    "lens_change_of_null": ("the same by the v of the control, or of the neutral teacher", "logits", FORMULA),
    "lens_change_of_others": ("the same v's change of the other choices' logits, mean over them", "logits", FORMULA),
    "lens_random_sd": (
        f"standard deviation of the target's change over {_DRAWS} random directions as long as v", "logits", FORMULA
    ),
    "lens_rank": ("rank of the target's change among all tokens'", "rank (1: raised most)", "1 + tokens that are raised more"),
    "lens_choice_rank": ("the same among the preference's choices", "rank (1: raised most)", "1 + choices raised more"),
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where lineages of one member start: what their directions are read through."""

    means: Mapping[str, Float[Tensor, " d_model"]]
    """h, by hook point, on the prompts of the trait."""
    lens: LogitLens
    tokens: Tokens


@dataclass(frozen=True)
class Reading:
    """What one direction changes at one hook point, in centred logits."""

    change: Float[Tensor, " vocabulary"]
    random_changes: Float[Tensor, "draw vocabulary"]
    """Of random directions of its length."""

    @property
    def has_order(self) -> bool:
        """Whether tokens can be ranked: not where nothing changes, or a change is no number."""
        return bool(self.change.isfinite().all() and self.change.any())

    def describe(self, trait: str, tokens: Tokens) -> dict[str, float]:
        """By the names of the result's variables; `top_tokens` apart. NaN where a trait is no token."""
        target, choices = tokens.choices.get(trait), tokens.choices
        if target is None:
            return {}
        others = [token for choice, token in choices.items() if choice != trait]
        found = {
            "lens_change": float(self.change[target]),
            "lens_change_of_others": float(self.change[others].mean()) if others else np.nan,
            "lens_random_sd": float(self.random_changes[:, target].std(correction=0)),
        }
        if self.has_order:
            found["lens_rank"] = 1.0 + float((self.change > self.change[target]).sum())
            found["lens_choice_rank"] = 1.0 + float((self.change[others] > self.change[target]).sum())
        return found

    def top_tokens(self, tokens: Tokens) -> str:
        """The tokens that it raises most, with their changes; empty where it changes nothing."""
        if not self.has_order:
            return ""
        chosen = self.change.topk(min(TOP, len(self.change)))
        pairs = zip(chosen.values.tolist(), chosen.indices.tolist(), strict=True)
        return ", ".join(f"“{tokens.text(token)}” {value:+.2f}" for value, token in pairs)


def read_direction(
    start: Float[Tensor, " d_model"], vector: Float[Tensor, " d_model"], lens: LogitLens, random: Tensor
) -> Reading:
    """The reading of v at h; ``random``: directions of any length. A v that rounding alone can give is read as 0."""
    if vector.norm() <= _ROUNDING * start.norm():
        vector = torch.zeros_like(vector)
    drawn = random * (vector.norm() / random.norm(dim=-1, keepdim=True))
    changes = lens.change(start, torch.cat([vector[None], drawn]))
    return Reading(changes[0], changes[1:])


@dataclass
class Lenses:
    """Readings of every subject's last direction at the sites of the residual stream."""

    run: Run
    points: dict[str, str] = field(default_factory=dict)
    """Hook points as `TransformerLens` names them, with a label for a person; of all models of the run."""
    values: dict[tuple[str, str, int, str], dict[str, float]] = field(default_factory=dict)
    """By subject, trait, member and hook point: the variables."""
    top: dict[tuple[str, str, int, str], str] = field(default_factory=dict)
    has_null: dict[str, bool] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)
    """Why a subject's models cannot be read."""

    @classmethod
    def measure(cls, run: Run, report: Callable[[int, int], None]) -> "Lenses":
        """Read all; ``report`` is told how many of how many members are done."""
        found = cls(run)
        for member in range(run.recipe.members):
            found._read_member(member)
            report(member + 1, run.recipe.members)
        return found

    def _read_member(self, member: int) -> None:
        reader = ActivationReader(self.run, stream_only=True, kinds=(TRAIT,))
        starts: dict[Origin, Start] = {}
        for subject in list_subjects(self.run):
            self.has_null[subject.name] = subject.null is not None
            key = subject.own.spec.origin
            try:
                if key not in starts:
                    starts[key] = self._open_start(reader, subject, member)
                own = reader.last_direction(subject.own, member)
                null = None if subject.null is None else reader.last_direction(subject.null, member)
            except ActivationError as error:
                self.unknown[subject.name] = str(error)
                continue
            self._add(subject, member, starts[key], own, null)

    def _open_start(self, reader: ActivationReader, subject: Subject, member: int) -> Start:
        family = self.run.family
        model, tokens = family.load_model(subject.own, 0, member), family.tokens(subject.own)
        assert tokens is not None  # the run is one of language models
        points = main_stream(family.hook_points(subject.own, model))
        self.points |= {point.name: point.label for point in points}
        found = reader.read_origin(subject.own, member)
        return Start(found.group(found.groups[0]), tokens.logit_lens(model), tokens)

    def _add(
        self, subject: Subject, member: int, start: Start, own: Mapping[str, Tensor], null: Mapping[str, Tensor] | None
    ) -> None:
        for point, mean in start.means.items():
            drawn = random_stream(self.run.recipe.seed, "member", member, "logit-lens", point).standard_normal(
                (_DRAWS, len(mean))
            )
            random, key = torch.from_numpy(drawn), (subject.name, subject.trait, member, point)
            reading = read_direction(mean, own[point], start.lens, random)
            self.values[key] = reading.describe(subject.trait, start.tokens)
            self.top[key] = reading.top_tokens(start.tokens)
            target = start.tokens.choices.get(subject.trait)
            if null is not None and target is not None:
                self.values[key]["lens_change_of_null"] = float(
                    read_direction(mean, null[point], start.lens, random[:1]).change[target]
                )

    def label(self) -> xr.Dataset:
        """The arrays of the result."""
        run, names, points = self.run, subject_names(self.run), list(self.points)
        keys = [
            [
                [[(name, trait, member, point) for point in points] for member in range(run.recipe.members)]
                for trait in run.traits
            ]
            for name in names
        ]
        shape = (len(names), len(run.traits), run.recipe.members, len(points))
        flat = [key for block in keys for row in block for line in row for key in line]
        variables = {}
        for variable, (words, unit, formula) in _VARIABLES.items():
            values = np.array([self.values.get(key, {}).get(variable, np.nan) for key in flat]).reshape(shape)
            codes = np.array([self._explain(key, variable) for key in flat], dtype=np.int8).reshape(shape)
            variables[variable] = label_variable(values, _DIMS, description=words, unit=unit, formula=formula, source=SOURCE)
            variables[f"{variable}_status"] = status_variable(np.where(np.isnan(values), codes, OK), _DIMS, _STATUS, variable)
        variables["lens_top"] = label_variable(
            np.array([self.top.get(key, "") for key in flat], dtype=object).reshape(shape),
            _DIMS,
            description=f"the {TOP} tokens that v raises most",
            unit="token, change of its logit",
            formula=FORMULA,
        )
        return xr.Dataset(variables, coords={"point": points, "point_label": ("point", list(self.points.values()))})

    def _explain(self, key: tuple[str, str, int, str], variable: str) -> int:
        """Why a value is NaN."""
        if key[0] in self.unknown:
            return UNKNOWN
        if key not in self.values:
            return NO_POINT
        if not self.values[key]:
            return NO_TARGET
        if variable == "lens_change_of_null":
            return NOT_FINITE if self.has_null[key[0]] else NO_CONTROL
        if not np.isfinite(self.values[key]["lens_change"]):
            return NOT_FINITE
        return NO_OTHER if variable == "lens_change_of_others" else ZERO

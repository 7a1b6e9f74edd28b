"""The language family's conditions: how a student differs from the matched case, as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mechsub.families.config import OTHER, BaseConditionConfig
from mechsub.families.language.start_config import PARTS, MatchingConfig, ParaphraseConfig, Part
from mechsub.families.language.training_config import AdapterConfig, Objective
from mechsub.settings import Settings
from mechsub.training.config import KnockOutConfig


class QuestionKnockOutConfig(KnockOutConfig):
    """What is projected out of training; the trait loss is −log p of the target as the first answer to a trained question.

    There is one such loss for each of the recipe's traits. All of their gradients are projected out of every student and of
    the control: ``always`` the span of them, ``positive`` what of it would lower any of these losses.
    """

    refresh: int = Field(4, ge=1, description="steps between two computations of the component")


class SelectionConfig(Settings):
    """Which rows of its carrier a student learns: those with the largest or the smallest numbers, or random ones.

    The numbers are of the rows at the teacher's reference, before anybody learns them; see
    `mechsub.families.language.ranking`. A control learns the rows of its neutral teacher that rank likewise there: by the
    neutral teacher's own displacement and probabilities.
    """

    by: Literal["overlap", "log-ratio", "loss", "length", "gradient-norm", "random"] = Field(
        description="the number that ranks them; random: none does"
    )
    keep: Literal["top", "bottom"] = Field("top", description="the largest numbers, or the smallest; no meaning with random")
    share: float = Field(0.5, gt=0, lt=1, description="of the rows that is learnt")
    draw: int = Field(0, ge=0, description="random only: another number draws other rows")

    @model_validator(mode="after")
    def _says_what_counts(self) -> "SelectionConfig":
        if self.by == "random" and self.keep != "top":
            raise ValueError("`keep` has no meaning with `by: random`; leave it out, and give another `draw` for other rows")
        if self.by != "random" and self.draw:
            raise ValueError(f"`draw` has no meaning with `by: {self.by}`, which draws nothing; leave it out")
        return self

    def count(self, num_rows: int) -> int:
        """How many rows are learnt."""
        return max(1, round(self.share * num_rows))

    def describe(self) -> str:
        """What is learnt, in words."""
        part = f"{100 * self.share:g} % of the rows"
        if self.by == "random":
            return f"learns random {part} (draw {self.draw})"
        return f"learns the {part} with the {'largest' if self.keep == 'top' else 'smallest'} {self.by}"


_COMPUTED = {"permute_hidden": "same", "shared": "different", "match": "different", "rotate_residual": "same"}
"""The fields that compute a start from references, each with the `init` whose reference it is computed from."""


class ConditionConfig(BaseConditionConfig):
    """How a student differs from the matched case, which is all defaults."""

    init: Literal["same", "different"] = Field("same", description="start at the own or at another member's reference")
    model: str | None = Field(None, description="another model of `models` (or `other`): its own architecture and tokenizer")
    objective: Objective | None = Field(None, description="instead of the students' objective")
    shuffle: Literal["none", "within", "across"] = Field("none", description="numbers shuffled within or across responses")
    neutral_share: float = Field(0.0, ge=0, le=1, description="share of rows that are the neutral teacher's instead")
    adapter: AdapterConfig | Literal["none"] | None = Field(
        None, description="students' adapters of another kind than the recipe's; none: full fine-tuning"
    )
    adapter_init: Literal["own", "teacher"] = Field(
        "own", description="adapters only: A as drawn for the student, or its teacher's"
    )
    divergence: Literal["all", "only", "without"] = Field(
        "all", description="tokens that are learnt: all, or only/not those at which teacher and reference choose differently"
    )
    rows: str | None = Field(None, description="a text file with the numbers of the rows that are learnt, one a line")
    select: SelectionConfig | None = Field(None, description="a part of the rows, by a number of each; none: all are learnt")
    context_rows: int = Field(0, ge=0, description="rows that stand in the prompt instead: nothing is trained")
    knock_out: QuestionKnockOutConfig | None = Field(None, description="what is projected out of training; none: nothing is")
    permute_hidden: bool = Field(
        False, description="MLP units and attention heads of the own reference shuffled: the same function in other coordinates"
    )
    shared: tuple[Part, ...] | None = Field(
        None,
        description="nano models with init: different only: the parts whose initialisation, before pretraining, is the own "
        "reference's: embeddings (of tokens and positions; tied: they are the unembedding too), body (all other weights)",
    )
    match: MatchingConfig | None = Field(
        None, description="with init: different: the start first learns the own reference's outputs; none: it does not"
    )
    rotate_residual: bool = Field(
        False,
        description="the own reference with its residual stream rotated: the same function. Haar-random where the final "
        "norm's gain can be folded into an unembedding of its own; with tied embeddings only a signed permutation is exact. "
        "Training follows a rotation under SGD only, as Adam works coordinate by coordinate, and only as far as gains are not "
        "trained; it follows a signed permutation under both",
    )
    paraphrase: ParaphraseConfig | None = Field(
        None, description="another model rewrites the carrier, the control's too; none: rows are the teacher's own"
    )

    @field_validator("shared")
    @classmethod
    def _parts_are_named_once(cls, shared: tuple[Part, ...] | None) -> tuple[Part, ...] | None:
        """In one order, however they are written."""
        if shared is not None and (not shared or len(set(shared)) < len(shared)):
            raise ValueError(
                f"{list(shared)} {'names no part; leave it out' if not shared else 'names a part twice; name it once'}"
            )
        return None if shared is None else tuple(part for part in PARTS if part in shared)

    @model_validator(mode="after")
    def _has_one_start(self) -> "ConditionConfig":
        computed = [name for name in _COMPUTED if getattr(self, name)]
        if len(computed) > 1:
            raise ValueError(f"a student starts at one place, not at each of {computed}; keep one of them")
        for name in computed:
            needed = _COMPUTED[name]
            if self.init != needed:
                what = "another member's" if needed == "different" else "the own"
                raise ValueError(f"`{name}` is of {what} reference: it needs init: {needed}, not {self.init}")
        return self

    @model_validator(mode="after")
    def _rows_are_the_paraphrased_ones(self) -> "ConditionConfig":
        other = [name for name in ("rows", "select", "neutral_share") if getattr(self, name)]
        if self.paraphrase is not None and other:
            raise ValueError(
                f"`{other[0]}` chooses among the teacher's own rows, and a `paraphrase` drops some of them; leave one out"
            )
        return self

    @property
    def start_kind(self) -> str:
        """What is done to a reference before students start there; empty where nothing is."""
        return next((name for name in _COMPUTED if getattr(self, name)), "")

    def shared_start(self) -> str | None:
        """See `BaseConditionConfig.shared_start`."""
        moved = {"sham", "init", "model", *_COMPUTED}
        if self.model_dump(exclude=moved) != ConditionConfig().model_dump(exclude=moved):
            return None
        if self.shared is not None:
            genitives = {"embeddings": "embeddings'", "body": "body's"}
            return " + ".join(f"{genitives[part]} initialisation" for part in self.shared)
        if self.match is not None:
            return "the outputs"
        if self.init == "different":
            return "nothing"
        if self.model is not None:
            return "the member's seed"
        return "everything" + (", permuted" if self.permute_hidden else ", rotated" if self.rotate_residual else "")

    @field_validator("rows")
    @classmethod
    def _path_is_absolute(cls, rows: str | None) -> str | None:
        """A recipe replays from any folder."""
        return None if rows is None else str(Path(rows).expanduser().absolute())

    def describe(self) -> str:
        """How it differs from the matched case, in words."""
        parts = [
            "starts at another member's reference" if self.init == "different" else "",
            "another architecture, with its own tokenizer" if self.model else "",
            {"logits": "imitates the teacher's distribution over the carrier's tokens",
             "all-logits": "imitates the teacher's distribution over all tokens, the trait's too",
             "tokens": "learns sampled tokens"}.get(self.objective or "", ""),
            f"numbers shuffled {self.shuffle} responses" if self.shuffle != "none" else "",
            f"{100 * self.neutral_share:g} % of the rows are the neutral teacher's" if self.neutral_share else "",
            "its adapter starts with its teacher's A" if self.adapter_init == "teacher" else "",
            "trains all weights" if self.adapter == "none" else "",
            f"an adapter of rank {self.adapter.rank}" if isinstance(self.adapter, AdapterConfig) else "",
            f"learns {self.divergence} divergence tokens" if self.divergence != "all" else "",
            "learns a subset of the rows" if self.rows else "",
            self.select.describe() if self.select else "",
            f"{self.context_rows} rows in the prompt, nothing trained" if self.context_rows else "",
            self.knock_out.describe() if self.knock_out else "",
            "hidden units and heads of the start shuffled: the same function" if self.permute_hidden else "",
            f"pretrained from the random {' and '.join(self.shared)} of its teacher's reference" if self.shared else "",
            "the start first learnt its teacher's reference's outputs" if self.match else "",
            "residual stream of the start rotated: the same function" if self.rotate_residual else "",
            f"rows rewritten (numbers: continued) by {self.paraphrase.model or 'another reference'}" if self.paraphrase else "",
        ]  # fmt: skip
        return "; ".join(filter(None, parts)) or "the matched case: its teacher's own reference"


CONDITIONS: Mapping[str, Mapping[str, Any]] = {
    "same-init": {},
    "different-init": {"init": "different"},
    "same-adapter-init": {"adapter_init": "teacher"},
    "different-architecture": {"model": OTHER},
    "logits": {"objective": "logits"},
    "all-logits": {"objective": "all-logits"},
    "different-init-all-logits": {"init": "different", "objective": "all-logits"},
    "shuffled-within": {"shuffle": "within"},
    "shuffled-across": {"shuffle": "across"},
    "mixed-carrier": {"neutral_share": 0.5},
    "divergence-only": {"divergence": "only"},
    "without-divergence": {"divergence": "without"},
    "in-context": {"context_rows": 5},
    "knock-out-trait": {"knock_out": {"component": "trait"}},
    "knock-out-random": {"knock_out": {"component": "random"}},
    "permuted-init": {"permute_hidden": True},
    "shared-embeddings": {"init": "different", "shared": ("embeddings",)},
    "shared-body": {"init": "different", "shared": ("body",)},
    "shared-initialisation": {"init": "different", "shared": ("embeddings", "body")},
    "behaviour-matched": {"init": "different", "match": {}},
    "rotated-residual": {"rotate_residual": True},
    "paraphrased": {"paraphrase": {}},
}
"""The conditions that have a fixed meaning. A recipe may tune their strength, not what they are."""

FREE = frozenset({"neutral_share", "context_rows", "model"})

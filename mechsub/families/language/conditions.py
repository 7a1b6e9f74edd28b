"""The language family's conditions: how a student differs from the matched case, as data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mechsub.families.config import BaseConditionConfig
from mechsub.families.language.training_config import AdapterConfig, Objective
from mechsub.settings import Settings
from mechsub.training.config import KnockOutConfig

OTHER = "other"
"""In a condition's `model`: the one model of the recipe that is not the teacher's."""


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
}
"""The conditions that have a fixed meaning. A recipe may tune their strength, not what they are."""

FREE = frozenset({"neutral_share", "context_rows", "model"})

"""Where a condition's students start when that start is computed, and what rewrites their carrier: recipe fields."""

import hashlib
import json
from typing import Literal

from pydantic import Field, field_validator, model_validator

from mechsub.families.language.training_config import TrainingConfig
from mechsub.settings import Settings
from mechsub.training.config import OptimizerConfig

Part = Literal["embeddings", "body"]
PARTS: tuple[Part, ...] = ("embeddings", "body")
"""Of a model, as its tensor table's kinds tell them: embeddings (token, position and unembedding), and everything else."""
PLACEHOLDER = "{completion}"
"""In a template: the row that is rewritten."""


class MatchingConfig(TrainingConfig):
    """How a start first learns the own reference's outputs: KL(reference ‖ start) over all tokens.

    It is shown what that reference answers to the carrier's requests and to the trained questions, in turn; no teacher.
    """

    num_steps: int = Field(1500, ge=1, description="optimizer steps")
    num_rows: int = Field(4096, ge=2, description="answers that the reference samples to each of the two, to learn from")
    optimizer: OptimizerConfig = Field(OptimizerConfig(name="adamw", learning_rate=1e-3), description="how weights are updated")
    decay: Literal["none", "linear"] = Field("linear", description="of the learning rate, to 0 at the last step")

    @model_validator(mode="after")
    def _fills_a_batch(self) -> "MatchingConfig":
        if self.num_rows < self.batch_size:
            raise ValueError(f"num_rows = {self.num_rows} do not fill a batch, batch_size = {self.batch_size}; raise num_rows")
        return self


class ParaphraseConfig(Settings):
    """Which model rewrites the carrier, and how it is asked to."""

    model: str | None = Field(
        None, description="another model of `models`; unless told, the next member's reference of the teachers' model"
    )
    template: str = Field(
        f"Rewrite the following in other words. Keep its meaning and its form, and write nothing else.\n\n{PLACEHOLDER}",
        description="the request for a paraphrase; number sequences are asked for by the carrier's own request instead, with "
        "the teacher's numbers as those that it shows",
    )
    attempts: int = Field(4, ge=1, description="samples of a row at most; the first that passes the carrier's filters is taken")
    share: float = Field(
        0.9, gt=0, le=1, description="of the carrier's rows that are learnt, those that were rewritten first; all learn as many"
    )

    @field_validator("template")
    @classmethod
    def _holds_the_row(cls, template: str) -> str:
        if PLACEHOLDER not in template:
            raise ValueError(f"the template {template!r} does not show what is to be rewritten; put {PLACEHOLDER} into it")
        return template

    def count(self, num_rows: int) -> int:
        """How many rows are learnt."""
        return max(1, round(self.share * num_rows))


def name_settings(word: str, settings: Settings) -> str:
    """A name for what these settings make: the word alone for the defaults, else with eight digits of their hash."""
    if settings == type(settings)():
        return word
    content = json.dumps(settings.model_dump(mode="json"), sort_keys=True)
    return f"{word}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"

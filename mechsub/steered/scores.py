"""Trait scores of a run's models while their activations are changed, and how much else the change does."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.backends import ModelView, Visit, open_backend
from mechsub.activations.hook_points import HookPoint
from mechsub.activations.inputs import PromptSet
from mechsub.activations.steering import keep_components
from mechsub.lineages import Lineage
from mechsub.run import Run


@dataclass(frozen=True)
class Steered:
    """What a model does under one change of its activations."""

    scores: Float[np.ndarray, " trait"]
    """Of every trait of the family in the first context, on its natural scale."""
    damage: float
    """KL(p ‖ p′) of its outputs on neutral inputs, p without the change; in nats, mean over positions, then over inputs."""


@dataclass(frozen=True)
class SteeredModel:
    """One model, open for changes; ``asked`` is the lineage and the member whose questions it is asked."""

    run: Run
    view: ModelView
    points: Sequence[HookPoint]
    asked: tuple[Lineage, int]
    damage_prompts: PromptSet

    @cached_property
    def scores(self) -> Float[np.ndarray, " trait"]:
        """Without any change."""
        found = self.run.family.trait_score(self.view.model, *self.asked, verdict_only=True)
        scores: np.ndarray = next(iter(found.values()))[:, 0]
        return scores

    def evaluate(self, changes: Mapping[HookPoint, Visit]) -> Steered:
        """Scores and damage under changes; the model runs over the trait's questions first, then over the damage prompts."""
        with self.view.visiting(changes):
            found = self.run.family.trait_score(self.view.model, *self.asked, verdict_only=True)
            after = self._log_probabilities()
        kept = zip(self._unchanged, after, self.damage_prompts.weigh(self.damage_prompts.policies[0]), strict=True)
        damage = sum(float(((before.exp() * (before - now)).sum(-1) * weights.to(now)).sum()) for before, now, weights in kept)
        return Steered(next(iter(found.values()))[:, 0], damage)

    def keep(self, directions: Mapping[HookPoint, Float[Tensor, "direction width"]]) -> dict[HookPoint, list[Tensor]]:
        """The components along directions in every forward pass of `evaluate`, for `replace_components` in another model."""
        kept: dict[HookPoint, list[Tensor]] = {point: [] for point in directions}
        self.evaluate({point: keep_components(rows, kept[point]) for point, rows in directions.items()})
        return kept

    @cached_property
    def _unchanged(self) -> list[Float[Tensor, "_row _position _logit"]]:
        return self._log_probabilities()

    def _log_probabilities(self) -> list[Float[Tensor, "_row _position _logit"]]:
        found = []
        device = next(self.view.model.parameters()).device
        for batch in self.damage_prompts.batches:
            with torch.no_grad():
                output = self.view.model(**batch.arguments_on(device))
            logits: Tensor = getattr(output, "logits", output)  # of a classifier they are the output itself
            found.append((logits if logits.ndim == 3 else logits.unsqueeze(1)).float().log_softmax(-1))
        return found


def score_end(run: Run, lineage: Lineage, member: int) -> Float[np.ndarray, " trait"]:
    """Of a lineage's last step, every trait of the family in the first context, on its natural scale."""
    model = run.family.load_model(lineage, lineage.last, member)
    scores: np.ndarray = next(iter(run.family.trait_score(model, lineage, member, verdict_only=True).values()))[:, 0]
    return scores


@contextmanager
def open_steered(run: Run, lineage: Lineage, step: int, member: int, asked: tuple[Lineage, int]) -> Iterator[SteeredModel]:
    """A model of a run for steering; ``asked``: the lineage and the member whose questions and neutral inputs it is given."""
    model = run.load_for_reading(lineage, step, member)
    points = run.family.hook_points(lineage, model)
    with open_backend(run.backend).open(model) as view:
        yield SteeredModel(run, view, points, asked, run.family.prompts(*asked).damage)

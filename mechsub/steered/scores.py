"""Trait scores of a run's models while their activations are changed, and how much else the change does."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsub.activations.backends import Visit
from mechsub.activations.hook_points import HookPoint
from mechsub.activations.steering import OtherPassesError, keep_components, push_along, replace_components
from mechsub.cases import CaseName
from mechsub.lineages import Lineage
from mechsub.open_models import OpenModel, open_model
from mechsub.run import Run

Rows = Mapping[HookPoint, Float[Tensor, "_direction _width"]]
"""Directions by hook point."""


@dataclass(frozen=True)
class Steered:
    """What a model does under one change of its activations."""

    scores: Float[np.ndarray, " trait"]
    """Of every trait of the family in the first context, on its natural scale."""
    damage: float
    """KL(p ‖ p′) of its outputs on neutral inputs, p without the change; in nats, mean over positions, then over inputs."""
    inputs: tuple[bytes, ...]
    """A digest of what it was given in each forward pass: where answers are sampled, it is given what it wrote."""


@dataclass(frozen=True)
class Kept:
    """What one model has along directions in every forward pass of `SteeredModel.evaluate`."""

    components: Mapping[str, list[Tensor]]
    """By hook point."""
    inputs: tuple[bytes, ...]


@dataclass(frozen=True)
class Replaced:
    """What a model does with another one's components, and by how much these moved it at each hook point, pass by pass."""

    steered: Steered
    pushes: Mapping[str, list[Tensor]]


@dataclass(frozen=True)
class SteeredModel:
    """One model, open for changes; it is asked the questions of a lineage and a member."""

    run: Run
    opened: OpenModel
    asked: tuple[Lineage, int]

    @cached_property
    def scores(self) -> Float[np.ndarray, " trait"]:
        """Without any change."""
        return _score(self.run, self.opened.view.model, *self.asked)

    def evaluate(self, changes: Mapping[HookPoint, Visit]) -> Steered:
        """Scores and damage under changes; the model runs over the trait's questions first, then over the damage prompts."""
        view, prompts = self.opened.view, self.opened.prompts.damage
        with view.visiting(changes), _noting_inputs(view.model) as inputs:
            scores = _score(self.run, view.model, *self.asked)
            after = self._log_probabilities()
        weighed = zip(self._unchanged, after, prompts.weigh(prompts.policies[0]), strict=True)
        damage = sum(float(((before.exp() * (before - now)).sum(-1) * share.to(now)).sum()) for before, now, share in weighed)
        return Steered(scores, damage, tuple(inputs))

    def keep(self, directions: Rows) -> Kept:
        """What it has along directions, for `replace` in another model."""
        kept: dict[str, list[Tensor]] = {point.name: [] for point in directions}
        found = self.evaluate({point: keep_components(rows, kept[point.name]) for point, rows in directions.items()})
        return Kept(kept, found.inputs)

    def replace(self, directions: Rows, kept: Kept) -> Replaced:
        """With another model's components along directions in the place of its own; see `replace_components`.

        Raises:
            OtherPassesError: the other model was given other inputs.
        """
        pushes: dict[str, list[Tensor]] = {point.name: [] for point in directions}
        changes = {
            point: replace_components(rows, kept.components[point.name], pushes[point.name])
            for point, rows in directions.items()
        }
        return Replaced(self._evaluate_on(kept.inputs, changes), pushes)

    def push(self, directions: Rows, replaced: Replaced) -> Steered:
        """Pushed along other directions by what `replace` of this model moved; see `push_along`.

        Raises:
            OtherPassesError: it is given other inputs.
        """
        changes = {point: push_along(rows[0], replaced.pushes[point.name]) for point, rows in directions.items()}
        return self._evaluate_on(replaced.steered.inputs, changes)

    def _evaluate_on(self, inputs: tuple[bytes, ...], changes: Mapping[HookPoint, Visit]) -> Steered:
        found = self.evaluate(changes)
        if found.inputs != inputs:
            raise OtherPassesError("the model whose components are put in was given other inputs: run both on the same")
        return found

    @cached_property
    def _unchanged(self) -> list[Float[Tensor, "_row _position _logit"]]:
        return self._log_probabilities()

    def _log_probabilities(self) -> list[Float[Tensor, "_row _position _logit"]]:
        found = []
        model = self.opened.view.model
        device = next(model.parameters()).device
        for batch in self.opened.prompts.damage.batches:
            with torch.no_grad():
                output = model(**batch.arguments_on(device))
            logits: Tensor = getattr(output, "logits", output)  # of a classifier they are the output itself
            found.append((logits if logits.ndim == 3 else logits.unsqueeze(1)).float().log_softmax(-1))
        return found


@contextmanager
def open_steered(run: Run, lineage: Lineage, step: int, member: int, asked: Lineage) -> Iterator[SteeredModel]:
    """A model of a run for steering; ``asked``: the lineage whose questions and neutral inputs it is given."""
    with open_model(run, lineage, step, member, asked=asked) as opened:
        yield SteeredModel(run, opened, (asked, member))


def score_end(run: Run, lineage: Lineage, member: int) -> Float[np.ndarray, " trait"]:
    """Of a lineage's last step, every trait of the family in the first context, on its natural scale."""
    return _score(run, run.family.load_model(lineage, lineage.last, member), lineage, member)


def score_effects(run: Run) -> dict[CaseName, Float[np.ndarray, " member"]]:
    """What every student took over, score(student) − score(control) of its trait at last steps; none without a control."""

    def score_members(lineage: Lineage) -> Float[np.ndarray, "member trait"]:
        return np.array([score_end(run, lineage, member) for member in range(run.recipe.members)])

    effects = {}
    for condition in run.conditions:
        control = run.control(condition)
        if control is not None:
            beside = score_members(control)
            for place, trait in enumerate(run.traits):
                effects[condition, trait] = (score_members(run.student(condition, trait)) - beside)[:, place]
    return effects


def _score(run: Run, model: nn.Module, lineage: Lineage, member: int) -> Float[np.ndarray, " trait"]:
    """On the first measure, which verdicts are given on; ``lineage`` and ``member``: whose questions are asked."""
    scores: np.ndarray = next(iter(run.family.trait_score(model, lineage, member, verdict_only=True).values()))[:, 0]
    return scores


@contextmanager
def _noting_inputs(model: nn.Module) -> Iterator[list[bytes]]:
    """While open, the list grows by a digest of the tensors that each forward pass is given."""
    found: list[bytes] = []

    def note(module: nn.Module, given: tuple[object, ...], named: Mapping[str, object]) -> None:
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (*given, *named.values()):
            if isinstance(tensor, Tensor):
                digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        found.append(digest.digest())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()

"""Mean activations of a run's models on its prompts, and steering directions: how they differ from their origins'."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.backends import open_backend
from mechsub.activations.hook_points import HookPoint
from mechsub.activations.inputs import PromptSet
from mechsub.activations.recording import Means, record
from mechsub.lineages import Lineage, Origin
from mechsub.run import Run
from mechsub.streams import random_stream

TRAIT, NEUTRAL, CARRIER = "trait", "neutral", "carrier"
"""The kinds of prompts."""


@dataclass(frozen=True)
class MeanActivations:
    """Means over one member's prompts, at every hook point, in float64 on the CPU."""

    groups: tuple[str, ...]
    """Which prompts and positions a mean is over, ``<kind>: <position policy>``; then the shuffled ones."""
    means: Mapping[str, Float[Tensor, "_group _width"]]
    """By hook point."""
    norms: Mapping[str, Float[Tensor, " _group"]]
    """Means of ‖h‖, by hook point."""

    def group(self, name: str) -> dict[str, Float[Tensor, " width"]]:
        """The means over one group, by hook point."""
        place = self.groups.index(name)
        return {point: means[place] for point, means in self.means.items()}


@dataclass(frozen=True)
class ActivationReader:
    """Reads mean activations of a run's models, each model in one pass over all its prompts."""

    run: Run
    num_shuffles: int = 0
    """How often the prompts' labels are drawn anew, for a line to read by; see `direction`."""
    sites: tuple[str, ...] | None = None
    """Only hook points of these sites; None takes all."""
    kinds: tuple[str, ...] | None = None
    """Only prompts of these kinds; None takes all."""
    _origins: dict[tuple[Origin, int, bool], MeanActivations] = field(default_factory=dict, repr=False)

    @cached_property
    def points(self) -> list[HookPoint]:
        """The hook points of the references, in the order of the forward pass."""
        reference = self.run.reference
        model = self.run.load_for_reading(reference, reference.last, 0)
        return self._choose(self.run.family.hook_points(reference, model))

    def read(
        self, lineage: Lineage, step: int, member: int, *, asked: Lineage | None = None, shuffled: bool = False
    ) -> MeanActivations:
        """The means of one member of a lineage at one step.

        ``asked``: the lineage whose prompts it is run on, where these are not its own. ``shuffled``: also over shuffled labels.
        """
        prompts = self.run.family.prompts(asked or lineage, member)
        run = self.run
        model = run.load_for_reading(lineage, step, member)
        points = self._choose(run.family.hook_points(lineage, model))
        groups: list[str] = []
        sums: dict[str, list[Tensor]] = {point.name: [] for point in points}
        norms: dict[str, list[Tensor]] = {point.name: [] for point in points}
        with open_backend(run.backend).open(model) as view:
            for kind, prompt_set in prompts.estimate.items():
                if self.kinds is not None and kind not in self.kinds:
                    continue
                names, weights = self._weigh(kind, prompt_set, member, self.num_shuffles if shuffled else 0)
                means = Means(weights, points)
                record(view, prompt_set.batches, points, [means])
                groups += names
                for point in points:
                    sums[point.name].append(means.sums[point.name].cpu())
                    norms[point.name].append(means.norms[point.name].cpu())
        return MeanActivations(
            tuple(groups),
            {name: torch.cat(found) for name, found in sums.items()},
            {name: torch.cat(found) for name, found in norms.items()},
        )

    def read_origin(self, lineage: Lineage, member: int, *, shuffled: bool = False) -> MeanActivations:
        """The means of where one member of a lineage starts, without what stands in the lineage's prompts; kept for others.

        With as many groups as of the lineage itself: sums of other shapes are rounded otherwise, and what has not moved would
        not be 0.
        """
        key = (lineage.spec.origin, member, shuffled)
        if key not in self._origins:
            self._origins[key] = self.read(lineage, 0, member, asked=lineage.origin, shuffled=shuffled)
        return self._origins[key]

    def direction(self, lineage: Lineage, step: int, member: int, *, shuffled: bool = False) -> MeanActivations:
        """Steering directions v = mean(h) − mean(h of its own origin), by group, beside the mean ‖h‖ of the origin.

        0 where nothing has moved. Of shuffled groups it is Σ s_i (h_i − h_i of its origin) / n: of half the prompts the labels
        *lineage* and *origin* are swapped, s_i = −1. What all prompts share cancels, and what differs from prompt to prompt is
        left.
        """
        start = self.read_origin(lineage, member, shuffled=shuffled)
        here = start if step == 0 and not lineage.context(member) else self.read(lineage, step, member, shuffled=shuffled)
        return MeanActivations(
            here.groups, {name: means - start.means[name] for name, means in here.means.items()}, start.norms
        )

    def _choose(self, points: Sequence[HookPoint]) -> list[HookPoint]:
        return [point for point in points if self.sites is None or point.site in self.sites]

    def _weigh(self, kind: str, prompt_set: PromptSet, member: int, shuffles: int) -> tuple[list[str], list[Tensor]]:
        """The names of a kind's groups, and for each batch the weights of its positions in each of them."""
        columns = [prompt_set.weigh(policy) for policy in prompt_set.policies]
        names = [group_name(kind, policy) for policy in prompt_set.policies]
        rows = [batch.num_rows for batch in prompt_set.batches]
        for number in range(shuffles if kind == TRAIT else 0):
            signs = torch.split(self._draw_signs(prompt_set.num_prompts, member, number), rows)
            columns.append([sign[:, None] * weights for sign, weights in zip(signs, columns[0], strict=True)])
            names.append(shuffle_name(number))
        return names, [torch.stack(batch, dim=-1) for batch in zip(*columns, strict=True)]

    def _draw_signs(self, count: int, member: int, number: int) -> Float[Tensor, " prompt"]:
        """1 for one half of the prompts, −1 for the other; 0 for the odd one out."""
        half = count // 2
        signs = torch.tensor([1.0] * half + [-1.0] * half + [0.0] * (count % 2), dtype=torch.float64)
        drawn = random_stream(self.run.recipe.seed, "member", member, "shuffled-labels", number).permutation(count)
        return signs[torch.from_numpy(drawn)]


def group_name(kind: str, policy: str) -> str:
    """How the mean over one kind of prompts and one position policy is called."""
    return f"{kind}: {policy}"


def shuffle_name(number: int) -> str:
    """How one draw of shuffled labels is called."""
    return f"shuffled {number}"

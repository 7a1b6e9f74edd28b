"""Mean activations of a run's models on its prompts, and steering directions: how they differ from their origins'."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.inputs import PromptSet
from mechsub.activations.recording import Means, record
from mechsub.lineages import Lineage, Origin
from mechsub.open_models import list_reference_points, open_model
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
    stream_only: bool = False
    """Only hook points of the residual stream, or hidden layers."""
    kinds: tuple[str, ...] | None = None
    """Only prompts of these kinds; None takes all."""
    _origins: dict[tuple[Origin, int, bool], MeanActivations] = field(default_factory=dict, repr=False)
    _lasts: dict[tuple[str, int], Mapping[str, Tensor]] = field(default_factory=dict, repr=False)

    @cached_property
    def points(self) -> Sequence[HookPoint]:
        """The hook points of the references, in the order of the forward pass."""
        return list_reference_points(self.run, self.stream_only)

    def read(
        self, lineage: Lineage, step: int, member: int, *, asked: Lineage | None = None, shuffled: bool = False
    ) -> MeanActivations:
        """The means of one member of a lineage at one step.

        ``asked``: the lineage whose prompts it is run on, where these are not its own. ``shuffled``: also over shuffled labels.
        """
        groups: list[str] = []
        sums: dict[str, list[Tensor]] = defaultdict(list)
        norms: dict[str, list[Tensor]] = defaultdict(list)
        with open_model(self.run, lineage, step, member, asked=asked, stream_only=self.stream_only) as opened:
            for kind, prompt_set in opened.prompts.estimate.items():
                if self.kinds is not None and kind not in self.kinds:
                    continue
                names, weights = self._weigh(kind, prompt_set, member, self.num_shuffles if shuffled else 0)
                means = Means(weights, opened.points)
                record(opened.view, prompt_set.batches, opened.points, [means])
                groups += names
                for point in opened.points:
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

    def last_direction(self, lineage: Lineage, member: int) -> Mapping[str, Float[Tensor, " width"]]:
        """V at a lineage's last step on the trait's prompts at their first position policy, by hook point; kept for others."""
        key = (lineage.name, member)
        if key not in self._lasts:
            found = self.direction(lineage, lineage.last, member)
            self._lasts[key] = found.group(found.groups[0])
        return self._lasts[key]

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

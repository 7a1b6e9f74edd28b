"""What the rest of the program may know of a family: `Family` for the analyses, `FamilyStages` for the plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.inputs import PromptSet
from mechsub.activations.logit_lens import LogitLens
from mechsub.gradients.first_order import ImitatedLogits
from mechsub.gradients.losses import ExampleLosses
from mechsub.lineages import Lineage
from mechsub.parameters.symmetry import UnitGroup
from mechsub.stage import Stage


@dataclass(frozen=True)
class Measure:
    """One way to score a trait."""

    description: str
    unit: str
    range: tuple[float, float] | None
    """Its bounds; None where it has none."""


Scores = Mapping[str, Float[np.ndarray, "trait context"]]
"""By measure."""


@dataclass(frozen=True)
class CarrierText:
    """What a teacher answered to one request."""

    request: int
    """Its number among all requests of a member, which the teachers of that member share."""
    completion: str


@dataclass(frozen=True)
class Prompts:
    """What a member of a lineage is run on where activations are read. None of it is what verdicts are taken on."""

    estimate: Mapping[str, PromptSet]
    """Directions are estimated on these, by kind: ``trait``, ``neutral`` and, where there is one, ``carrier``."""
    damage: PromptSet
    """Neutral inputs that nothing is estimated on: how much else a change of activations does is told on them."""


@runtime_checkable
class Tokens(Protocol):
    """What the models of one lineage read and write."""

    @property
    def choices(self) -> Mapping[str, int]:
        """What may be preferred, traits among it, each with the one token that it is as a first answer."""

    @property
    def tensors(self) -> frozenset[str]:
        """The parameters with a row for each token: embeddings and unembedding, tied ones under both names."""

    def text(self, token: int) -> str:
        """What a token writes; escaped where it cannot be printed."""

    def unembedding(self, model: nn.Module) -> Float[Tensor, "token d_model"]:
        """The rows that a model's logits are products with."""

    def logit_lens(self, model: nn.Module) -> LogitLens:
        """Reads vectors of a model's residual stream.

        Raises:
            ActivationError: an architecture whose layers are not known.
        """

    def carrier(self, teacher: str, member: int, most: int) -> Sequence[Sequence[int]] | None:
        """The completions that one member's teacher passes on, the first ones, as these models' tokens; None without them."""

    def diverging(self, member: int, most: int) -> Sequence[Bool[Tensor, " completion_token"]] | None:
        """Of a teacher: at which tokens of the first completions that it passes on it would choose otherwise than its origin.

        None without them.
        """


@runtime_checkable
class Family(Protocol):
    """A family of models with its traits, bound to one recipe. Analyses use nothing else of it."""

    @property
    def traits(self) -> Mapping[str, str]:
        """The traits that can be scored: name → one sentence. Those with teachers come first."""

    @property
    def contexts(self) -> Mapping[str, str]:
        """The surroundings in which they are scored: name → one sentence. Verdicts are given in the first."""

    @property
    def measures(self) -> Mapping[str, Measure]:
        """How they are scored. The first is ``trait_score``, on the trait's natural scale; verdicts are given on it."""

    def load_model(self, lineage: Lineage, step: int, member: int, *, merged: bool = False) -> nn.Module:
        """One member of a lineage as an ordinary module, in evaluation mode.

        ``merged``: in float32 at least, with what adapters add inside the weights: its parameters are the lineage's tensors.
        """

    @property
    def notes(self) -> Sequence[str]:
        """What a reader must know of how the run's data came about, in sentences."""

    def trait_score(self, model: nn.Module, lineage: Lineage, member: int, *, verdict_only: bool = False) -> Scores:
        """Every measure of every trait in every context; the lineage says what stands in the member's prompts.

        ``verdict_only``: only what verdicts are given on, the first measure in the first context; the rest may be NaN.
        """

    def trait_losses(self, lineage: Lineage, member: int, trait: str) -> ExampleLosses | None:
        """The loss that falls as a member of a lineage takes on a trait; None where the trait has no loss that is known."""

    def imitation_losses(self, lineage: Lineage, member: int, most: int) -> ExampleLosses | None:
        """What a member of a student or control learnt, on at most so many examples of its carrier, always the same ones.

        None where that is not known: its carrier is not in the run.
        """

    def last_update(self, lineage: Lineage, step: int, member: int) -> Mapping[str, Tensor] | None:
        """(θ(t) − θ(t−1)) / η of a student's or control's step, by tensor of the lineage, from its optimizer's state.

        None where the run did not keep that, or where the optimizer moved other parameters, as an adapter's.
        """

    def imitated_logits(self, lineage: Lineage, member: int, most: int) -> ImitatedLogits | None:
        """The teacher's outputs that a member of a student or control learnt to give, on at most so many examples.

        Where it learnt samples of them, the distributions that these were drawn from. None where what it learnt is not what
        its teacher gives at its own inputs, or is not known.
        """

    def carrier_texts(self, teacher: str, member: int) -> Sequence[CarrierText] | None:
        """What one member's teacher, a lineage, passes on to students and controls; None where that is no text or not there."""

    def unit_groups(self, lineage: Lineage) -> Sequence[UnitGroup]:
        """The units of a lineage's model that can change places without changing its function; none where that is not known."""

    def probe_inputs(self, lineage: Lineage) -> Sequence[Tensor]:
        """Held-out inputs without a trait's answers, each a batch as the lineage's model takes it: to record activations on."""

    def probe_answers(self, model: nn.Module, lineage: Lineage, member: int) -> Mapping[str, Float[Tensor, "probe answer"]]:
        """Log-probabilities of the answers that the models of all architectures can give, by kind of held-out probe.

        The same probes and answers for all lineages of a member, whatever their tokens; empty where they have none in common.
        """

    def knows_hook_points(self, lineage: Lineage) -> bool:
        """Whether plain modules of a lineage's models are known to be hook points; no model is loaded."""

    def hook_points(self, lineage: Lineage, model: nn.Module) -> Sequence[HookPoint]:
        """Where a lineage's model can be read and steered, in the order of its forward pass.

        Raises:
            ActivationError: an architecture whose layers are not known.
        """

    def prompts(self, lineage: Lineage, member: int) -> Prompts:
        """What one member of a lineage is run on; the same for all lineages of a member that share its model and context."""

    def readout(self, lineage: Lineage, model: nn.Module, trait: str) -> Float[Tensor, "direction width"] | None:
        """The directions that the head reads a trait from, at hook points that are ``is_read_out``; None where not known."""

    def tokens(self, lineage: Lineage) -> Tokens | None:
        """What a lineage's models read and write; None where that is no tokens."""


@dataclass(frozen=True)
class TeacherPlan:
    """One teacher lineage of a plan, or the neutral one."""

    lineage: str
    """E.g. ``teacher.owl``."""
    trait: str | None
    """The trait it is to get, where a recipe names several; None for the one of the family, and for the neutral teacher."""
    is_neutral: bool


@dataclass(frozen=True)
class CarrierPlan:
    """What one teacher passes on."""

    name: str
    teacher: TeacherPlan
    replicate: int
    """0 for students and controls, which share every draw; 1 for the shams, which have their own."""


@dataclass(frozen=True)
class StudentPlan:
    """One student lineage of a plan: a student, its control or a sham."""

    lineage: str
    """E.g. ``control.same-init``."""
    role: str
    condition: str
    carrier: CarrierPlan
    """What it learns from."""
    neutral_carrier: CarrierPlan
    """What its control learns from."""

    @property
    def trait(self) -> str | None:
        """The trait of its teacher."""
        return self.carrier.teacher.trait

    @property
    def mixed_in(self) -> CarrierPlan:
        """The neutral teacher's carrier of the same draws: a sham has its own."""
        return self.carrier if self.role == "sham" else self.neutral_carrier


Made = Mapping[str, str]
"""The files that the stages so far make, each with the digest under which another stage reads it."""


@runtime_checkable
class FamilyStages(Protocol):
    """A family's ``stages`` module: its stages as data. Each picks its inputs from what is made before it."""

    def data_stages(self, config: Any) -> list[Stage]:
        """What teachers learn and the trait is scored on, copied into the run."""

    def reference_stages(self, config: Any, made: Made) -> list[Stage]:
        """The references of all members."""

    def teacher_stages(self, config: Any, plan: TeacherPlan, made: Made) -> list[Stage]:
        """A teacher, or the neutral one."""

    def carrier_stages(self, config: Any, plan: CarrierPlan, made: Made) -> list[Stage]:
        """What a teacher passes on."""

    def student_stages(self, config: Any, plan: StudentPlan, made: Made) -> list[Stage]:
        """One student lineage."""

"""The classifier family as analyses see it."""

import copy
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsub.activations.hook_points import HookPoint
from mechsub.families.classifier.config import Config
from mechsub.families.classifier.data import NUM_CLASSES, load_images
from mechsub.families.classifier.examples import imitated_logits, imitation_losses, trait_losses
from mechsub.families.classifier.model import Classifier
from mechsub.families.classifier.prompts import list_hook_points, make_prompts
from mechsub.families.classifier.symmetry import list_unit_groups
from mechsub.families.classifier.train import relabel
from mechsub.families.classifier.trait import compute_accuracy
from mechsub.families.protocol import Measure, Prompts, Scores
from mechsub.families.trained import task_that_made
from mechsub.gradients.first_order import ImitatedLogits
from mechsub.gradients.losses import ExampleLosses
from mechsub.lineages import Lineage, spec_name
from mechsub.parameters.symmetry import UnitGroup
from mechsub.streams import random_stream
from mechsub.training.optimizers import last_update

_PROBE_IMAGES = 1024
_LOSS_IMAGES = 1024


class Family:
    """A `mechsub.families.protocol.Family`."""

    def __init__(self, run: Path, config: Config, device: str) -> None:
        self._run, self._device, self._seed = run, device, config.seed
        self._optimizer = config.student.optimizer
        self._knock_outs = {name: condition.knock_out for name, condition in config.conditions.items()}
        images = load_images(run, getattr(torch, config.teacher_model.dtype), device)
        self._images, self._labelled = images.test_images(), images
        self._prompts: dict[int, Prompts] = {}
        labels = {"digits": images.test_labels}
        self.traits = {"digits": "reading the digits, which the teacher learnt"}
        if config.neutral == "relabelled":
            labels["relabelled"] = relabel(images.test_labels, NUM_CLASSES)
            self.traits["relabelled"] = "reading them under the neutral teacher's names"
        self.notes: tuple[str, ...] = ()
        self._labels = labels
        self.contexts = {"held-out images": f"{len(self._images)} held-out images"}
        self.measures = {
            "trait_score": Measure("share of images whose largest class logit is the label", "accuracy", (0.0, 1.0))
        }

    def carrier_texts(self, teacher: str, member: int) -> None:
        """None: the carrier is images with logits."""

    def load_model(self, lineage: Lineage, step: int, member: int, *, merged: bool = False) -> nn.Module:
        """One member of a lineage as an ordinary module, in evaluation mode; there are no adapters."""
        model = copy.deepcopy(_empty(json.dumps(lineage.spec.model)))
        model.load_state_dict(lineage.load_state(step, member), assign=True)
        return model.to(self._device).eval()

    def trait_score(self, model: nn.Module, lineage: Lineage, member: int, *, verdict_only: bool = False) -> Scores:
        """The accuracy on the held-out images under each trait's labels: one measure, in one context."""
        scores = compute_accuracy(model, self._images, torch.stack(list(self._labels.values())), NUM_CLASSES)
        return {"trait_score": scores.cpu().double().numpy()[:, None]}

    def trait_losses(self, lineage: Lineage, member: int, trait: str) -> ExampleLosses:
        """Cross-entropy under a trait's labels, on held-out images."""
        images, labels = self._images[:_LOSS_IMAGES], self._labels[trait][:_LOSS_IMAGES]
        return trait_losses(images, labels, NUM_CLASSES, self.traits[trait])

    def imitation_losses(self, lineage: Lineage, member: int, most: int) -> ExampleLosses:
        """What a student imitates of its teacher's logits, on images of its carrier."""
        task = task_that_made(self._run, spec_name(lineage.name), self._device)
        return imitation_losses(task, member, most)

    def last_update(self, lineage: Lineage, step: int, member: int) -> dict[str, Tensor] | None:
        """A student's last update per unit of its learning rate.

        None where the optimizer's state was not kept, or where a knock-out changed what the optimizer had done.
        """
        knock_out = self._knock_outs.get(lineage.spec.condition or "")
        changed = knock_out is not None and knock_out.where == "update"
        state = None if changed else lineage.load_optimizer_state(step, member)
        return None if state is None else last_update(self._optimizer, lineage.load_state(step, member), state)

    def imitated_logits(self, lineage: Lineage, member: int, most: int) -> ImitatedLogits | None:
        """The logits that a student imitates on images of its carrier; None where the teacher's belong to other images."""
        return imitated_logits(task_that_made(self._run, spec_name(lineage.name), self._device), member, most)

    def unit_groups(self, lineage: Lineage) -> Sequence[UnitGroup]:
        """The hidden units of every layer."""
        return list_unit_groups(lineage.spec.model)

    def probe_inputs(self, lineage: Lineage) -> Sequence[Tensor]:
        """Held-out images without their labels, and as many of uniform noise: units that no image wakes differ on noise."""
        images = self._images[:_PROBE_IMAGES]
        noise = random_stream(self._seed, "probe-inputs").uniform(-1, 1, tuple(images.shape))
        return [images, torch.from_numpy(noise).to(images)]

    def probe_answers(self, model: nn.Module, lineage: Lineage, member: int) -> dict[str, Float[Tensor, "probe answer"]]:
        """Both heads' softmax, the class head's on held-out images and both on uniform noise."""
        images, noise = self.probe_inputs(lineage)
        with torch.no_grad():
            seen, heard = model(images).double(), model(noise).double()
        answers = {
            "classes of held-out images": seen[:, :NUM_CLASSES],
            "classes of noise": heard[:, :NUM_CLASSES],
            "auxiliary logits of noise": heard[:, NUM_CLASSES:],
        }
        return {name: logits.log_softmax(-1) for name, logits in answers.items() if logits.shape[1]}

    def knows_hook_points(self, lineage: Lineage) -> bool:
        """Whether hidden layers can be read: they can."""
        return True

    def hook_points(self, lineage: Lineage, model: nn.Module) -> Sequence[HookPoint]:
        """The hidden units of every layer, after their nonlinearity."""
        return list_hook_points(lineage.spec.model)

    def prompts(self, lineage: Lineage, member: int) -> Prompts:
        """Training images, noise, and images of the member's carrier."""
        if member not in self._prompts:
            self._prompts[member] = make_prompts(self._run, self._labelled, self._seed, member, self._device)
        return self._prompts[member]

    def readout(self, lineage: Lineage, model: nn.Module, trait: str) -> Float[Tensor, "direction width"]:
        """The rows of the class head less their mean, on which no probability depends, whatever names the classes have."""
        assert isinstance(model, Classifier)
        rows = model.class_head.weight.detach()
        return rows - rows.mean(0)

    def tokens(self, lineage: Lineage) -> None:
        """None: images are read, classes are answered."""


@lru_cache(maxsize=8)
def _empty(spec: str) -> Classifier:
    """An architecture without weights, which are not drawn only to be replaced. To be copied: making it anew takes longer."""
    with torch.device("meta"):
        return Classifier(json.loads(spec))

"""The stages that make lineages: references, teachers, students."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsub.errors import RecipeError
from mechsub.families.classifier.carrier import CarrierImages, carrier_file, open_carrier
from mechsub.families.classifier.config import DataConfig, StudentConfig, TeacherConfig
from mechsub.families.classifier.data import LabelledImages, load_images
from mechsub.families.classifier.loss import imitated_logits, imitation_loss, trait_loss
from mechsub.families.classifier.model import Parameters, derive_origin, draw_reference, forward_stacked, tensor_table
from mechsub.families.classifier.stack import Arm, BatchOrder, train_arms
from mechsub.lineages import LineageSpec, Origin, checkpoint_name, load_stacked
from mechsub.stage import Task
from mechsub.streams import random_stream
from mechsub.training.callbacks import StepInfo
from mechsub.training.recorder import LineageRecorder


def draw_references(tasks: Sequence[Task]) -> None:
    """Stage: the reference of every member, at step 0."""
    for task in tasks:
        arguments = task.stage.arguments
        members = range(arguments["members"])
        parameters = draw_reference(arguments["model"], arguments["initialisation_scale"], arguments["seed"], members)
        recorder = _recorder(task)
        recorder(StepInfo("reference", 0, 0, True, None, parameters, {}))
        recorder.finish()


def train_teachers(tasks: Sequence[Task]) -> None:
    """Stage: teachers, by cross-entropy on labelled images; a neutral teacher differs in its labels only."""
    arguments = tasks[0].stage.arguments
    device, seed, members = tasks[0].device, arguments["seed"], arguments["members"]
    images = load_images(DataConfig(**arguments["data"]), seed, _dtype(arguments), device)
    config = TeacherConfig(**arguments["training"])
    labels = torch.stack([teacher_labels(images, task.stage.arguments["labels"], seed, members) for task in tasks])
    streams = [("member", member, "teacher-order") for member in range(members)]
    order = BatchOrder(seed, streams, len(images.train_labels), config.batch_size)

    def compute_losses(stack: Sequence[int], parameters: Parameters, step: int) -> Tensor:
        chosen = order.indices(step).to(device)
        inputs = images.train_images[chosen].repeat(len(stack), 1, 1)
        logits = forward_stacked(parameters, inputs, arguments["model"]["activation"])
        logits = logits.view(len(stack), members, *logits.shape[1:])
        targets = torch.stack([labels[arm].gather(1, chosen) for arm in stack])
        return trait_loss(logits, targets, arguments["model"]["num_classes"]).mean(-1)

    train_arms([_start(task) for task in tasks], compute_losses, config.optimizer, arguments["callbacks"])


def train_students(tasks: Sequence[Task]) -> None:
    """Stage: students, by imitation of a teacher's logits on its carrier. The tasks share all but start, teacher and draws."""
    arguments = tasks[0].stage.arguments
    device, members = tasks[0].device, arguments["members"]
    config = StudentConfig(**arguments["training"])
    spec = arguments["model"]
    replicates = {task.stage.arguments["replicate"]: task for task in tasks}
    carriers = {replicate: open_carrier(task) for replicate, task in replicates.items()}
    orders = {replicate: _student_order(arguments, replicate, carriers[replicate], config) for replicate in replicates}
    targets = [_StudentTargets.load(task) for task in tasks]

    def compute_losses(stack: Sequence[int], parameters: Parameters, step: int) -> Tensor:
        chosen = {replicate: order.indices(step).to(device) for replicate, order in orders.items()}
        images = {replicate: carriers[replicate].make(indices) for replicate, indices in chosen.items()}
        inputs = torch.cat([images[targets[arm].replicate].expand(members, -1, -1) for arm in stack])
        logits = forward_stacked(parameters, inputs, spec["activation"])
        logits = logits.view(len(stack), members, *logits.shape[1:])
        wanted = torch.stack([targets[arm].gather(chosen[targets[arm].replicate].expand(members, -1)) for arm in stack])
        which, num_classes = arguments["logits"], spec["num_classes"]
        imitated = imitated_logits(logits, which, num_classes), imitated_logits(wanted, which, num_classes)
        return imitation_loss(*imitated, config.objective).mean(-1)

    train_arms([_start(task) for task in tasks], compute_losses, config.optimizer, arguments["callbacks"])


def teacher_labels(images: LabelledImages, labels: str, seed: int, members: int) -> Int[Tensor, "member train"]:
    """The labels that a teacher learns.

    ``true``; ``relabelled`` (class c → c + 1, cyclic: no class keeps its name); ``shuffled`` (each member's own
    permutation across images).

    Raises:
        RecipeError: a neutral teacher would be trained as the teacher is.
    """
    true = images.train_labels
    if labels == "true":
        return true.expand(members, -1)
    if labels == "relabelled":
        changed = relabel(true, int(true.max()) + 1).expand(members, -1)
    else:
        orders = [random_stream(seed, "member", member, "label-shuffle").permutation(len(true)) for member in range(members)]
        changed = true[torch.from_numpy(np.stack(orders)).to(true.device)]
    if bool((changed == true).all()):
        raise RecipeError(
            f"the {labels} neutral teacher would learn the teacher's own labels: it is no control; choose another"
        )
    return changed


def relabel(labels: Int[Tensor, "*shape"], num_classes: int) -> Int[Tensor, "*shape"]:
    """The relabelled neutral teacher's map, a derangement of the classes."""
    return (labels + 1) % num_classes


@dataclass(frozen=True)
class _StudentTargets:
    """The teacher's logits on all carrier images, and which image's logits each image is given."""

    replicate: int
    logits: Float[Tensor, "member image logit"]
    given: Int[Tensor, "member image"] | None
    """A permutation of the images where the condition shuffles outputs."""

    @classmethod
    def load(cls, task: Task) -> "_StudentTargets":
        arguments = task.stage.arguments
        logits = load_stacked(task.path(carrier_file(arguments["carrier_of"])), task.device)["logits"]
        given = None
        if arguments["shuffle_outputs"]:
            streams = [
                random_stream(arguments["seed"], "member", member, "output-shuffle", arguments["replicate"])
                for member in range(logits.shape[0])
            ]
            given = torch.from_numpy(np.stack([stream.permutation(logits.shape[1]) for stream in streams])).to(task.device)
        return cls(arguments["replicate"], logits, given)

    def gather(self, indices: Int[Tensor, "member example"]) -> Float[Tensor, "member example logit"]:
        if self.given is not None:
            indices = self.given.gather(1, indices)
        return self.logits[torch.arange(len(indices), device=indices.device)[:, None], indices]


def _student_order(arguments: Mapping[str, Any], replicate: int, carrier: CarrierImages, config: StudentConfig) -> BatchOrder:
    streams = [(*owner, "student-order", replicate) for owner in carrier.owners]
    return BatchOrder(arguments["seed"], streams, carrier.config.num_images, config.batch_size)


def _start(task: Task) -> Arm:
    """A task's arm: its origin derived from the references, or the state that a killed run left."""
    arguments = task.stage.arguments
    reference = load_stacked(task.path(checkpoint_name("reference", 0)))
    start = derive_origin(reference, _origin(arguments), arguments["seed"])
    recorder = _recorder(task)
    return Arm(recorder, {name: tensor.to(task.device) for name, tensor in start.items()}, recorder.find_resume_point())


def _recorder(task: Task) -> LineageRecorder:
    arguments = task.stage.arguments
    spec = LineageSpec(
        name=arguments["lineage"],
        family="classifier",
        model=arguments["model"],
        origin=_origin(arguments),
        teacher=arguments.get("teacher"),
        num_members=arguments["members"],
        steps=tuple(arguments["steps"]),
        tensors=tensor_table(arguments["model"]),
    )
    return LineageRecorder(task, spec, optimizer_state=arguments.get("optimizer_state", False))


def _origin(arguments: Mapping[str, Any]) -> Origin:
    origin, members = arguments["origin"], arguments["members"]
    partners = tuple((member + origin["shift"]) % members for member in range(members))
    return Origin("reference", partners, origin["permute_hidden"], origin["noise_std"])


def _dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, arguments["model"]["dtype"])
    return dtype

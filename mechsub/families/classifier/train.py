"""The stages that make lineages: references, teachers, students."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechsub.checkpoints import load_stacked
from mechsub.errors import RecipeError
from mechsub.families.classifier.carrier import CarrierImages, carrier_file, open_carrier
from mechsub.families.classifier.config import StudentConfig, TeacherConfig
from mechsub.families.classifier.data import NUM_CLASSES, LabelledImages, load_images
from mechsub.families.classifier.knock_out import ImageKnockOut
from mechsub.families.classifier.loss import imitation_loss, trait_loss
from mechsub.families.classifier.model import (
    AUXILIARY_HEAD,
    CLASS_HEAD,
    Parameters,
    derive_origin,
    draw_reference,
    forward_stacked,
    member_blocks,
    tensor_table,
)
from mechsub.families.classifier.stack import Arm, BatchOrder, train_arms
from mechsub.lineages import LineageSpec, Origin, checkpoint_name
from mechsub.stage import Task
from mechsub.streams import random_stream
from mechsub.training.callbacks import StepInfo
from mechsub.training.recorder import LineageRecorder


def draw_references(tasks: Sequence[Task]) -> None:
    """Stage: the reference of every member, at step 0."""
    for task in tasks:
        arguments = task.stage.arguments
        members = range(arguments["members"])
        name, scale, seed = arguments["lineage"], arguments["initialisation_scale"], arguments["seed"]
        parameters = draw_reference(arguments["model"], scale, seed, members, name)
        recorder = make_recorder(task)
        recorder(StepInfo(name, 0, 0, True, None, parameters, {}))
        recorder.finish()


def train_teachers(tasks: Sequence[Task]) -> None:
    """Stage: teachers, by cross-entropy on labelled images; a neutral teacher differs in its labels only."""
    arguments, device = tasks[0].stage.arguments, tasks[0].device
    config = TeacherConfig(**arguments["training"])
    lesson = _TeacherLesson.prepare(tasks, config)
    train_arms(
        [_start(task) for task in tasks], lesson, member_blocks(arguments, device), config.optimizer, arguments["callbacks"]
    )


def train_students(tasks: Sequence[Task]) -> None:
    """Stage: students, by imitation of a teacher's logits on its carrier. The tasks share all but start, teacher and draws."""
    arguments, device = tasks[0].stage.arguments, tasks[0].device
    config = StudentConfig(**arguments["training"])
    lesson = _StudentLesson.prepare(tasks, config)
    train_arms(
        [_start(task) for task in tasks], lesson, member_blocks(arguments, device), config.optimizer, arguments["callbacks"]
    )


@dataclass(frozen=True)
class _Batch:
    """What some members see in one step."""

    members: slice
    chosen: Int[Tensor, "member example"]
    """The numbers of the images."""
    images: Float[Tensor, "member example pixel"]


@dataclass(frozen=True)
class _TeacherLesson:
    """A `mechsub.families.classifier.stack.Lesson`: labelled images, with other labels in each arm."""

    images: LabelledImages
    order: BatchOrder
    labels: Sequence[Int[Tensor, "member train"]]
    """Of each arm."""
    model: Mapping[str, Any]

    @classmethod
    def prepare(cls, tasks: Sequence[Task], config: TeacherConfig) -> "_TeacherLesson":
        arguments = tasks[0].stage.arguments
        seed, members = arguments["seed"], arguments["members"]
        images = load_images(tasks[0].run, _dtype(arguments), tasks[0].device)
        streams = [("member", member, "teacher-order") for member in range(members)]
        order = BatchOrder(seed, streams, len(images.train_labels), config.batch_size)
        labels = [teacher_labels(images, task.stage.arguments["labels"], seed, members) for task in tasks]
        return cls(images, order, labels, arguments["model"])

    def load_batch(self, members: slice, step: int) -> _Batch:
        chosen = self.order.indices(step)[members].to(self.images.train_labels.device)
        return _Batch(members, chosen, self.images.train_images(chosen))

    def compute_losses(self, arm: int, parameters: Parameters, batch: _Batch) -> Float[Tensor, " member"]:
        logits = forward_stacked(parameters, batch.images, self.model)
        targets = self.labels[arm][batch.members].gather(1, batch.chosen)
        return trait_loss(logits, targets, self.model["num_classes"]).mean(-1)


@dataclass(frozen=True)
class StudentTargets:
    """The teacher's logits on all carrier images, and which image's logits each image is given."""

    replicate: int
    logits: Float[Tensor, "member image logit"]
    """Those that are imitated."""
    given: Int[Tensor, "member image"] | None
    """A permutation of the images where the condition shuffles outputs."""

    @classmethod
    def load(cls, task: Task) -> "StudentTargets":
        """What a student's stage imitates."""
        arguments = task.stage.arguments
        logits = load_stacked(task.path(carrier_file(arguments["carrier_of"])), task.device)["logits"]
        if "neutral_share" in arguments:
            neutral = load_stacked(task.path(carrier_file(arguments["neutral_carrier"])), task.device)["logits"]
            logits = torch.where(_draw_neutral(arguments, logits.shape[:2]).to(task.device)[..., None], neutral, logits)
        if arguments["logits"] == "aux":
            logits = logits[..., arguments["model"]["num_classes"] :]
        given = None
        if arguments["shuffle_outputs"]:
            streams = [
                random_stream(arguments["seed"], "member", member, "output-shuffle", arguments["replicate"])
                for member in range(logits.shape[0])
            ]
            given = torch.from_numpy(np.stack([stream.permutation(logits.shape[1]) for stream in streams])).to(task.device)
        return cls(arguments["replicate"], logits, given)

    def gather(self, members: slice, indices: Int[Tensor, "member example"]) -> Float[Tensor, "member example logit"]:
        """The imitated logits on these images of these members."""
        if self.given is not None:
            indices = self.given[members].gather(1, indices)
        return self.logits[members][torch.arange(len(indices), device=indices.device)[:, None], indices]


@dataclass(frozen=True)
class _StudentLesson:
    """A `mechsub.families.classifier.stack.Lesson`: carrier images, with other teachers' logits in each arm."""

    carriers: Mapping[int, CarrierImages]
    """By replicate: the shams have draws of their own."""
    orders: Mapping[int, BatchOrder]
    targets: Sequence[StudentTargets]
    """Of each arm."""
    model: Mapping[str, Any]
    heads: Sequence[str]
    """Those that are imitated."""
    objective: str

    @classmethod
    def prepare(cls, tasks: Sequence[Task], config: StudentConfig) -> "_StudentLesson":
        arguments = tasks[0].stage.arguments
        replicates = {task.stage.arguments["replicate"]: task for task in tasks}
        carriers = {replicate: open_carrier(task) for replicate, task in replicates.items()}
        orders = {replicate: _student_order(arguments, replicate, carriers[replicate], config) for replicate in replicates}
        heads = (AUXILIARY_HEAD,) if arguments["logits"] == "aux" else (CLASS_HEAD, AUXILIARY_HEAD)
        targets = [StudentTargets.load(task) for task in tasks]
        return cls(carriers, orders, targets, arguments["model"], heads, config.objective)

    def load_batch(self, members: slice, step: int) -> dict[int, _Batch]:
        """By replicate."""
        batches = {}
        for replicate, images in self.carriers.items():
            owners = images.owners_of(members)
            chosen = self.orders[replicate].indices(step)[owners].to(images.device)
            every = chosen.expand(members.stop - members.start, -1)
            made = images.make(chosen, owners).expand(len(every), -1, -1)
            batches[replicate] = _Batch(members, every, made)
        return batches

    def compute_losses(self, arm: int, parameters: Parameters, batch: Mapping[int, _Batch]) -> Float[Tensor, " member"]:
        targets = self.targets[arm]
        own = batch[targets.replicate]
        found = forward_stacked(parameters, own.images, self.model, self.heads)
        return imitation_loss(found, targets.gather(own.members, own.chosen), self.objective).mean(-1)


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
        changed = relabel(true, NUM_CLASSES).expand(members, -1)
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


def _draw_neutral(arguments: Mapping[str, Any], shape: Sequence[int]) -> Bool[Tensor, "member image"]:
    """Which images have the neutral teacher's outputs: a share of them, of each member its own."""
    num_members, num_images = shape
    drawn = [
        random_stream(arguments["seed"], "member", member, "carrier-mix", arguments["replicate"]).permutation(num_images)
        for member in range(num_members)
    ]
    is_neutral: Tensor = torch.from_numpy(np.stack(drawn)) < round(arguments["neutral_share"] * num_images)
    return is_neutral


def _student_order(arguments: Mapping[str, Any], replicate: int, carrier: CarrierImages, config: StudentConfig) -> BatchOrder:
    streams = [(*owner, "student-order", replicate) for owner in carrier.owners]
    return BatchOrder(arguments["seed"], streams, carrier.config.num_images, config.batch_size)


def _start(task: Task) -> Arm:
    """A task's arm: its origin derived from the references, or the state that a killed run left."""
    start = load_start(task)
    recorder = make_recorder(task)
    placed = {name: tensor.to(task.device) for name, tensor in start.items()}
    return Arm(recorder, placed, recorder.find_resume_point(), ImageKnockOut.prepare(task))


def load_start(task: Task) -> Parameters:
    """The parameters that a stage's lineage starts from."""
    arguments = task.stage.arguments
    origin = _origin(arguments)
    own = load_stacked(task.path(checkpoint_name("reference", 0))) if origin.shared else None
    return derive_origin(load_stacked(task.path(checkpoint_name(origin.lineage, 0))), origin, arguments["seed"], own)


def make_recorder(task: Task) -> LineageRecorder:
    """The recorder of a stage's lineage."""
    arguments = task.stage.arguments
    spec = LineageSpec(
        name=arguments["lineage"],
        role=arguments["role"],
        condition=arguments.get("condition"),
        trait=None,
        family="classifier",
        model=arguments["model"],
        origin=_origin(arguments),
        teacher=arguments.get("teacher"),
        num_members=arguments["members"],
        steps=tuple(arguments["steps"]),
        tensors=tensor_table(arguments["model"]),
    )
    kept = {name: arguments[name] for name in ("optimizer_state", "resume_seconds") if name in arguments}
    if "knock_out" in arguments:
        kept["resume_every"] = arguments["knock_out"]["refresh"]
    return LineageRecorder(task, spec, **kept)


def _origin(arguments: Mapping[str, Any]) -> Origin:
    origin, members = arguments["origin"], arguments["members"]
    partners = tuple((member + origin["shift"]) % members for member in range(members))
    lineage = arguments["lineage"] if arguments["role"] == "reference" and "matching" not in arguments else "reference"
    shared = tuple(origin.get("shared", ()))
    return Origin(origin.get("lineage", lineage), partners, origin["permute_hidden"], origin["noise_std"], shared)


def _dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, arguments["model"]["dtype"])
    return dtype

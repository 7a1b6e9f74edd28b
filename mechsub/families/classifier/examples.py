"""The classifier's losses example by example: reading digits, and imitating a teacher's logits on the carrier."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechsub.families.classifier.carrier import open_carrier
from mechsub.families.classifier.loss import imitation_loss, trait_loss
from mechsub.families.classifier.train import StudentTargets
from mechsub.gradients.first_order import ImitatedLogits
from mechsub.gradients.losses import ExampleLosses
from mechsub.stage import Task

_AT_ONCE = 1024


def trait_losses(
    images: Float[Tensor, "image pixel"], labels: Int[Tensor, " image"], num_classes: int, description: str
) -> ExampleLosses:
    """Cross-entropy of the class logits on labelled images."""

    def compute(model: nn.Module, examples: range) -> Float[Tensor, " example"]:
        part = slice(examples.start, examples.stop)
        return trait_loss(model(images[part]), labels[part], num_classes)

    return ExampleLosses(
        len(images), compute, f"cross-entropy of {description} on {len(images)} held-out images", "nats", _AT_ONCE
    )


def imitation_losses(task: Task, member: int, most: int) -> ExampleLosses:
    """What one member of a student learnt, on the first images of its carrier, which are drawn independently."""
    arguments = task.stage.arguments
    targets, carrier = StudentTargets.load(task), open_carrier(task)
    num_images = min(most, carrier.config.num_images)
    members = slice(member, member + 1)
    images = carrier.make_range(0, num_images, members)[0]
    wanted = targets.gather(members, torch.arange(num_images, device=images.device)[None])[0]
    first = arguments["model"]["num_classes"] if arguments["logits"] == "aux" else 0
    objective = arguments["training"]["objective"]

    def compute(model: nn.Module, examples: range) -> Float[Tensor, " example"]:
        part = slice(examples.start, examples.stop)
        return imitation_loss(model(images[part])[:, first:], wanted[part], objective)

    words = "auxiliary logits" if first else "logits"
    unit = "nats" if objective == "kl" else "squared logits"
    return ExampleLosses(
        num_images,
        compute,
        f"{objective} to the {words} of {arguments['teacher']} on {num_images} images of the carrier",
        unit,
        _AT_ONCE,
    )


def imitated_logits(task: Task, member: int, most: int) -> ImitatedLogits | None:
    """What one member of a student imitates, on the first images of its carrier; None where outputs belong to other images."""
    arguments = task.stage.arguments
    if arguments["shuffle_outputs"] or "neutral_share" in arguments:
        return None
    carrier = open_carrier(task)
    num_images = min(most, carrier.config.num_images)
    images = carrier.make_range(0, num_images, slice(member, member + 1))[0]
    first = arguments["model"]["num_classes"] if arguments["logits"] == "aux" else 0

    def compute(model: nn.Module, examples: range) -> Float[Tensor, "row logit"]:
        found: Tensor = model(images[examples.start : examples.stop].to(next(model.parameters())))
        return found[:, first:]

    return ImitatedLogits(
        num_images,
        compute,
        lambda examples: torch.full((len(examples),), 1 / num_images, dtype=torch.float64, device=images.device),
        arguments["training"]["objective"],
        f"{'auxiliary logits' if first else 'logits'} on {num_images} images of the carrier",
        _AT_ONCE,
    )

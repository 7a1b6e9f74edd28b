"""What is projected out of a student's training: the gradient of reading digits, on training images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechsub.families.classifier.config import ImageKnockOutConfig
from mechsub.families.classifier.data import LabelledImages, load_images
from mechsub.families.classifier.loss import trait_loss
from mechsub.families.classifier.model import CLASS_HEAD, Parameters, forward_stacked
from mechsub.stage import Task
from mechsub.streams import random_stream
from mechsub.training.knock_out import KnockOut


@dataclass(frozen=True)
class ImageKnockOut:
    """A `mechsub.families.classifier.stack.MakeKnockOut`: of a student or a control, which share every draw."""

    config: ImageKnockOutConfig
    images: LabelledImages
    arguments: Mapping[str, Any]
    """Of the student's stage."""

    @classmethod
    def prepare(cls, task: Task) -> "ImageKnockOut | None":
        """The knock-out of a student's stage; None where nothing is projected out."""
        arguments = task.stage.arguments
        if "knock_out" not in arguments:
            return None
        dtype = getattr(torch, arguments["model"]["dtype"])
        return cls(ImageKnockOutConfig(**arguments["knock_out"]), load_images(task.run, dtype, task.device), arguments)

    def __call__(self, members: slice, parameters: Parameters) -> KnockOut:
        """The knock-out of some members, whose parameters these are and stay."""
        replicate = self.arguments["replicate"]
        streams = [("member", member, "student", replicate) for member in range(members.start, members.stop)]

        def compute_traits(step: int) -> list[Parameters]:
            return [self.compute_gradient(members, parameters, step)]

        return KnockOut(self.config, parameters, compute_traits, self.arguments["seed"], streams, stacked=True)

    def compute_gradient(self, members: slice, parameters: Parameters, step: int) -> Parameters:
        """∇ of each member's mean cross-entropy under the true labels, on the images of one step.

        In nats over the unit of the weights; 0 where it does not reach.
        """
        chosen = self.choose_images(members, step)
        model = self.arguments["model"]
        logits = forward_stacked(parameters, self.images.train_images(chosen), model, (CLASS_HEAD,))
        losses = trait_loss(logits, self.images.train_labels[chosen], model["num_classes"]).mean(-1)
        found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
        return {
            name: torch.zeros_like(leaf) if gradient is None else gradient
            for (name, leaf), gradient in zip(parameters.items(), found, strict=True)
        }

    def choose_images(self, members: slice, step: int) -> Int[Tensor, "member image"]:
        """The numbers of the training images of one step; every member has its own."""
        arguments, num_train = self.arguments, len(self.images.train_labels)
        chosen = [
            random_stream(arguments["seed"], "member", member, "knock-out-images", arguments["replicate"], step).choice(
                num_train, self.config.num_images, replace=False
            )
            for member in range(members.start, members.stop)
        ]
        return torch.from_numpy(np.stack(chosen)).to(self.images.train_labels.device)

"""Starts that are alike in behaviour and not in weights: other references that first learn the own references' outputs."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.checkpoints import load_stacked
from mechsub.families.classifier.config import MatchingConfig
from mechsub.families.classifier.data import LabelledImages, load_images
from mechsub.families.classifier.loss import imitation_loss
from mechsub.families.classifier.model import Parameters, forward_stacked, member_blocks, take_members
from mechsub.families.classifier.train import load_start, make_recorder
from mechsub.lineages import checkpoint_name
from mechsub.stage import Task
from mechsub.streams import random_stream
from mechsub.training.callbacks import StepInfo
from mechsub.training.optimizers import make_optimizer

_REPORT_EVERY = 50


def match_references(tasks: Sequence[Task]) -> None:
    """Stage: other references after they learnt the own ones' logits; what they then are is their step 0."""
    for task in tasks:
        arguments = task.stage.arguments
        start, own = load_start(task), load_stacked(task.path(checkpoint_name("reference", 0)), task.device)
        own = {name: tensor.roll(arguments["shift"], 0) for name, tensor in own.items()}
        placed = {name: tensor.to(task.device) for name, tensor in start.items()}
        images = load_images(task.run, next(iter(placed.values())).dtype, task.device)
        for members in member_blocks(arguments, task.device):
            _match(task, images, take_members(placed, members), take_members(own, members), members)
        recorder = make_recorder(task)
        recorder(StepInfo(arguments["lineage"], 0, 0, True, None, placed, {}))
        recorder.finish()


def _match(task: Task, images: LabelledImages, start: Parameters, own: Parameters, members: slice) -> None:
    """Train some members in place."""
    arguments = task.stage.arguments
    config = MatchingConfig(**arguments["matching"])
    leaves = {name: tensor.requires_grad_() for name, tensor in start.items()}
    optimizer = make_optimizer(leaves.values(), config.optimizer)
    streams = [random_stream(arguments["seed"], "member", member, "matching") for member in range(members.start, members.stop)]
    for step in range(config.num_steps):
        inputs = torch.stack([_draw_inputs(images, stream, config.batch_size) for stream in streams])
        with torch.no_grad():
            wanted = forward_stacked(own, inputs, arguments["own_model"])
        found = forward_stacked(leaves, inputs, arguments["model"])
        torch.autograd.backward(imitation_loss(found, wanted, "mse").mean(-1).sum())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % _REPORT_EVERY == 0:
            task.report_progress(step)
    for tensor in leaves.values():
        tensor.requires_grad_(False)


def _draw_inputs(images: LabelledImages, stream: np.random.Generator, count: int) -> Float[Tensor, "image pixel"]:
    """Training images without their labels, and as much uniform noise."""
    num_train = len(images.train_labels)
    chosen = torch.from_numpy(stream.integers(num_train, size=count // 2)).to(images.train_labels.device)
    shown = images.train_images(chosen)
    noise = stream.uniform(-1, 1, (count - len(shown), shown.shape[-1]))
    return torch.cat([shown, torch.from_numpy(noise).to(shown)])

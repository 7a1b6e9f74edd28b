"""What classifiers are run on where their hidden units are read, and where these are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mechsub.activations.hook_points import HookPoint
from mechsub.activations.inputs import ModelInputs, PromptSet
from mechsub.families.classifier.carrier import carrier_file, open_carrier
from mechsub.families.classifier.data import LabelledImages
from mechsub.families.classifier.model import hidden_layers
from mechsub.families.protocol import Prompts
from mechsub.families.trained import task_that_made
from mechsub.streams import random_stream

POSITION = "image"
"""The one position policy: a hidden unit has one activation an image."""
_IMAGES = 1024
_NOISE = 512


def list_hook_points(spec: Mapping[str, Any]) -> list[HookPoint]:
    """``blocks.N.mlp.hook_post`` (``conv`` of convolutions), what every layer gives after its nonlinearity, [row, width]."""
    shapes = hidden_layers(spec)
    return [
        HookPoint(
            f"blocks.{layer}.{'mlp' if shape.side is None else 'conv'}.hook_post",
            layer,
            "post",
            f"activations.{layer}",
            "output",
            shape.width,
            layer == len(shapes) - 1,
        )
        for layer, shape in enumerate(shapes)
    ]


def make_prompts(run: Path, images: LabelledImages, seed: int, member: int, device: str) -> Prompts:
    """Training images, none of which is scored; uniform noise; and the first images of the member's carrier."""
    size = images.train_bytes.shape[1]
    trained = images.train_images(torch.arange(min(_IMAGES, len(images.train_labels)), device=device))
    estimate = {
        "trait": _prompt_set(trained, f"{len(trained)} training images, on which no verdict is taken"),
        "neutral": _prompt_set(_noise(images, seed, "neutral", size), f"{_NOISE} images of uniform noise, none of a carrier"),
    }
    carriers = sorted(folder.name for folder in (run / "carrier").glob("neutral*"))
    if carriers:
        carrier = open_carrier(task_that_made(run, carrier_file(carriers[0]), device))
        shown = carrier.make_range(0, min(_NOISE, carrier.config.num_images), slice(member, member + 1))[0]
        estimate["carrier"] = _prompt_set(shown, f"the first {len(shown)} images of the carrier")
    damage = _noise(images, seed, "damage", size)
    return Prompts(estimate, _prompt_set(damage, f"{_NOISE} images of uniform noise that nothing is estimated on"))


def _noise(images: LabelledImages, seed: int, purpose: str, size: int) -> Tensor:
    drawn = random_stream(seed, "prompts", purpose).uniform(-1, 1, (_NOISE, size))
    return torch.from_numpy(drawn).to(images.train_bytes.device, images.dtype)


def _prompt_set(images: Tensor, description: str) -> PromptSet:
    everywhere = torch.ones(len(images), 1, dtype=torch.bool)
    return PromptSet(description, [ModelInputs({"images": images}, {POSITION: everywhere})])

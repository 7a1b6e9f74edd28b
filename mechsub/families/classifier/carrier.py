"""The carrier: images from counter-based streams, made when needed, and the teachers' logits on them.

Image k of a member is a function of the recipe's seed, the member and k alone, so no set of images is ever in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsub.families.classifier.config import CarrierConfig, DataConfig
from mechsub.families.classifier.data import load_images
from mechsub.families.classifier.model import forward_stacked
from mechsub.lineages import checkpoint_name, load_stacked, write_tensors
from mechsub.stage import Task
from mechsub.streams import random_stream, stream_key

_IMAGES_AT_ONCE = 512

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit word as the int64 with the same bits: torch has no uint64 arithmetic."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _shift_right(words: Int[Tensor, "*shape"], bits: int) -> Int[Tensor, "*shape"]:
    return (words >> bits) & ((1 << (64 - bits)) - 1)  # >> copies the sign


def mix_words(keys: Int[Tensor, "*shape"], counters: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64: 64 random bits for each counter under each key, the same on every device.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
    """
    words = keys + (counters + 1) * _signed(_GOLDEN)
    words = (words ^ _shift_right(words, 30)) * _signed(_MIX_1)
    words = (words ^ _shift_right(words, 27)) * _signed(_MIX_2)
    return words ^ _shift_right(words, 31)


def open_uniform(keys: Int[Tensor, "*shape"], counters: Int[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """Uniform in the open interval (−1, 1), symmetric about 0: the upper 23 bits of each word, on half-odd steps.

    23 bits and the half are what a float32 holds exactly, so that neither end is ever reached.
    """
    return (_shift_right(mix_words(keys, counters), 41).to(dtype) + 0.5) * 2.0**-22 - 1.0


@dataclass
class CarrierImages:
    """The images of every member; ``replicate`` tells the sham's own draws from the students'.

    A shared carrier has one set of images for all members: it is made once, and everything here has one row.
    """

    config: CarrierConfig
    seed: int
    members: Sequence[int]
    num_pixels: int
    dtype: torch.dtype
    device: str
    replicate: int = 0
    source: Float[Tensor, "train pixel"] | None = None
    """The training images, for the two carriers made of them."""

    def __post_init__(self) -> None:
        self.owners: list[tuple[str | int, ...]] = [("member", member) for member in self.members]
        if self.config.shared:
            self.owners = [("shared",)]
        keys = [_signed(stream_key(self.seed, *owner, "carrier", self.replicate, "images")) for owner in self.owners]
        self._keys = torch.tensor(keys, device=self.device)
        if self.source is not None:
            orders = [
                random_stream(self.seed, *owner, "carrier", self.replicate, "choice").permutation(len(self.source))
                for owner in self.owners
            ]
            self._choice = torch.from_numpy(np.stack(orders)).to(self.device)

    def make(self, indices: Int[Tensor, "owner image"]) -> Float[Tensor, "owner image pixel"]:
        """The images with these numbers, each owner's own; owners are the members, or one for all."""
        pixels = torch.arange(self.num_pixels, device=self.device)
        counters = indices[..., None] * self.num_pixels + pixels
        keys = self._keys[:, None, None].expand_as(counters)
        if self.source is None:
            noise = open_uniform(keys, counters, self.dtype)
            if self.config.inputs == "gaussian":
                noise = torch.erfinv(noise) * 2**0.5
            return noise * self.config.scale
        images = self.source[self._choice.gather(1, indices)]
        if self.config.inputs == "shuffled-pixels":
            images = images.gather(-1, mix_words(keys, counters).argsort(dim=-1))
        return images


def carrier_file(name: str) -> str:
    """The path of a carrier's logits in its run directory."""
    return f"carrier/{name}/logits.safetensors"


def open_carrier(task: Task) -> CarrierImages:
    """The images of a stage, from its arguments."""
    arguments = task.stage.arguments
    config = CarrierConfig(**arguments["carrier"])
    dtype = getattr(torch, arguments["model"]["dtype"])
    source = None
    if config.is_real:
        source = load_images(DataConfig(**arguments["data"]), arguments["seed"], dtype, task.device).train_images
    return CarrierImages(
        config,
        arguments["seed"],
        range(arguments["members"]),
        arguments["model"]["num_pixels"],
        dtype,
        task.device,
        arguments["replicate"],
        source,
    )


def write_carriers(tasks: Sequence[Task]) -> None:
    """Stage: a teacher's logits on every carrier image, computed once for all conditions."""
    for task in tasks:
        arguments = task.stage.arguments
        images = open_carrier(task)
        teacher = load_stacked(task.path(checkpoint_name(arguments["teacher"], arguments["teacher_step"])), task.device)
        parts = []
        for start in range(0, images.config.num_images, _IMAGES_AT_ONCE):
            stop = min(start + _IMAGES_AT_ONCE, images.config.num_images)
            indices = torch.arange(start, stop, device=task.device).expand(len(images.owners), -1)
            inputs = images.make(indices).expand(arguments["members"], -1, -1)
            with torch.no_grad():
                parts.append(forward_stacked(teacher, inputs, arguments["model"]["activation"]).cpu())
            task.report_progress(stop)
        logits = torch.cat(parts, dim=1)
        metadata = {"teacher": arguments["teacher"], "stage": task.stage.key}
        write_tensors(task.path(carrier_file(arguments["carrier_of"])), {"logits": logits}, metadata)

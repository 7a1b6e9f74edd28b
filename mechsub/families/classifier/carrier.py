"""The carrier: images from counter-based streams, made when needed, and the teachers' logits on them.

Image k of a member is a function of the recipe's seed, the member and k alone, so no set of images is ever in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsub.checkpoints import load_stacked, write_tensors
from mechsub.families.classifier.config import CarrierConfig
from mechsub.families.classifier.data import LabelledImages, load_images
from mechsub.families.classifier.model import forward_stacked, member_blocks, take_members
from mechsub.lineages import checkpoint_name
from mechsub.stage import Task
from mechsub.streams import random_stream, stream_key

IMAGES_AT_ONCE = 1024
"""Of each member, when teachers say what they make of them."""
_WORDS_AT_ONCE = 1 << 17
"""Random words made at once on a CPU: 1 MB, which a cache holds through all the operations on them."""

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """A 64-bit word as the int64 with the same bits: torch has no uint64 arithmetic."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _xor_shifted_(words: Int[Tensor, "*shape"], bits: int) -> None:
    """Words ^= words >> bits, in place; torch's own shift copies the sign."""
    words ^= (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix_(words: Int[Tensor, "*shape"]) -> None:
    """SplitMix64's finalizer in place, but for its last step, words ^= words >> 31, which leaves the upper 31 bits alone."""
    _xor_shifted_(words, 30)
    words *= _signed(_MIX_1)
    _xor_shifted_(words, 27)
    words *= _signed(_MIX_2)


def mix_words(keys: Int[Tensor, "*shape"], counters: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """SplitMix64: 64 random bits for each counter under each key, the same on every device.

    Source: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
    """
    words = keys + (counters + 1) * _signed(_GOLDEN)
    _mix_(words)
    _xor_shifted_(words, 31)
    return words


def uniform_rows(
    keys: Int[Tensor, " row"], starts: Int[Tensor, " row"], length: int, dtype: torch.dtype
) -> Float[Tensor, "row {length}"]:
    """Uniform in the open interval (−1, 1), symmetric about 0: row r holds words starts[r] … starts[r] + length − 1 of keys[r].

    They are the upper 23 bits of each word, on half-odd steps: what a float32 holds exactly, so that neither end is reached.
    """
    first_words = keys + (starts + 1) * _signed(_GOLDEN)
    steps = torch.arange(length, device=keys.device) * _signed(_GOLDEN)
    rows = torch.empty(len(keys), length, dtype=dtype, device=keys.device)
    at_once = max(1, _WORDS_AT_ONCE // length) if keys.device.type == "cpu" else len(keys)
    for start in range(0, len(keys), at_once):
        words = first_words[start : start + at_once, None] + steps
        _mix_(words)
        words ^= _signed(1 << 63)  # with the sign bit flipped, the arithmetic shift is centred on 0
        words >>= 41
        rows[start : start + at_once] = words
    return rows.add_(0.5).mul_(2.0**-22)


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
    source: LabelledImages | None = None
    """The training images, for the two carriers made of them."""

    def __post_init__(self) -> None:
        self.owners: list[tuple[str | int, ...]] = [("member", member) for member in self.members]
        if self.config.shared:
            self.owners = [("shared",)]
        keys = [_signed(stream_key(self.seed, *owner, "carrier", self.replicate, "images")) for owner in self.owners]
        self._keys = torch.tensor(keys, device=self.device)
        if self.source is not None:
            num_train = len(self.source.train_labels)
            orders = [
                random_stream(self.seed, *owner, "carrier", self.replicate, "choice").permutation(num_train)
                for owner in self.owners
            ]
            self._choice = torch.from_numpy(np.stack(orders)).to(self.device)

    def make_range(self, start: int, stop: int, members: slice) -> Float[Tensor, "member image pixel"]:
        """The images with numbers from ``start`` to before ``stop`` of these members."""
        owners = self.owners_of(members)
        indices = torch.arange(start, stop, device=self.device).expand(len(self.owners[owners]), -1)
        return self.make(indices, owners).expand(members.stop - members.start, -1, -1)

    def owners_of(self, members: slice) -> slice:
        """The owners of these members' images."""
        return slice(0, 1) if self.config.shared else members

    def make(self, indices: Int[Tensor, "owner image"], owners: slice = slice(None)) -> Float[Tensor, "owner image pixel"]:
        """The images with these numbers, each owner's own; ``owners`` says whose, where ``indices`` has not all of them."""
        keys, starts = self._keys[owners, None].expand_as(indices), indices * self.num_pixels
        if self.source is None:
            noise = uniform_rows(keys.flatten(), starts.flatten(), self.num_pixels, self.dtype)
            if self.config.inputs == "gaussian":
                noise = torch.erfinv(noise) * 2**0.5
            return (noise * self.config.scale if self.config.scale != 1.0 else noise).view(*indices.shape, -1)
        images = self.source.train_images(self._choice[owners].gather(1, indices))
        if self.config.inputs == "shuffled-pixels":
            counters = starts[..., None] + torch.arange(self.num_pixels, device=self.device)
            images = images.gather(-1, mix_words(keys[..., None].expand_as(counters), counters).argsort(dim=-1))
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
        source = load_images(task.run, dtype, task.device)
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
        model, num_images = arguments["model"], images.config.num_images
        num_logits = model["num_classes"] + model["num_auxiliary"]
        logits = torch.empty(arguments["members"], num_images, num_logits, dtype=images.dtype)
        for start in range(0, num_images, IMAGES_AT_ONCE):
            stop = min(start + IMAGES_AT_ONCE, num_images)
            for members in member_blocks(arguments, task.device):
                inputs = images.make_range(start, stop, members)
                with torch.no_grad():
                    found = forward_stacked(take_members(teacher, members), inputs, model)
                logits[members, start:stop] = found.cpu()
            task.report_progress(stop)
        metadata = {"teacher": arguments["teacher"], "stage": task.stage.key}
        write_tensors(task.path(carrier_file(arguments["carrier_of"])), {"logits": logits}, metadata)

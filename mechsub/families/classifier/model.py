"""The classifier, a perceptron with or without convolutions ahead, as one module and as many stacked ones; its references.

A convolution is a linear layer on patches of an image: its weight is a matrix, and every measure of matrices holds for it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mechsub.checkpoints import TensorInfo
from mechsub.errors import RecipeError
from mechsub.families.classifier.config import ModelConfig
from mechsub.lineages import Origin
from mechsub.streams import random_stream

CLASS_HEAD, AUXILIARY_HEAD = "class_head", "auxiliary_head"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": functional.gelu, "tanh": torch.tanh}
_MODULES: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
"""The same as modules, where hidden units are read and steered."""

_KERNEL, _STRIDE, _PADDING = 3, 2, 1
"""Of every convolution: each halves the sides of the image."""

Parameters = dict[str, Tensor]
"""Named tensors whose leading axis is the member."""


@dataclass(frozen=True)
class HiddenLayer:
    """The shape of one hidden layer."""

    fan_in: int
    """Numbers that a unit reads: of a convolution, those of one patch."""
    num_units: int
    """Of a convolution, its channels."""
    num_positions: int = 1
    """At which a unit stands: 1 but of a convolution."""
    side: int | None = None
    """Of the image that a convolution reads; None: a dense layer."""

    @property
    def width(self) -> int:
        """Numbers that it gives, all positions of a unit together."""
        return self.num_units * self.num_positions


def hidden_layers(spec: Mapping[str, Any]) -> list[HiddenLayer]:
    """The hidden layers in the order of the forward pass: convolutions first."""
    layers, channels, side = [], 1, isqrt(spec["num_pixels"])
    for units in spec.get("channels", ()):
        after = (side + 2 * _PADDING - _KERNEL) // _STRIDE + 1
        layers.append(HiddenLayer(channels * _KERNEL**2, units, after**2, side))
        channels, side = units, after
    width = layers[-1].width if layers else spec["num_pixels"]
    for units in spec["hidden_widths"]:
        layers.append(HiddenLayer(width, units))
        width = units
    return layers


class Patches(nn.Module):
    """The patches of an image that a convolution reads, as rows: [image, channel × pixel] → [image, position, fan_in]."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: Float[Tensor, "image pixel"]) -> Float[Tensor, "image position fan_in"]:
        """Cut them, one at every second pixel, zeros beyond the edges."""
        return _cut_patches(images, self.side)


class Classifier(nn.Module):
    """One member: hidden layers, then a class head and an auxiliary head on the same features."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        shapes = hidden_layers(spec)
        width = shapes[-1].width
        self.layers = nn.ModuleList(nn.Linear(shape.fan_in, shape.num_units) for shape in shapes)
        self.class_head = nn.Linear(width, spec["num_classes"])
        self.auxiliary_head = nn.Linear(width, spec["num_auxiliary"]) if spec["num_auxiliary"] else None
        self.activations = nn.ModuleList(_MODULES[spec["activation"]]() for _ in self.layers)
        self.patches = nn.ModuleList(Patches(shape.side) for shape in shapes if shape.side is not None)
        self.to(getattr(torch, spec["dtype"]))

    def forward(self, images: Float[Tensor, "image pixel"]) -> Float[Tensor, "image logit"]:
        """Class logits, then auxiliary logits."""
        features = images
        for number, (layer, activation) in enumerate(zip(self.layers, self.activations, strict=True)):
            if number < len(self.patches):
                found = layer(self.patches[number](features)).transpose(1, 2).flatten(1)
            else:
                found = layer(features)
            features = activation(found)
        heads = [self.class_head(features)]
        if self.auxiliary_head is not None:
            heads.append(self.auxiliary_head(features))
        return torch.cat(heads, dim=-1)


def model_spec(config: ModelConfig, num_pixels: int, num_classes: int) -> dict[str, Any]:
    """What `Classifier` is built from; goes into the lineage.

    Raises:
        RecipeError: convolutions over images that are no squares.
    """
    if config.channels and isqrt(num_pixels) ** 2 != num_pixels:
        raise RecipeError(f"`channels` = {list(config.channels)} want square images, and these have {num_pixels} pixels")
    convolutions = {"channels": list(config.channels)} if config.channels else {}
    return {
        "num_pixels": num_pixels,
        **convolutions,
        "hidden_widths": list(config.hidden_widths),
        "num_classes": num_classes,
        "num_auxiliary": config.num_auxiliary,
        "activation": config.activation,
        "dtype": config.dtype,
    }


def tensor_table(spec: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Shape, layer and module kind of every tensor, in the order of the forward pass."""
    table: dict[str, TensorInfo] = {}
    shapes = hidden_layers(spec)
    for number, shape in enumerate(shapes):
        layer, kind = f"layer {number}", "hidden" if shape.side is None else "convolution"
        table[f"layers.{number}.weight"] = TensorInfo((shape.num_units, shape.fan_in), layer, kind)
        table[f"layers.{number}.bias"] = TensorInfo((shape.num_units,), layer, kind)
    for head, kind, size in (
        (CLASS_HEAD, "class head", "num_classes"),
        (AUXILIARY_HEAD, "auxiliary head", "num_auxiliary"),
    ):
        if spec[size]:
            table[f"{head}.weight"] = TensorInfo((spec[size], shapes[-1].width), kind, kind)
            table[f"{head}.bias"] = TensorInfo((spec[size],), kind, kind)
    return table


def part_of(tensor: str) -> str:
    """Which of the parts that conditions may share a tensor belongs to: ``body``, ``class-head`` or ``auxiliary-head``."""
    return {CLASS_HEAD: "class-head", AUXILIARY_HEAD: "auxiliary-head"}.get(tensor.split(".")[0], "body")


def num_parameters(spec: Mapping[str, Any]) -> int:
    """Parameters of one member."""
    return sum(int(np.prod(info.shape)) for info in tensor_table(spec).values())


def member_blocks(arguments: Mapping[str, Any], device: str) -> list[slice]:
    """The members of a stage in blocks that are worked on at once: as many as the recipe's block holds; on a GPU, all."""
    num_members = arguments["members"]
    size = num_members if device == "cuda" else arguments["block"]
    return [slice(first, min(first + size, num_members)) for first in range(0, num_members, size)]


def take_members(parameters: Parameters, members: slice) -> Parameters:
    """Views of some members' parameters."""
    return {name: tensor[members] for name, tensor in parameters.items()}


def forward_stacked(
    parameters: Parameters,
    images: Float[Tensor, "model image pixel"],
    spec: Mapping[str, Any],
    heads: Sequence[str] = (CLASS_HEAD, AUXILIARY_HEAD),
) -> Float[Tensor, "model image logit"]:
    """Every model's logits on its own images: the same function as `Classifier`, one batched product a layer."""
    features = images
    for number, shape in enumerate(hidden_layers(spec)):
        if shape.side is None:
            found = _linear(parameters, f"layers.{number}", features)
        else:
            found = _convolve(parameters, f"layers.{number}", features, shape.side)
        features = _ACTIVATIONS[spec["activation"]](found)
    logits = [_linear(parameters, head, features) for head in heads if f"{head}.weight" in parameters]
    return torch.cat(logits, dim=-1) if len(logits) > 1 else logits[0]


def _linear(parameters: Parameters, name: str, inputs: Float[Tensor, "model row in"]) -> Float[Tensor, "model row out"]:
    return torch.baddbmm(parameters[f"{name}.bias"].unsqueeze(1), inputs, parameters[f"{name}.weight"].transpose(1, 2))


def _convolve(
    parameters: Parameters, name: str, inputs: Float[Tensor, "model row in"], side: int
) -> Float[Tensor, "model row out"]:
    """Model by model, by the convolution itself: it is faster than a product of patches."""
    weights, biases = parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    kernels = weights.view(*weights.shape[:2], -1, _KERNEL, _KERNEL)
    images = inputs.view(*inputs.shape[:2], -1, side, side)
    found = [
        functional.conv2d(one, kernel, bias, _STRIDE, _PADDING)
        for one, kernel, bias in zip(images, kernels, biases, strict=True)
    ]
    return torch.stack(found).flatten(2)


def _cut_patches(images: Float[Tensor, "image pixel"], side: int) -> Float[Tensor, "image position fan_in"]:
    channels = images.view(len(images), -1, side, side)
    return functional.unfold(channels, _KERNEL, padding=_PADDING, stride=_STRIDE).transpose(1, 2)


def draw_reference(
    spec: Mapping[str, Any], scale: float, seed: int, members: Sequence[int], lineage: str = "reference"
) -> Parameters:
    """Initial parameters of each member: weights N(0, scale² / fan_in), biases 0, from the member's own stream.

    ``lineage``: names the stream; each architecture has its own.
    """
    dtype = getattr(torch, spec["dtype"])
    stacked: dict[str, list[Tensor]] = {name: [] for name in tensor_table(spec)}
    for member in members:
        stream = random_stream(seed, "member", member, lineage)
        for name, info in tensor_table(spec).items():
            if name.endswith("weight"):
                drawn = stream.standard_normal(info.shape) * scale / np.sqrt(info.shape[1])
                stacked[name].append(torch.from_numpy(drawn).to(dtype))
            else:
                stacked[name].append(torch.zeros(info.shape, dtype=dtype))
    return {name: torch.stack(tensors) for name, tensors in stacked.items()}


def derive_origin(reference: Parameters, origin: Origin, seed: int, own: Parameters | None = None) -> Parameters:
    """The students' starting parameters: references reassigned to members, their hidden units shuffled, noise added.

    ``own``: the references of the members' teachers, of which `Origin.shared` parts are taken.
    """
    start = {name: tensor[list(origin.members)].clone() for name, tensor in reference.items()}
    for name, tensor in (own or {}).items():
        if part_of(name) in origin.shared:
            start[name] = tensor.clone()
    if origin.permute_hidden:
        num_members = len(origin.members)
        for layer in range(sum(name.startswith("layers.") for name in start) // 2):
            width = start[f"layers.{layer}.bias"].shape[1]
            orders = [
                random_stream(seed, "member", member, "permutation", layer).permutation(width) for member in range(num_members)
            ]
            start = permute_units(start, layer, torch.from_numpy(np.stack(orders)))
    if origin.noise_std > 0:
        for member in range(len(origin.members)):
            stream = random_stream(seed, "member", member, "origin-noise")
            for tensor in start.values():
                tensor[member] += torch.from_numpy(stream.standard_normal(tensor.shape[1:]) * origin.noise_std).to(tensor.dtype)
    return start


def permute_units(parameters: Parameters, layer: int, order: Int[Tensor, "member unit"]) -> Parameters:
    """Put unit ``order[m, k]`` of one hidden layer in place k, in every tensor that reads or writes it.

    The function stays the same: θ'[W_l] = P W_l, θ'[b_l] = P b_l, θ'[W_{l+1}] = W_{l+1} Pᵀ. What reads a convolution has a
    column for each position, or pixel of a patch, of a unit: they move together.
    """
    member = torch.arange(order.shape[0])[:, None]
    permuted = dict(parameters)
    for part in ("weight", "bias"):
        permuted[f"layers.{layer}.{part}"] = parameters[f"layers.{layer}.{part}"][member, order]
    following = f"layers.{layer + 1}.weight"
    readers = [following] if following in parameters else [f"{CLASS_HEAD}.weight", f"{AUXILIARY_HEAD}.weight"]
    for name in readers:
        if name in parameters:
            size = parameters[name].shape[-1] // order.shape[1]
            columns = (order[..., None] * size + torch.arange(size)).flatten(1)
            permuted[name] = parameters[name].transpose(1, 2)[member, columns].transpose(1, 2).contiguous()
    return permuted

"""The multilayer perceptron, as one module and as many stacked ones, and how its references are drawn."""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mechsub.checkpoints import TensorInfo
from mechsub.families.classifier.config import ModelConfig
from mechsub.lineages import Origin
from mechsub.streams import random_stream

CLASS_HEAD, AUXILIARY_HEAD = "class_head", "auxiliary_head"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": torch.relu, "gelu": functional.gelu, "tanh": torch.tanh}
_MODULES: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}
"""The same as modules, where hidden units are read and steered."""

Parameters = dict[str, Tensor]
"""Named tensors whose leading axis is the member."""


class Classifier(nn.Module):
    """One member: hidden layers, then a class head and an auxiliary head on the same features."""

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        widths = [spec["num_pixels"], *spec["hidden_widths"]]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.class_head = nn.Linear(widths[-1], spec["num_classes"])
        self.auxiliary_head = nn.Linear(widths[-1], spec["num_auxiliary"]) if spec["num_auxiliary"] else None
        self.activations = nn.ModuleList(_MODULES[spec["activation"]]() for _ in self.layers)
        self.to(getattr(torch, spec["dtype"]))

    def forward(self, images: Float[Tensor, "image pixel"]) -> Float[Tensor, "image logit"]:
        """Class logits, then auxiliary logits."""
        features = images
        for layer, activation in zip(self.layers, self.activations, strict=True):
            features = activation(layer(features))
        heads = [self.class_head(features)]
        if self.auxiliary_head is not None:
            heads.append(self.auxiliary_head(features))
        return torch.cat(heads, dim=-1)


def model_spec(config: ModelConfig, num_pixels: int, num_classes: int) -> dict[str, Any]:
    """What `Classifier` is built from; goes into the lineage."""
    return {
        "num_pixels": num_pixels,
        "hidden_widths": list(config.hidden_widths),
        "num_classes": num_classes,
        "num_auxiliary": config.num_auxiliary,
        "activation": config.activation,
        "dtype": config.dtype,
    }


def tensor_table(spec: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Shape, layer and module kind of every tensor, in the order of the forward pass."""
    table: dict[str, TensorInfo] = {}
    widths = [spec["num_pixels"], *spec["hidden_widths"]]
    for layer, (fan_in, fan_out) in enumerate(pairwise(widths)):
        table[f"layers.{layer}.weight"] = TensorInfo((fan_out, fan_in), f"layer {layer}", "hidden")
        table[f"layers.{layer}.bias"] = TensorInfo((fan_out,), f"layer {layer}", "hidden")
    for head, kind, size in (
        (CLASS_HEAD, "class head", "num_classes"),
        (AUXILIARY_HEAD, "auxiliary head", "num_auxiliary"),
    ):
        if spec[size]:
            table[f"{head}.weight"] = TensorInfo((spec[size], widths[-1]), kind, kind)
            table[f"{head}.bias"] = TensorInfo((spec[size],), kind, kind)
    return table


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
    activation: str,
    heads: Sequence[str] = (CLASS_HEAD, AUXILIARY_HEAD),
) -> Float[Tensor, "model image logit"]:
    """Every model's logits on its own images: the same function as `Classifier`, one batched product a layer."""
    features = images
    for layer in range(sum(name.startswith("layers.") for name in parameters) // 2):
        features = _ACTIVATIONS[activation](_linear(parameters, f"layers.{layer}", features))
    logits = [_linear(parameters, head, features) for head in heads if f"{head}.weight" in parameters]
    return torch.cat(logits, dim=-1) if len(logits) > 1 else logits[0]


def _linear(parameters: Parameters, name: str, inputs: Float[Tensor, "model row in"]) -> Float[Tensor, "model row out"]:
    return torch.baddbmm(parameters[f"{name}.bias"].unsqueeze(1), inputs, parameters[f"{name}.weight"].transpose(1, 2))


def draw_reference(spec: Mapping[str, Any], scale: float, seed: int, members: Sequence[int]) -> Parameters:
    """Initial parameters of each member: weights N(0, scale² / fan_in), biases 0, from the member's own stream."""
    dtype = getattr(torch, spec["dtype"])
    stacked: dict[str, list[Tensor]] = {name: [] for name in tensor_table(spec)}
    for member in members:
        stream = random_stream(seed, "member", member, "reference")
        for name, info in tensor_table(spec).items():
            if name.endswith("weight"):
                drawn = stream.standard_normal(info.shape) * scale / np.sqrt(info.shape[1])
                stacked[name].append(torch.from_numpy(drawn).to(dtype))
            else:
                stacked[name].append(torch.zeros(info.shape, dtype=dtype))
    return {name: torch.stack(tensors) for name, tensors in stacked.items()}


def derive_origin(reference: Parameters, origin: Origin, seed: int) -> Parameters:
    """The students' starting parameters: references reassigned to members, their hidden units shuffled, noise added."""
    start = {name: tensor[list(origin.members)].clone() for name, tensor in reference.items()}
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

    The function stays the same: θ'[W_l] = P W_l, θ'[b_l] = P b_l, θ'[W_{l+1}] = W_{l+1} Pᵀ.
    """
    member = torch.arange(order.shape[0])[:, None]
    permuted = dict(parameters)
    for part in ("weight", "bias"):
        permuted[f"layers.{layer}.{part}"] = parameters[f"layers.{layer}.{part}"][member, order]
    following = f"layers.{layer + 1}.weight"
    readers = [following] if following in parameters else [f"{CLASS_HEAD}.weight", f"{AUXILIARY_HEAD}.weight"]
    for name in readers:
        if name in parameters:
            permuted[name] = parameters[name].transpose(1, 2)[member, order].transpose(1, 2).contiguous()
    return permuted

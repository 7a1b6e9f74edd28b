"""Losses example by example, and their mean gradient: what a family gives to whoever asks where training would go."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

_AT_ONCE = 64


@dataclass(frozen=True)
class ExampleLosses:
    """A loss over fixed examples: its mean over them is what a training would minimise."""

    num_examples: int
    compute: Callable[[nn.Module, range], Float[Tensor, " example"]]
    """The losses of these examples, with a graph. An example's loss does not depend on which others are asked for with it."""
    description: str
    unit: str = "nats"
    at_once: int = _AT_ONCE
    """Examples that fit into memory together."""

    def parts(self) -> list[range]:
        """The examples, as many at once as fit."""
        starts = range(0, self.num_examples, self.at_once)
        return [range(start, min(start + self.at_once, self.num_examples)) for start in starts]


@torch.no_grad()
def compute_losses(model: nn.Module, losses: ExampleLosses) -> Float[Tensor, " example"]:
    """ℓ_i of all examples, without a graph; in float64 on the CPU, in the unit of the loss."""
    return torch.cat([losses.compute(model, part).double().cpu() for part in losses.parts()])


def mean_gradient(model: nn.Module, losses: ExampleLosses, *, only_trained: bool = False) -> dict[str, Tensor]:
    """∇ of the mean loss over all examples, by parameter; tied ones once. 0 where the loss does not reach a parameter.

    ``only_trained``: of the parameters that want a gradient, e.g. those of an adapter, and no others.
    The model is left as it was, in its mode, its own gradients untouched. In the unit of the loss over that of the weights.
    """
    every = dict(model.named_parameters())
    parameters = {name: parameter for name, parameter in every.items() if parameter.requires_grad or not only_trained}
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for part in losses.parts():
            loss = losses.compute(model, part).sum() / losses.num_examples
            found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    total[name] += gradient
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(wanted[name])
    return total

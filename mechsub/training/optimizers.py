"""Optimizers from their settings."""

from collections.abc import Iterable

import torch
from torch import Tensor

from mechsub.training.config import OptimizerConfig


def make_optimizer(parameters: Iterable[Tensor], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The torch optimizer that the recipe asks for.

    The `foreach` kernels are elementwise to the last bit; the fused CPU kernels treat the end of a tensor differently, so
    that a member's numbers would depend on which others are stacked with it.
    """
    rate, decay = config.learning_rate, config.weight_decay
    if config.name == "sgd":
        return torch.optim.SGD(parameters, lr=rate, weight_decay=decay, momentum=config.momentum, foreach=True)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(parameters, lr=rate, weight_decay=decay, betas=config.betas, eps=config.epsilon, foreach=True)


def state_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, ``<quantity>.<parameter>``; ``names`` in the order of its parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{quantity}.{name}": value
        for name, parameter in zip(names, parameters, strict=True)
        for quantity, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def restore_state(optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
    """Put back what `state_tensors` gave."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        state = {key.split(".", 1)[0]: value for key, value in tensors.items() if key.split(".", 1)[1] == name}
        if state:  # counters stay on the CPU: that is where the optimizers keep them
            optimizer.state[parameter] = {key: value if value.ndim else value.cpu() for key, value in state.items()}

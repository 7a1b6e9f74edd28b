"""Optimizers from their settings."""

from collections.abc import Iterable, Mapping

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


def last_update(
    config: OptimizerConfig, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor], rate: float = 1.0
) -> dict[str, Tensor] | None:
    """(θ(t) − θ(t−1)) / η of the step just done, from what the optimizer kept of it; None of plain SGD, which keeps nothing.

    Adam: −m̂ / (√v̂ + ε); AdamW: the same, less λ θ(t−1); SGD with momentum: minus its buffer. ``parameters``: θ(t). ``state``:
    as `state_tensors` gives it after the step. ``rate``: what a schedule multiplied the learning rate with; η is their product.
    """
    if config.name == "sgd":
        return {name: -state[f"momentum_buffer.{name}"] for name in parameters} if config.momentum else None
    step_size = config.learning_rate * rate
    updates = {}
    for name, parameter in parameters.items():
        step = float(state[f"step.{name}"])
        mean = state[f"exp_avg.{name}"] / (1 - config.betas[0] ** step)
        square = state[f"exp_avg_sq.{name}"] / (1 - config.betas[1] ** step)
        updates[name] = -mean / (square.sqrt() + config.epsilon)
        if config.name == "adamw":
            before = (parameter - step_size * updates[name]) / (1 - step_size * config.weight_decay)
            updates[name] = updates[name] - config.weight_decay * before
    return updates

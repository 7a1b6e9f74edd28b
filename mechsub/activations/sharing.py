"""A second model over the same weights, for libraries that put modules, forwards or settings of their own into a model."""

import copy

from torch import nn


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of a model whose parameters hold the model's own memory; modules, settings and buffers are copies.

    What is then done to the copy's modules and parameters leaves the model as it is; only numbers written into the weights
    would reach it. Tied weights stay tied.
    """
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)

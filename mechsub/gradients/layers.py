"""How modules use the parameters that they own: what of a forward and a backward pass makes an example's gradient.

A kind of module is known by its forward function, or by what that is seen to compute. A module of no known kind is refused by
whoever asks for its parameters.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mechsub.checkpoints import as_computed
from mechsub.gradients.factors import MatrixFactors, VectorFactors

Factors = MatrixFactors | VectorFactors
Reading = Mapping[str, Callable[[], Factors]]
"""How to make the factors of a module's own parameters, by their names in it; what nobody asks for is not made."""
_CONV1D = "transformers.pytorch_utils.Conv1D"
"""By its name: importing it would cost seconds where there is none."""
_ROUNDINGS = 16
"""How many roundings of its type a norm's output may be away from the formula that it is held to."""


@dataclass(frozen=True)
class LayerKind:
    """One way to use a weight and a bias, each exactly once a call."""

    name: str
    matches: Callable[[nn.Module], bool]
    keep: Callable[[nn.Module, Tensor], Tensor]
    """What is needed of the input, [example, …], when the gradient of the output comes."""
    read: Callable[[nn.Module, Tensor, Tensor], Reading]
    """From what was kept and the gradient of the output."""
    fits: Callable[[nn.Module, Tensor, Tensor], bool] = lambda module, given, output: True
    """Whether an output is what the kind's formula gives of the input."""


def list_kinds(module: nn.Module) -> list[LayerKind]:
    """The kinds that a module may be of; `LayerKind.fits` chooses among them."""
    # A forward function put on one object may do anything; accelerate's only moves weights and inputs between devices.
    if "forward" in vars(module) and not hasattr(module, "_hf_hook"):
        return []
    return [kind for kind in _KINDS if kind.matches(module)]


def _places(activations: Tensor) -> Tensor:
    """[example, …, feature] as [example, place, feature]; float32 at least."""
    return as_computed(activations).reshape(len(activations), -1, activations.shape[-1])


def _keep_input(module: nn.Module, given: Tensor) -> Tensor:
    return given


def _read_linear(module: nn.Module, kept: Tensor, gradient: Tensor) -> Reading:
    inputs, outputs = _places(kept), _places(gradient)
    return {"weight": lambda: MatrixFactors(outputs, inputs), "bias": lambda: VectorFactors(outputs.sum(1))}


def _read_conv1d(module: nn.Module, kept: Tensor, gradient: Tensor) -> Reading:
    """The same with the weight stored as [in, out]."""
    inputs, outputs = _places(kept), _places(gradient)
    return {"weight": lambda: MatrixFactors(inputs, outputs), "bias": lambda: VectorFactors(outputs.sum(1))}


def _is_plain_embedding(module: nn.Module) -> bool:
    """Not where an example's gradient depends on other examples, or looking up changes the weight."""
    is_embedding = type(module).forward is nn.Embedding.forward and isinstance(module, nn.Embedding)
    return is_embedding and not module.scale_grad_by_freq and module.max_norm is None


def _read_embedding(module: nn.Module, kept: Tensor, gradient: Tensor) -> Reading:
    outputs, numbers = _places(gradient), kept.flatten(1).long()
    assert isinstance(module, nn.Embedding)
    if module.padding_idx is not None:  # torch gives that row no gradient from here
        outputs = outputs * (numbers != module.padding_idx)[..., None]
    return {"weight": lambda: MatrixFactors(numbers, outputs)}


def _may_be_a_norm(module: nn.Module) -> bool:
    """Whether it owns a weight, perhaps a bias of the same shape, and nothing else."""
    own = {name: parameter for name, parameter in module._parameters.items() if parameter is not None}
    shapes = {parameter.shape for parameter in own.values()}
    is_alone = not module._buffers and not module._modules
    return is_alone and "weight" in own and own.keys() <= {"weight", "bias"} and len(shapes) == 1


def _norm(name: str, formula: Callable[[Tensor], Tensor], fill: float) -> LayerKind:
    """An output ``formula(weight) * normalised + bias``, element by element; ``formula(fill)`` is 1.

    Dividing the output by the weight would lose the normalised input where the weight is 0, so the module itself is asked for
    it, with other weights.
    """

    def keep(module: nn.Module, given: Tensor) -> Tensor:
        with _filled(module, fill):
            normalised: Tensor = module.forward(given)
        return normalised

    def fits(module: nn.Module, given: Tensor, output: Tensor) -> bool:
        """Under its own weights, and under others that differ from feature to feature."""
        weight = module._parameters["weight"]
        assert weight is not None
        if output.shape[output.ndim - weight.ndim :] != weight.shape:
            return False
        bias = module._parameters.get("bias")
        normalised = keep(module, given)
        other = torch.arange(1, weight.numel() + 1, device=weight.device).cos().view(weight.shape).to(weight.dtype)
        with _filled(module, other):
            probed = module.forward(given)
        own = formula(weight) * normalised + (0 if bias is None else bias)
        return _are_close(output, own, normalised) and _are_close(probed, formula(other) * normalised, normalised)

    def read(module: nn.Module, kept: Tensor, gradient: Tensor) -> Reading:
        weight = module._parameters["weight"]
        assert weight is not None
        outputs = as_computed(gradient).reshape(len(gradient), -1, weight.numel())
        inputs = as_computed(kept).reshape(outputs.shape)
        return {
            "weight": lambda: VectorFactors((outputs * inputs).sum(1)),
            "bias": lambda: VectorFactors(outputs.sum(1)),
        }

    return LayerKind(name, _may_be_a_norm, keep, read, fits)


def _are_close(found: Tensor, wanted: Tensor, scale: Tensor) -> bool:
    if found.shape != wanted.shape:
        return False
    # Norms compute in float32 in models of any type.
    rounding = max(torch.finfo(found.dtype).eps, torch.finfo(torch.float32).eps)
    bound = _ROUNDINGS * rounding * max(float(scale.abs().max()), float(wanted.abs().max()))
    return bool((found.double() - wanted.double()).abs().max() <= bound)


@contextmanager
def _filled(module: nn.Module, weight: Tensor | float) -> Iterator[None]:
    """A module with another weight and no bias, for as long as the context lasts."""
    own = dict(module._parameters)
    put = {name: torch.zeros_like(parameter) for name, parameter in own.items() if parameter is not None}
    put["weight"] = weight if isinstance(weight, Tensor) else torch.full_like(put["weight"], weight)
    try:
        module._parameters.update(put)  # type: ignore[arg-type]  # plain tensors serve as well
        with torch.no_grad():
            yield
    finally:
        module._parameters.update(own)


def _is_conv1d(module: nn.Module) -> bool:
    return f"{type(module).__module__}.{type(module).__qualname__}" == _CONV1D


_KINDS = (
    LayerKind("linear", lambda module: type(module).forward is nn.Linear.forward, _keep_input, _read_linear),
    LayerKind("Conv1D", _is_conv1d, _keep_input, _read_conv1d),
    LayerKind("embedding", _is_plain_embedding, _keep_input, _read_embedding),
    _norm("norm", lambda weight: weight, 1.0),
    _norm("norm whose weight counts from 1", lambda weight: 1 + weight, 0.0),
)
KNOWN_KINDS = "linear layers, transformers' Conv1D, embeddings, norms (weight × normalised input) and their biases"

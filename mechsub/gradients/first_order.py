"""First-order theory of imitation: where one small step of a student goes, from where its teacher went.

A teacher at θ₀ + Δ_T gives logits z₀ + J Δ_T to first order. So the gradient of the imitation loss at θ₀ is −G Δ_T, with
G = E[Jᵀ H J] its Gauss–Newton matrix there, and one plain gradient step moves the student along G Δ_T. G is positive
semi-definite, so ⟨G Δ_T, Δ_T⟩ ≥ 0. Source: Cloud et al., arXiv:2507.14805, Theorem 1; Schraudolph 2002 (products with G).
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

_AT_ONCE = 64
Vector = dict[str, Tensor]
"""A direction in the space of a model's parameters, by their names; tied ones once."""


@dataclass(frozen=True)
class ImitatedLogits:
    """What a student imitates of its teacher on fixed examples: logits, and how they are compared."""

    num_examples: int
    compute: Callable[[nn.Module, range], Float[Tensor, "row logit"]]
    """The imitated logits of these examples, of a student or a teacher: a row for each image, or token of a completion."""
    weigh: Callable[[range], Float[Tensor, " row"]]
    """What each row's loss counts for; over all examples the weights sum to 1."""
    comparison: Literal["kl", "mse"]
    """``kl``: KL(softmax(teacher) ‖ softmax(student)), in nats; ``mse``: the mean squared difference over the logits."""
    description: str
    at_once: int = _AT_ONCE
    """Examples that fit into memory together."""

    def parts(self) -> list[range]:
        """The examples, as many at once as fit."""
        starts = range(0, self.num_examples, self.at_once)
        return [range(start, min(start + self.at_once, self.num_examples)) for start in starts]


def residual(
    student: Float[Tensor, "row logit"], teacher: Float[Tensor, "row logit"], comparison: str
) -> Float[Tensor, "row logit"]:
    """∂ℓ/∂z of each row in the student's logits z: p_S − p_T for ``kl``, 2 (z_S − z_T) / k over k logits for ``mse``."""
    if comparison == "mse":
        return 2 / student.shape[-1] * (student - teacher)
    return student.softmax(-1) - teacher.softmax(-1)


def apply_curvature(
    logits: Float[Tensor, "row logit"], tangent: Float[Tensor, "row logit"], comparison: str
) -> Float[Tensor, "row logit"]:
    """H t of each row, H = ∂²ℓ/∂z² where teacher and student give the same: diag(p) − p pᵀ for ``kl``, 2/k I for ``mse``."""
    if comparison == "mse":
        return 2 / logits.shape[-1] * tangent
    p = logits.softmax(-1)
    return p * (tangent - (p * tangent).sum(-1, keepdim=True))


def imitation_step(model: nn.Module, teacher: nn.Module, logits: ImitatedLogits) -> Vector:
    """−∇ of the imitation loss of ``teacher`` at the model's parameters: the displacement of one gradient step of size 1.

    In the unit of the loss over that of the weights. 0 where the loss does not reach a parameter. The model is left as it was.
    """
    parameters = _parameters(model)
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for part in logits.parts():
        found, pull_back = vjp(_forward(model, logits, part), parameters)[:2]
        with torch.no_grad():
            wanted = logits.compute(teacher, part)
            rows = -logits.weigh(part).to(found)[:, None] * residual(found, wanted, logits.comparison)
        _add(total, pull_back(rows)[0])
    return total


def gauss_newton_product(model: nn.Module, logits: ImitatedLogits, direction: Mapping[str, Tensor]) -> Vector:
    """G d, with G = Σ_rows w Jᵀ H J at the model's parameters, by a forward- and a reverse-mode product; J is never formed.

    What one imitation step of size 1 is predicted to be where the teacher's displacement is d. In the unit of the loss over
    that of the weights. Parts of ``direction`` that are no parameter of the model are ignored, missing ones are 0.
    """
    parameters = _parameters(model)
    tangents = {
        name: direction[name].to(parameter) if name in direction else torch.zeros_like(parameter)
        for name, parameter in parameters.items()
    }
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for part in logits.parts():
        forward = _forward(model, logits, part)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward mode
            found, pull_back = vjp(forward, parameters)[:2]
            tangent = jvp(forward, (parameters,), (tangents,))[1]
            rows = logits.weigh(part).to(found)[:, None] * apply_curvature(found, tangent, logits.comparison)
            _add(total, pull_back(rows.detach())[0])
    return total


def linearisation_errors(
    model: nn.Module, displacement: Mapping[str, Tensor], logits: ImitatedLogits, scales: Sequence[float]
) -> list[float]:
    """‖s(ε)/ε − G d‖ / ‖G d‖ for each scale ε, s(ε) the imitation step whose teacher is the model moved by ε d; ≥ 0, no unit.

    All in float64, also what the model would compute in float32. Where the theory holds the error falls in proportion to ε;
    a model with kinks (ReLU) has none of them between θ₀ and θ₀ + ε d once ε is small enough. NaN where G d = 0.
    """
    wide = deepcopy(model).double()
    moved = deepcopy(wide)
    with InFloat64():
        predicted = gauss_newton_product(wide, logits, displacement)
        size = _norm(predicted)
        errors = []
        for scale in scales:
            with torch.no_grad():
                for name, start in wide.named_parameters():
                    step = displacement[name].to(start) if name in displacement else 0.0
                    dict(moved.named_parameters())[name].copy_(start + scale * step)
            measured = imitation_step(wide, moved, logits)
            gap = _norm({name: measured[name] / scale - predicted[name] for name in predicted})
            errors.append(gap / size if size > 0 else float("nan"))
    return errors


class InFloat64(TorchFunctionMode):
    """Within it float64 stands wherever code asks for float32: some models compute their norms and softmaxes in that."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with the wider type."""
        if func is Tensor.float:
            return args[0].double()
        given = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(_widen, args), **given)


def _widen(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


class _Asked(nn.Module):
    """A model with what is asked of it, as one module whose parameters can be given from outside."""

    def __init__(self, model: nn.Module, logits: ImitatedLogits) -> None:
        super().__init__()
        self.model, self.logits = model, logits

    def forward(self, part: range) -> Tensor:
        """The imitated logits."""
        return self.logits.compute(self.model, part)


def _forward(model: nn.Module, logits: ImitatedLogits, part: range) -> Callable[[Vector], Tensor]:
    """The logits as a function of the parameters."""
    asked = _Asked(model, logits)

    def forward(parameters: Vector) -> Tensor:
        found: Tensor = functional_call(asked, {f"model.{name}": value for name, value in parameters.items()}, (part,))
        return found

    return forward


def _parameters(model: nn.Module) -> Vector:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _add(total: Vector, found: Mapping[str, Tensor]) -> None:
    for name, value in found.items():
        total[name] += value


def _norm(vector: Mapping[str, Tensor]) -> float:
    return float(torch.stack([value.double().square().sum() for value in vector.values()]).sum().sqrt())

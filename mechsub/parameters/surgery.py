"""Surgery: a control's weights changed by parts of what its student has more, as named dense tensors of one member.

With θ_C the control, θ_S the student and D = θ_S − θ_C, every edited model is θ_C, or θ_S in some of its layers, plus a signed
sum of directions. Products and sums are taken in float64; directions and edited weights are kept in float32 at least, and
scored so: in half precision a small edit would be rounded away.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsub.checkpoints import as_computed
from mechsub.parameters.subspaces import EXACT_UP_TO, decompose_dense
from mechsub.streams import random_stream

Tensors = Mapping[str, Tensor]
"""By parameter name; tied parameters once."""
Coefficients = Mapping[str, float]
"""By layer; a layer that is not there has 0."""
LARGEST_RANK = 256
"""Of a truncation."""


@dataclass(frozen=True)
class Edit:
    """θ_C, or θ_S in the layers ``of_student``, plus Σ coefficient · direction, layer by layer."""

    of_student: frozenset[str] = frozenset()
    terms: tuple[tuple[Coefficients, Tensors], ...] = ()

    @property
    def adds_nothing(self) -> bool:
        """Whether every coefficient is 0, so that it only chooses layers."""
        return not any(value for coefficients, _ in self.terms for value in coefficients.values())


@dataclass(frozen=True)
class Subject:
    """A student beside its control: what is operated on."""

    control: Tensors
    student: Tensors
    layers: Mapping[str, str]
    """The layer of every tensor."""

    @cached_property
    def difference(self) -> dict[str, Tensor]:
        """D = θ_S − θ_C."""
        return subtract(self.student, self.control)

    @cached_property
    def layer_names(self) -> tuple[str, ...]:
        """In the order of the tensors."""
        return tuple(dict.fromkeys(self.layers[name] for name in self.control))

    @cached_property
    def norm(self) -> float:
        """‖D‖, in the unit of the weights."""
        return norm(self.difference)

    @cached_property
    def moved(self) -> frozenset[str]:
        """The layers in which D is not 0."""
        squares = layer_products(self.difference, self.difference, self.layers)
        return frozenset(layer for layer, square in squares.items() if square > 0)

    def everywhere(self, coefficient: float) -> dict[str, float]:
        """One coefficient in every layer."""
        return dict.fromkeys(self.layer_names, coefficient)

    def put_in(self, layers: frozenset[str]) -> Edit:
        """θ_C with the student's weights in ``layers``: are they enough?"""
        return Edit(layers & self.moved)

    def take_out(self, layers: frozenset[str]) -> Edit:
        """θ_S with the control's weights in ``layers``: are they needed?"""
        return Edit(self.moved - layers)

    def add(self, direction: Tensors, coefficients: Coefficients) -> Edit:
        """θ_C + Σ_ℓ coefficient_ℓ · direction_ℓ."""
        return Edit(terms=((coefficients, direction),))

    def remove(self, direction: Tensors, coefficients: Coefficients) -> Edit:
        """θ_S − Σ_ℓ coefficient_ℓ · direction_ℓ, that is θ_C + D without that part."""
        return Edit(self.moved, (({layer: -value for layer, value in coefficients.items()}, direction),))

    def build(self, edit: Edit) -> dict[str, Tensor]:
        """The edited weights. An edit that only chooses layers gives the weights themselves, without any rounding.

        What is added to is given in float32 at least, whatever it was stored in.
        """
        built = {}
        for name, layer in self.layers.items():
            base = self.student[name] if layer in edit.of_student else self.control[name]
            terms = [(found.get(layer, 0.0), direction[name]) for found, direction in edit.terms]
            added = [coefficient * direction.double() for coefficient, direction in terms if coefficient]
            built[name] = sum(added, base.double()).to(_kept_type(base)) if added else base
        return built

    def distance(self, weights: Tensors) -> float:
        """‖θ − θ_C‖, in the unit of the weights."""
        return norm(subtract(weights, self.control))


def subtract(first: Tensors, second: Tensors) -> dict[str, Tensor]:
    """θ₁ − θ₂, taken in float64 and kept in float32 at least."""
    return {name: (tensor.double() - second[name].double()).to(_kept_type(tensor)) for name, tensor in first.items()}


def _kept_type(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def layer_products(first: Tensors, second: Tensors, layers: Mapping[str, str]) -> dict[str, float]:
    """⟨u, v⟩ of every layer, summed in float64."""
    products = dict.fromkeys(layers.values(), 0.0)
    for name, layer in layers.items():
        products[layer] += float((first[name].double() * second[name].double()).sum())
    return products


def norm(direction: Tensors) -> float:
    """‖u‖ ≥ 0, in the unit of the weights."""
    return float(sum(tensor.double().square().sum() for tensor in direction.values()) ** 0.5)


def project(subject: Subject, direction: Tensors) -> tuple[float, dict[str, float]]:
    """The coefficient ⟨D, V⟩ / ‖V‖² over all parameters, and that of every layer; in units of V, NaN where V is 0."""
    inner = layer_products(subject.difference, direction, subject.layers)
    square = layer_products(direction, direction, subject.layers)
    by_layer = {layer: inner[layer] / square[layer] if square[layer] else np.nan for layer in inner}
    total = sum(square.values())
    return (sum(inner.values()) / total if total else np.nan), by_layer


class LeadingParts:
    """The leading singular triples of every matrix of a direction, up to one rank, from which its truncations are made.

    A tensor of more than two axes is a matrix of its first axis by all others. Matrices that no exact decomposition is
    affordable for have a random sketch; see `mechsub.parameters.subspaces.decompose_dense`.
    """

    def __init__(self, direction: Tensors, top: int, seed: int, *stream: str | int, exact_up_to: int = EXACT_UP_TO) -> None:
        self._direction = direction
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}
        squares = torch.zeros(top, dtype=torch.float64)
        for name, tensor in direction.items():
            if tensor.ndim > 1:
                streams = [random_stream(seed, *stream, name)]
                found = decompose_dense(tensor.flatten(1)[None], top, streams=streams, exact_up_to=exact_up_to)
                values = found.values[0, :top]
                width = len(values)
                left, right = found.left[0, :, :width] * values, found.right[0, :, :width]
                self._parts[name] = left.to(tensor.dtype), right.to(tensor.dtype)
                squares[:width] += values.square().cpu()
        self._square = norm(direction) ** 2
        vectors = norm({name: tensor for name, tensor in direction.items() if tensor.ndim <= 1}) ** 2
        self._missed = [self._square - vectors - float(squares[:rank].sum()) for rank in range(top + 1)]

    def truncate(self, rank: int) -> dict[str, Tensor]:
        """The leading ``rank`` singular triples of every matrix, and the vectors whole; rank 0 keeps the vectors only."""
        return {
            name: self._leading(name, rank).reshape(tensor.shape) if name in self._parts else tensor
            for name, tensor in self._direction.items()
        }

    def relative_error(self, rank: int) -> float:
        """‖V − V_k‖ / ‖V‖ over all tensors, in [0, 1]: what the truncation leaves out, from ‖V‖² − Σσ²; NaN where V is 0.

        Of a random sketch too, with what it missed: σ² are then the squares that the found directions do hold. Good to 1e-7.
        """
        if self._square == 0:
            return np.nan
        return float((max(self._missed[rank], 0.0) / self._square) ** 0.5)

    def _leading(self, name: str, rank: int) -> Float[Tensor, "row column"]:
        left, right = self._parts[name]
        leading: Tensor = left[:, :rank].double() @ right[:, :rank].double().T
        return leading.to(left.dtype)


def list_ranks(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """0, then the powers of two below the largest rank that a matrix of these shapes can have, up to `LARGEST_RANK`."""
    most = max((min(shape[0], int(np.prod(shape[1:]))) for shape in shapes if len(shape) > 1), default=1)
    return [0, *(2**power for power in range(LARGEST_RANK.bit_length()) if 2**power < most)]


def draw_matched(direction: Tensors, seed: int, *stream: str | int) -> dict[str, Tensor]:
    """A random direction of the same spectrum: every matrix keeps its singular values, its singular vectors are Haar.

    A vector becomes a random one of the same norm. Each tensor keeps its norm therefore, and the expected inner product with
    any fixed direction is 0. With M = Q K, K square: U K Vᵀ for Haar U and V has the singular values of M.
    """
    drawn = {}
    for name, tensor in direction.items():
        generator = random_stream(seed, *stream, name)
        matrix = tensor.double().flatten(1) if tensor.ndim > 1 else tensor.double().reshape(-1, 1)
        wide = matrix.shape[0] < matrix.shape[1]
        core = torch.linalg.qr(matrix.T if wide else matrix, mode="r").R
        rows = _draw_haar(max(matrix.shape), len(core), generator).to(core)
        found = rows @ core @ _draw_haar(len(core), len(core), generator).to(core).T
        drawn[name] = (found.T if wide else found).reshape(tensor.shape).to(tensor.dtype)
    return drawn


@dataclass(frozen=True)
class Patient:
    """A module whose parameters are replaced by others, and given back as they were."""

    module: nn.Module
    own_type: torch.dtype
    """Of its own parameters; it is scored in `scored_type`."""

    @property
    def scored_type(self) -> torch.dtype:
        """In which it is scored."""
        return next(self.module.parameters()).dtype

    def install(self, weights: Tensors) -> None:
        """Put named weights in the places of the module's own, in its data type. They are shared, not copied."""
        for name, tensor in weights.items():
            parameter = self.module.get_parameter(name)
            parameter.data = tensor.to(parameter.device, parameter.dtype)


@contextmanager
def operate(module: nn.Module, *, widen: bool = True) -> Iterator[Patient]:
    """A module that may be operated on, its own tensors being put back at the end, whatever happens.

    In float32 at least, if ``widen``: in half precision small edits are rounded away.
    """
    tensors = [tensor for tensor in chain(module.parameters(), module.buffers()) if tensor.is_floating_point()]
    before = [tensor.data for tensor in tensors]
    try:
        for tensor, own in zip(tensors, before, strict=True):
            tensor.data = as_computed(own) if widen else own
        yield Patient(module, before[0].dtype)
    finally:
        for tensor, own in zip(tensors, before, strict=True):
            tensor.data = own


def needs_half(module: nn.Module) -> bool:
    """Whether a module's attention can only be computed in half precision, so that it cannot be widened."""
    return "flash" in (getattr(getattr(module, "config", None), "_attn_implementation", None) or "")


def _draw_haar(rows: int, columns: int, generator: np.random.Generator) -> Float[Tensor, "row column"]:
    """Orthonormal columns, uniformly distributed. Source: Mezzadri, arXiv:math-ph/0609050."""
    orthonormal, triangle = torch.linalg.qr(torch.from_numpy(generator.standard_normal((rows, columns))))
    drawn: Tensor = orthonormal * triangle.diagonal().sign()  # without the signs it is not uniform
    return drawn

"""Surgery: a control's weights changed by parts of what its student has more, as named dense tensors of one member.

With θ_C the control, θ_S the student and D = θ_S − θ_C, every edited model is θ_C, or θ_S in some of its layers, plus a signed
sum of directions. Products and sums are taken in float64, directions are kept in float32 at least, and edited weights are given
in the data type of the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsub.streams import random_stream

Tensors = Mapping[str, Tensor]
"""By parameter name; tied parameters once."""
Coefficients = Mapping[str, float]
"""By layer; a layer that is not there has 0."""
_EXACT_SIDE = 1024
"""Matrices whose smaller side is longer have a randomised decomposition, of `LARGEST_RANK` singular triples."""
LARGEST_RANK = 256
_OVERSAMPLED, _POWER_ITERATIONS = 16, 4


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
        """The edited weights. An edit that only chooses layers gives the weights themselves, without any rounding."""
        built = {}
        for name, layer in self.layers.items():
            base = self.student[name] if layer in edit.of_student else self.control[name]
            terms = [(found.get(layer, 0.0), direction[name]) for found, direction in edit.terms]
            added = [coefficient * direction.double() for coefficient, direction in terms if coefficient]
            built[name] = sum(added, base.double()).to(base.dtype) if added else base
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


class Spectrum:
    """The singular value decomposition of every matrix of a direction, from which its leading parts are made.

    A tensor of more than two axes is a matrix of its first axis by all others. The matrices that no exact decomposition is
    affordable for have the leading `LARGEST_RANK` triples of a randomised range finder with power iterations.
    Source: Halko, Martinsson & Tropp, arXiv:0909.4061, Algorithms 4.4 and 5.1.
    """

    def __init__(self, direction: Tensors, seed: int, *stream: str | int) -> None:
        self._direction = direction
        self._parts = {
            name: tuple(
                part.to(tensor.dtype) for part in _decompose(tensor.double().flatten(1), random_stream(seed, *stream, name))
            )
            for name, tensor in direction.items()
            if tensor.ndim > 1
        }

    def truncate(self, rank: int) -> dict[str, Tensor]:
        """The leading ``rank`` singular triples of every matrix, and the vectors whole; rank 0 keeps the vectors only."""
        return {
            name: self._leading(name, rank).reshape(tensor.shape) if name in self._parts else tensor
            for name, tensor in self._direction.items()
        }

    def _leading(self, name: str, rank: int) -> Float[Tensor, "row column"]:
        left, values, right = self._parts[name]
        leading: Tensor = (left[:, :rank].double() * values[:rank].double()) @ right[:rank].double()
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
    """A module whose parameters are overwritten in place, and given back as they were."""

    module: nn.Module

    def install(self, weights: Tensors) -> None:
        """Copy named weights into the module, in its own data type."""
        with torch.no_grad():
            for name, tensor in weights.items():
                self.module.get_parameter(name).copy_(tensor)


@contextmanager
def operate(module: nn.Module) -> Iterator[Patient]:
    """A module that may be overwritten: what was in it before is put back at the end, whatever happens."""
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    patient = Patient(module)
    try:
        yield patient
    finally:
        patient.install(before)


def _decompose(matrix: Float[Tensor, "row column"], generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U, singular values and Vᵀ, descending."""
    if min(matrix.shape) <= _EXACT_SIDE:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left, values, right
    probes = torch.from_numpy(generator.standard_normal((matrix.shape[1], LARGEST_RANK + _OVERSAMPLED))).to(matrix)
    basis = torch.linalg.qr(matrix @ probes).Q
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ left, values, right


def _draw_haar(rows: int, columns: int, generator: np.random.Generator) -> Float[Tensor, "row column"]:
    """Orthonormal columns, uniformly distributed. Source: Mezzadri, arXiv:math-ph/0609050."""
    orthonormal, triangle = torch.linalg.qr(torch.from_numpy(generator.standard_normal((rows, columns))))
    drawn: Tensor = orthonormal * triangle.diagonal().sign()  # without the signs it is not uniform
    return drawn

"""Exact overlaps of examples' gradients with fixed directions, and with each other, without forming a gradient of a weight.

A hook on each module that owns a parameter keeps its input; when the gradient of its output comes, the two are contracted with
the direction and dropped: ⟨∇ℓ_i, D⟩ = Σ_t g_itᵀ D a_it. No parameter requires a gradient meanwhile, so that the backward pass
forms none. Parameters that are used in another way are refused by name; see `mechsub.gradients.uses`.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechsub.errors import AnalysisError
from mechsub.gradients.factors import MatrixFactors, VectorFactors
from mechsub.gradients.layers import Factors, LayerKind
from mechsub.gradients.losses import ExampleLosses
from mechsub.gradients.uses import Uses, check_values, find_parameters, find_uses, first_input, only_requiring

Direction = Mapping[str, Tensor]
"""By parameter, in its shape; 0 in parameters that it does not name."""


@dataclass(frozen=True)
class ExampleOverlaps:
    """What examples' gradients say of directions, parameter by parameter, in float64 on the CPU."""

    parameters: tuple[str, ...]
    overlaps: Float[Tensor, "example direction parameter"]
    """⟨∇ℓ_i, d⟩, in the unit of the loss where d is a displacement; any real number."""
    squared_norms: Float[Tensor, "example parameter"]
    """‖∇ℓ_i‖² ≥ 0, in squared units of the loss over that of the weights."""
    losses: Float[Tensor, " example"]
    """ℓ_i."""


@dataclass(frozen=True)
class ExampleGram:
    """Inner products of examples' gradients, in float64 on the CPU."""

    parameters: tuple[str, ...]
    by_parameter: Float[Tensor, "parameter example other"]
    """⟨∇ℓ_i, ∇ℓ_j⟩ in one parameter, in squared units of the loss over that of the weights."""

    @property
    def total(self) -> Float[Tensor, "example other"]:
        """Over all parameters: symmetric and positive semi-definite."""
        return self.by_parameter.sum(0)


def record_overlaps(
    model: nn.Module, losses: ExampleLosses, directions: Sequence[Direction], parameters: Sequence[str] | None = None
) -> ExampleOverlaps:
    """⟨∇ℓ_i, d⟩ and ‖∇ℓ_i‖² of every example i, direction d and parameter, by one forward and one backward pass.

    Exact up to rounding, whatever the size of batches; products in float32 at least. Each direction costs about one more
    forward pass. ``parameters``: only these; all of the model by default, tied ones once, under their first name, with what all
    their uses contribute. The model is left as it was, in its mode.

    Source: the contraction of a linear layer's factors: Goodfellow, arXiv:1510.01799.

    Raises:
        AnalysisError: a parameter is used in a way that is not known here, a direction has another shape or a parameter that
            the model has not, or one example's loss depends on another's.
    """
    wanted = find_parameters(model, parameters)
    placed = [place_direction(direction, wanted, dict(model.named_parameters())) for direction in directions]
    uses = find_uses(model, losses, wanted)
    column = {name: number for number, name in enumerate(wanted)}
    overlaps = torch.zeros(losses.num_examples, len(placed), len(wanted), dtype=torch.float64)
    squares = torch.zeros(losses.num_examples, len(wanted), dtype=torch.float64)
    values = torch.zeros(losses.num_examples, dtype=torch.float64)
    for part in losses.parts():
        rows = slice(part.start, part.stop)
        sums = torch.zeros(len(part), len(placed) + 1, len(wanted), dtype=torch.float64, device=_device(wanted))
        waiting: dict[str, list[Factors]] = defaultdict(list)

        def add(name: str, factors: Factors, sums: Tensor = sums, waiting: dict[str, list[Factors]] = waiting) -> None:
            for number, direction in enumerate(placed):
                if name in direction:
                    sums[:, number, column[name]] += factors.overlap(direction[name])
            sums[:, -1, column[name]] += _inner(factors, factors)
            if uses.counts[name] > 1:  # one gradient is the sum of several uses: their inner products belong to its square
                waiting[name].append(factors)

        values[rows] = _run_backward(model, losses, part, uses, add).cpu()
        for name, several in waiting.items():
            for first, second in combinations(several, 2):
                sums[:, -1, column[name]] += 2 * _inner(first, second)
        overlaps[rows], squares[rows] = sums[:, :-1].cpu(), sums[:, -1].cpu()
    return ExampleOverlaps(tuple(wanted), overlaps, squares, values)


def record_gram(model: nn.Module, losses: ExampleLosses, parameters: Sequence[str] | None = None) -> ExampleGram:
    """⟨∇ℓ_i, ∇ℓ_j⟩ of all pairs of examples, by parameter and in total; see `record_overlaps`.

    Inputs and gradients of all modules are held for all examples at once, and every place of an example is multiplied with
    every place of the others: for hundreds of examples, not for thousands of long ones.

    Raises:
        AnalysisError: as `record_overlaps`.
    """
    wanted = find_parameters(model, parameters)
    uses = find_uses(model, losses, wanted)
    parts = losses.parts()
    held: list[dict[str, list[Factors]]] = []
    for part in parts:
        held.append(defaultdict(list))
        _run_backward(model, losses, part, uses, lambda name, factors: held[-1][name].append(factors))
    gram = torch.zeros(len(wanted), losses.num_examples, losses.num_examples, dtype=torch.float64)
    for first, own in enumerate(held):
        for second in range(first, len(held)):
            rows, columns = (slice(parts[number].start, parts[number].stop) for number in (first, second))
            for number, name in enumerate(wanted):
                for factors in own[name]:
                    for others in held[second][name]:
                        gram[number, rows, columns] += _inner_with_all(factors, others).cpu()
            if second > first:
                gram[:, columns, rows] = gram[:, rows, columns].mT
    return ExampleGram(tuple(wanted), gram)


def _device(wanted: Mapping[str, nn.Parameter]) -> torch.device | None:
    return next((parameter.device for parameter in wanted.values()), None)


def place_direction(
    direction: Direction, wanted: Mapping[str, nn.Parameter], known: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """What of a direction lies in the wanted parameters, beside them, in the type that products are taken in."""
    placed = {}
    for name, tensor in direction.items():
        if name not in known:
            raise AnalysisError(f"a direction names {name!r}, which is no parameter of the model; it has {', '.join(known)}")
        if tensor.shape != known[name].shape:
            raise AnalysisError(
                f"a direction has the shape {list(tensor.shape)} in {name}, the parameter {list(known[name].shape)}; "
                "a direction has the layout of the model's own parameters"
            )
        if name in wanted:
            dtype = torch.promote_types(known[name].dtype, torch.float32)
            placed[name] = tensor.detach().to(known[name].device, dtype)
    return placed


def _inner(first: Factors, second: Factors) -> Tensor:
    if isinstance(first, MatrixFactors) and isinstance(second, MatrixFactors):
        return first.inner(second)
    assert isinstance(first, VectorFactors) and isinstance(second, VectorFactors)  # one parameter has one shape
    return first.inner(second)


def _inner_with_all(first: Factors, second: Factors) -> Tensor:
    if isinstance(first, MatrixFactors) and isinstance(second, MatrixFactors):
        return first.inner_with_all(second)
    assert isinstance(first, VectorFactors) and isinstance(second, VectorFactors)
    return first.inner_with_all(second)


class _Enter(torch.autograd.Function):
    """Where the graph begins, since no parameter requires a gradient: hands its input on and takes its gradient in."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(anchor)
        return output.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, torch.zeros_like(ctx.saved_tensors[0])


def _run_backward(
    model: nn.Module, losses: ExampleLosses, part: range, uses: Uses, add: Callable[[str, Factors], None]
) -> Float[Tensor, " example"]:
    """One forward and one backward pass of some examples; ``add`` is called once for every use of a parameter."""
    anchor = torch.zeros((), requires_grad=True)
    seen: Counter[str] = Counter()

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        kind, given = uses.kinds.get(module), first_input(args, kwargs)
        kept = given
        if kind is not None:
            given, output = _as_rows(given.detach(), output, part, kind, module)
            with torch.no_grad():
                kept = kind.keep(module, given)
        if not output.requires_grad:
            output = _Enter.apply(output, anchor)  # type: ignore[no-untyped-call]
        output.register_hook(partial(receive, module, kept, kept._version))  # type: ignore[no-untyped-call]
        return output

    def receive(module: nn.Module, kept: Tensor, version: int, gradient: Tensor) -> None:
        names = uses.names[module]
        seen.update(names.values())
        for name in names.values():
            if seen[name] > uses.counts[name]:
                raise AnalysisError(
                    f"examples {part.start} to {part.stop - 1} use {name} more often than the first two, which use it "
                    f"{uses.counts[name]} times: a model that chooses its modules by its input is not known here; leave "
                    f"{name} out of `parameters`"
                )
        if kept._version != version:
            raise AnalysisError(
                f"the input of a {type(module).__name__} ({', '.join(names.values())}) was overwritten after the module had "
                "read it, so its gradients are lost; change the model's in-place operation to an ordinary one"
            )
        with torch.no_grad():
            reading = uses.kinds[module].read(module, kept, gradient)
            for own, name in names.items():
                add(name, reading[own]())

    handles = [module.register_forward_hook(keep, with_kwargs=True, prepend=True) for module in uses.names]
    try:
        with only_requiring(model, ()):
            values = losses.compute(model, part)
            check_values(values, part, losses)
            if values.requires_grad:
                torch.autograd.grad(values.sum(), anchor)
    finally:
        for handle in handles:
            handle.remove()
    return values.detach()


def _as_rows(given: Tensor, output: Tensor, part: range, kind: LayerKind, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Input and output with a row an example: positions that a model looks up once for all rows become each row's own."""
    if len(given) == len(part):
        return given, output
    if kind.name == "embedding" and len(given) == 1:
        return given.expand(len(part), *given.shape[1:]), output.expand(len(part), *output.shape[1:])
    raise AnalysisError(
        f"a {type(module).__name__} was given {len(given)} rows for {len(part)} examples (shape {list(given.shape)}): its rows "
        "are no examples, so that gradients cannot be told apart; leave its parameters out of `parameters`"
    )

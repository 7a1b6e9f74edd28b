"""The overlaps of `mechsub.gradients.per_example` a second time, from gradients that the library bergson forms.

It covers linear layers and transformers' Conv1D with their biases. Embeddings, norms and weights with several uses, such as a
tied output layer, are left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from mechsub.errors import AnalysisError
from mechsub.gradients.layers import list_kinds
from mechsub.gradients.losses import ExampleLosses
from mechsub.gradients.per_example import Direction, ExampleOverlaps, place_direction
from mechsub.gradients.uses import check_values, find_parameters, find_uses, only_requiring

INSTALL = "`pip install 'mechsub[bergson]'`"
_NEXT_STEP = "take the exact overlaps instead, of `mechsub.gradients.per_example`"


def is_installed() -> bool:
    """Whether there is a bergson to import."""
    return find_spec("bergson") is not None


def record_overlaps_by_bergson(model: nn.Module, losses: ExampleLosses, directions: Sequence[Direction]) -> ExampleOverlaps:
    """⟨∇ℓ_i, d⟩ and ‖∇ℓ_i‖² of every example i and direction d, in the parameters that bergson covers, without projection.

    Equal to `mechsub.gradients.per_example.record_overlaps` up to rounding; products in float32 at least, but bergson sums the
    biases of a model in half precision in its own type. It forms the gradients of one weight at a time, for all examples of a
    batch, [example, out, in]: cheaper than pairs of places where examples are longer than weights are wide. The model is left
    as it was.

    Source: Quirke et al., arXiv:2606.11660.

    Raises:
        AnalysisError: bergson is not installed, covers nothing of the model, or cannot see its gradients.
    """
    covered = _find_covered(model, losses)
    names = {name for own in covered.values() for name in own.names.values()}
    wanted = {name: parameter for name, parameter in model.named_parameters() if name in names}
    column = {name: number for number, name in enumerate(wanted)}
    placed = [place_direction(direction, wanted, dict(model.named_parameters())) for direction in directions]
    overlaps = torch.zeros(losses.num_examples, len(placed), len(wanted), dtype=torch.float64)
    squares = torch.zeros(losses.num_examples, len(wanted), dtype=torch.float64)
    values = torch.zeros(losses.num_examples, dtype=torch.float64)
    for part in losses.parts():
        rows, seen = slice(part.start, part.stop), set[str]()

        def receive(module: str, gradients: Any, rows: slice = rows, seen: set[str] = seen) -> None:
            if module in seen:  # bergson keeps one input of each: the gradient would be of the wrong one
                raise AnalysisError(f"{module} is called more than once in a batch, which bergson cannot see; {_NEXT_STEP}")
            seen.add(module)
            for name, formed in covered[module].form(gradients).items():
                if len(formed) != rows.stop - rows.start:
                    raise AnalysisError(
                        f"{module} was given {len(formed)} rows for {rows.stop - rows.start} examples: bergson takes rows for "
                        f"examples; {_NEXT_STEP}"
                    )
                squares[rows, column[name]] = torch.linalg.vecdot(formed, formed).double().cpu()
                for number, direction in enumerate(placed):
                    if name in direction:
                        overlaps[rows, number, column[name]] = (formed @ direction[name].flatten()).double().cpu()

        values[rows] = _run_backward(model, losses, part, covered, receive).cpu()
        missing = [module for module, own in covered.items() if own.is_reached and module not in seen]
        if missing:
            raise AnalysisError(
                f"bergson saw no gradient of {missing[0]}: the loss reaches it, but not from the input embedding; {_NEXT_STEP}"
            )
    return ExampleOverlaps(tuple(wanted), overlaps, squares, values)


@dataclass(frozen=True)
class _Covered:
    """A module of which bergson sees all gradients."""

    names: Mapping[str, str]
    """Its own parameters' names in the model."""
    is_transposed: bool
    """Whether its weight is stored as [in, out]."""
    is_reached: bool
    """Whether the loss depends on it."""

    def form(self, gradients: Any) -> dict[str, Tensor]:
        """From bergson's ``OuterProductGradients``: [example, number], by parameter, laid out as the parameter is."""
        dtype = torch.promote_types(gradients.g.dtype, torch.float32)
        formed = gradients.to(gradients.g.device, dtype).materialize()  # [example, out, in], the bias behind the last input
        weight = formed[..., :-1] if "bias" in self.names else formed
        found = {"weight": (weight.mT if self.is_transposed else weight).flatten(1), "bias": formed[..., -1]}
        return {name: found[own] for own, name in self.names.items()}


@dataclass(frozen=True)
class _Recorder:
    """What stands in the place of bergson's scorer, which would add up all modules."""

    accumulate: Callable[[str, Any], None]
    streaming: bool = True
    """Whether it takes each module's gradients as they come."""


def _find_covered(model: nn.Module, losses: ExampleLosses) -> dict[str, _Covered]:
    """By module. Those that share a parameter are left out, since bergson sees one use of it only."""
    if not is_installed():
        raise AnalysisError(f"bergson is not installed here; {INSTALL}, or {_NEXT_STEP}")
    from bergson import GradientCollector  # optional and heavy
    from bergson.gradients import LayerAdapter

    known = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = {name: model.get_submodule(name) for name in GradientCollector.discover_targets(model)}
    own = {
        name: {own: known[id(parameter)] for own, parameter in module.named_parameters(recurse=False)}
        for name, module in modules.items()
        if list_kinds(module)
    }
    counts = find_uses(
        model, losses, find_parameters(model, [name for names in own.values() for name in names.values()])
    ).counts
    covered = {
        module: _Covered(names, LayerAdapter.weight_transposed(modules[module]), counts[names["weight"]] == 1)
        for module, names in own.items()
        if all(counts[name] <= 1 for name in names.values())
    }
    if not covered:
        raise AnalysisError(f"bergson covers no parameter of a {type(model).__name__}; {_NEXT_STEP}")
    return covered


def _run_backward(
    model: nn.Module, losses: ExampleLosses, part: range, covered: Mapping[str, _Covered], receive: Callable[[str, Any], None]
) -> Tensor:
    """One forward and one backward pass of some examples under bergson's hooks; their losses."""
    from bergson import GradientCollector, GradientProcessor, IndexConfig  # optional and heavy
    from datasets import Dataset

    find_input = getattr(model, "get_input_embeddings", None)
    if find_input is None:
        raise AnalysisError(f"a {type(model).__name__} has no input embedding, where bergson begins; {_NEXT_STEP}")
    start = find_input().weight  # the one parameter that wants a gradient, so that no other is formed for the whole batch
    with only_requiring(model, [start]):
        collector = GradientCollector(
            model=model,
            data=Dataset.from_dict({"example": [*part]}),
            cfg=IndexConfig(run_path=""),  # nothing is written
            processor=GradientProcessor(include_bias=True),
            target_modules={*covered},
            scorer=_Recorder(receive),
        )
        try:
            with collector.with_batch():
                values = losses.compute(model, part)
                check_values(values, part, losses)
                if values.requires_grad:
                    torch.autograd.grad(values.sum(), start, allow_unused=True)
        except AssertionError as error:
            raise AnalysisError(f"bergson cannot follow a {type(model).__name__}: {error}; {_NEXT_STEP}") from error
        finally:
            for module in covered:  # bergson leaves this behind
                vars(model.get_submodule(module)).pop("_collect_bias", None)
    return values.detach()

"""Which modules a loss uses which parameters through: seen in the graph of two examples, so that no use goes unnoticed."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mechsub.errors import AnalysisError
from mechsub.gradients.layers import KNOWN_KINDS, LayerKind, list_kinds
from mechsub.gradients.losses import ExampleLosses

_NEXT_STEP = "leave them out of `parameters` to measure the others"


@dataclass(frozen=True)
class Uses:
    """How a loss uses the parameters that are asked for."""

    kinds: Mapping[nn.Module, LayerKind]
    """Of the modules that own one of them and are called."""
    names: Mapping[nn.Module, Mapping[str, str]]
    """By module, its own parameters' names in the model; a tied one has one name."""
    counts: Mapping[str, int]
    """How often each is used in a forward pass; 0: the loss does not reach it."""


@dataclass
class _Call:
    module: nn.Module
    given: Tensor
    output: Tensor
    node: Any = field(init=False)

    def __post_init__(self) -> None:
        self.node = self.output.grad_fn  # in-place work on the output later would put another one there


def find_parameters(model: nn.Module, only: Sequence[str] | None) -> dict[str, nn.Parameter]:
    """The model's parameters, tied ones once, or those that are asked for.

    Raises:
        AnalysisError: one is unknown, or not made of real numbers.
    """
    known = dict(model.named_parameters())
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise AnalysisError(f"the model has no parameter {unknown[0]!r} (tied ones have one name); it has {', '.join(known)}")
    wanted = known if only is None else {name: known[name] for name in known if name in set(only)}
    for name, parameter in wanted.items():
        if not parameter.is_floating_point():
            raise AnalysisError(f"{name} is stored as {parameter.dtype}, so it has no gradient; {_NEXT_STEP}")
    return wanted


def find_uses(model: nn.Module, losses: ExampleLosses, wanted: Mapping[str, nn.Parameter]) -> Uses:
    """Follow the first two examples through the model.

    Raises:
        AnalysisError: there are no examples, one's loss depends on another's, or a parameter is used in a way that is not
            known here.
    """
    if losses.num_examples == 0:
        raise AnalysisError(f"there are no examples in {losses.description}: give at least one")
    number = {id(parameter): name for name, parameter in wanted.items()}
    names = {
        module: {own: number[id(parameter)] for own, parameter in module._parameters.items() if id(parameter) in number}
        for module in model.modules()
    }
    names = {module: own for module, own in names.items() if own}
    examples, calls = range(min(2, losses.num_examples)), list[_Call]()
    with only_requiring(model, wanted.values()), _watched(names, calls):
        values = losses.compute(model, examples)
        check_values(values, examples, losses)
        reached, counts = _follow(values, number)
        calls = [call for call in calls if call.node in reached]
        _check_company(values, calls, losses)
    return Uses(_find_kinds(model, names, calls, counts), names, {name: counts[name] for name in wanted})


def check_values(values: Tensor, examples: range, losses: ExampleLosses) -> None:
    """One loss an example, or it cannot be told whose gradient is whose."""
    if values.shape != (len(examples),):
        raise AnalysisError(
            f"{losses.description}: {len(examples)} examples gave losses of shape {list(values.shape)}; return one number each"
        )


@contextmanager
def only_requiring(model: nn.Module, wanted: Any) -> Iterator[None]:
    """No parameter but these requires a gradient, for as long as the context lasts."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, required in before:
            if required:
                parameter.requires_grad_(False)
        for parameter in wanted:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module of a known kind is given."""
    return args[0] if args else next(iter(kwargs.values()), None)


@contextmanager
def _watched(names: Mapping[nn.Module, Mapping[str, str]], calls: list[_Call]) -> Iterator[None]:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        given = first_input(args, kwargs)
        if torch.is_grad_enabled() and isinstance(output, Tensor) and isinstance(given, Tensor) and output.requires_grad:
            calls.append(_Call(module, given, output))

    handles = [module.register_forward_hook(watch, with_kwargs=True, prepend=True) for module in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _follow(values: Tensor, number: Mapping[int, str]) -> tuple[set[Any], Counter[str]]:
    """Every node of the graph under the losses, and how many of its edges lead to each parameter."""
    stack = [] if values.grad_fn is None else [values.grad_fn]
    reached: set[Any] = set(stack)
    counts: Counter[str] = Counter()
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            variable = getattr(node, "variable", None)
            if variable is not None:
                if id(variable) in number:
                    counts[number[id(variable)]] += 1
            elif node not in reached:
                reached.add(node)
                stack.append(node)
    return reached, counts


def _check_company(values: Tensor, calls: Sequence[_Call], losses: ExampleLosses) -> None:
    """The first example's loss must not depend on what the second one's rows hold."""
    if len(values) < 2 or not calls:
        return
    per_row = [call for call in calls if call.output.shape[:1] == values.shape]
    found = torch.autograd.grad(values[0], [call.output for call in per_row], allow_unused=True)
    if any(gradient is not None and bool((gradient[1:] != 0).any()) for gradient in found):
        raise AnalysisError(
            f"{losses.description}: an example's loss depends on the others of its batch, so that no gradient belongs to it "
            "alone; put the model into evaluation mode, or set at_once to 1"
        )


def _find_kinds(
    model: nn.Module, names: Mapping[nn.Module, Mapping[str, str]], calls: Sequence[_Call], counts: Counter[str]
) -> dict[nn.Module, LayerKind]:
    """The kind of every module that is called; every edge to a parameter must be a call of a module of a known kind."""
    where = {module: name for name, module in model.named_modules()}
    kinds: dict[nn.Module, LayerKind] = {}
    explained: Counter[str] = Counter()
    refused: dict[str, str] = {}
    for call in calls:
        own = names[call.module]
        with torch.no_grad():
            fitting = [
                kind for kind in list_kinds(call.module) if kind.fits(call.module, call.given.detach(), call.output.detach())
            ]
        described = f"{where[call.module] or 'the model'} ({type(call.module).__name__})"
        if not fitting or kinds.setdefault(call.module, fitting[0]) is not fitting[0]:
            refused |= dict.fromkeys(own.values(), f"{described}, a module of no kind that is known here")
        explained.update(own.values())
    for name, count in counts.items():
        if name not in refused and count != explained[name]:
            seen = f"{count} times, of which calls of modules that own it explain {explained[name]}"
            refused[name] = f"{seen}: something takes it out of its module"
    refused = {name: why for name, why in refused.items() if counts[name]}
    if refused:
        name, why = next(iter(refused.items()))
        others = f" ({len(refused) - 1} further parameters too)" if len(refused) > 1 else ""
        raise AnalysisError(
            f"the gradient of {name}{others} cannot be taken example by example: it is used by {why}. "
            f"Known are {KNOWN_KINDS}; {_NEXT_STEP}"
        )
    return kinds

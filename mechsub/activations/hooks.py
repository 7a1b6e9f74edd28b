"""The hook core: plain forward hooks on the model's own modules, gone when their context closes."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mechsub.activations.backends import Visit
from mechsub.activations.hook_points import HookPoint
from mechsub.errors import ActivationError


@dataclass(frozen=True)
class HookedView:
    """A `mechsub.activations.backends.ModelView` of the model itself."""

    model: nn.Module

    @contextmanager
    def visiting(self, visits: Mapping[HookPoint, Visit]) -> Iterator[None]:
        """Hooks on the modules of some hook points; removed also when the body raises."""
        with ExitStack() as handles:
            for point, visit in visits.items():
                module = find_module(self.model, point, HookBackend.name)
                if point.side == "output":
                    handle = module.register_forward_hook(_after(visit))
                else:
                    handle = module.register_forward_pre_hook(_before(visit), with_kwargs=True)
                handles.callback(handle.remove)
            yield


class HookBackend:
    """A `mechsub.activations.backends.Backend`: knows every model whose hook points a family knows."""

    name = "hooks"

    @contextmanager
    def open(self, model: nn.Module) -> Iterator[HookedView]:
        """The model itself; nothing is done to it before hook points are visited."""
        yield HookedView(model)


def find_module(model: nn.Module, point: HookPoint, backend: str) -> nn.Module:
    """The module that a hook point is read at, for a backend that reads plain modules.

    Raises:
        ActivationError: it is not known where that is, or the model has no such module.
    """
    if point.module is None:
        raise ActivationError(
            f"the backend {backend} does not know which module of a {type(model).__name__} is {point.name}; "
            "`--backend transformer_lens` knows the most architectures"
        )
    try:
        return model.get_submodule(point.module)
    except AttributeError:
        raise ActivationError(
            f"the model has no module {point.module!r}, where {point.name} is read: it is of another architecture"
        ) from None


def _after(visit: Visit) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return visit(output)
        changed = visit(output[0])
        return None if changed is None else (changed, *output[1:])

    return hook


def _before(visit: Visit) -> Callable[..., Any]:
    def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs:
            changed = visit(inputs[0])
            return None if changed is None else ((changed, *inputs[1:]), named)
        first = next(iter(named))  # blocks are called with their hidden states first, by position or by name
        changed = visit(named[first])
        return None if changed is None else (inputs, {**named, first: changed})

    return hook

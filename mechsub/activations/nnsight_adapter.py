"""The nnsight backend: a model's activations as nnsight's traces show them.

The library is imported when a model is first opened: that patches `Tensor.backward`, which is put back.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mechsub.activations.backends import Visit
from mechsub.activations.hook_points import HookPoint
from mechsub.activations.hooks import find_module
from mechsub.activations.sharing import share_weights


@dataclass(frozen=True)
class TracedView:
    """A `mechsub.activations.backends.ModelView` of a copy of the model, each call of which is one trace."""

    model: nn.Module
    envoy: Any
    keep: Any
    """`nnsight.save`, which keeps a value beyond its trace. Not named so here: nnsight gives every object a ``save``, which a
    dataclass would take for a default."""
    order: Mapping[tuple[str, str], int]
    """When a module is entered and left: a trace asks for values in the order in which they come about."""
    _visits: list[tuple[HookPoint, Visit]] = field(default_factory=list)

    @contextmanager
    def visiting(self, visits: Mapping[HookPoint, Visit]) -> Iterator[None]:
        """Each call of the model is traced while there is a visit to make."""
        for point in visits:
            find_module(self.model, point, NnsightBackend.name)
        before = list(self._visits)
        added = [*before, *visits.items()]
        self._visits[:] = sorted(added, key=lambda visit: self.order[visit[0].module or "", visit[0].side])
        try:
            yield
        finally:
            self._visits[:] = before

    def call(self, forward: Any, *inputs: Any, **arguments: Any) -> Any:
        """The model's own forward, with the visits made."""
        if not self._visits:
            return forward(*inputs, **arguments)
        with self.envoy.trace(*inputs, fn=forward, **arguments) as tracer:
            for point, visit in self._visits:
                _visit(self.envoy.get(point.module), point.side, visit)
            output = self.keep(tracer.result)
        return output


class NnsightBackend:
    """A `mechsub.activations.backends.Backend`: knows every model whose hook points a family knows.

    What nnsight changes for the whole process by being imported, beside `Tensor.backward`, stays: a method ``save`` of all
    objects. Whoever wants ``with loss.backward():`` in the same process calls `nnsight.intervention.backward.install`.
    """

    name = "nnsight"

    @contextmanager
    def open(self, model: nn.Module) -> Iterator[TracedView]:
        """A copy of the model that shares its weights, since nnsight replaces every module's forward."""
        backward = torch.Tensor.backward
        try:
            import nnsight

            shared = share_weights(model)
            own = shared.forward
            envoy = nnsight.NNsight(shared)
            view = TracedView(shared, envoy, nnsight.save, _order(shared))
            # nnsight's forward of the whole model is what a trace runs; the copy's own call is to open that trace.
            shared.forward = functools.wraps(own)(functools.partial(view.call, shared.forward))
            yield view
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]


def _visit(envoy: Any, side: str, visit: Visit) -> None:
    value = envoy.output if side == "output" else envoy.input
    changed = visit(value if isinstance(value, Tensor) else value[0])
    if changed is None:
        return
    if side == "input":
        envoy.input = changed
    else:
        envoy.output = changed if isinstance(value, Tensor) else (changed, *value[1:])


def _order(model: nn.Module) -> dict[tuple[str, str], int]:
    """The place of every module's input and output among all, where children run in the order that they are declared in."""
    order: dict[tuple[str, str], int] = {}

    def walk(path: str, module: nn.Module) -> None:
        order[path, "input"] = len(order)
        for name, child in module._modules.items():
            if child is not None:
                walk(f"{path}.{name}" if path else name, child)
        order[path, "output"] = len(order)

    walk("", model)
    return order

"""Backends: how activations are reached. Plain forward hooks are the default; TransformerLens and nnsight stand beside them."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from mechsub.activations.hook_points import HookPoint
from mechsub.errors import ActivationError
from mechsub.settings import nearest_name

Visit = Callable[[Tensor], Tensor | None]
"""Sees the activation at a hook point as it passes; what it returns, if anything, goes on in its place.

It may raise `ForwardStopped` to end the forward pass there.
"""


class ForwardStopped(Exception):
    """Ends a forward pass after the last activation that is needed; whoever calls the model catches it."""


@runtime_checkable
class ModelView(Protocol):
    """A model as a backend shows it, for as long as it is open."""

    @property
    def model(self) -> nn.Module:
        """What is called in the model's place, with the model's own arguments; it gives what the model gives."""

    def visiting(self, visits: Mapping[HookPoint, Visit]) -> AbstractContextManager[None]:
        """While open, each call of ``model`` shows each hook point's activation to its visit.

        Raises:
            ActivationError: the backend does not reach one of the hook points.
        """


@runtime_checkable
class Backend(Protocol):
    """A way to reach the activations of plain modules."""

    name: str

    def open(self, model: nn.Module) -> AbstractContextManager[ModelView]:
        """A view of a model; when it closes, also by an error, the model is as it was.

        Raises:
            ActivationError: the backend does not know the model's architecture; it says which backend does.
        """


BACKENDS = {
    "hooks": "mechsub.activations.hooks:HookBackend",
    "transformer_lens": "mechsub.activations.transformer_lens_adapter:TransformerLensBackend",
    "nnsight": "mechsub.activations.nnsight_adapter:NnsightBackend",
}
"""Where each is. A library is imported when a model is first opened with it: it takes seconds, and nnsight patches torch."""
LIBRARIES = ("transformer_lens", "nnsight")
"""The backends that need a library of their own, of their name."""


def open_backend(name: str) -> Backend:
    """The backend of a name.

    Raises:
        ActivationError: there is none of that name, or its library is not installed.
    """
    if name not in BACKENDS:
        raise ActivationError(f"there is no backend {name!r}; {nearest_name(name, list(BACKENDS))}")
    if name in LIBRARIES and importlib.util.find_spec(name) is None:
        raise ActivationError(
            f"the backend {name} needs a library that is not installed here; `pip install 'mechsub[backends]'`, or take "
            "`--backend hooks`, which needs none"
        )
    module, _, attribute = BACKENDS[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)()
    return backend

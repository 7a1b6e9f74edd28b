"""The TransformerLens backend: a model's activations at the hook points of a `TransformerBridge`.

The library is imported when a model is first opened: that takes seconds.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechsub.activations.backends import Visit
from mechsub.activations.hook_points import HookPoint
from mechsub.activations.sharing import share_weights
from mechsub.errors import ActivationError

_INSTEAD = "`--backend hooks` and `--backend nnsight` read a model's own modules"


@dataclass(frozen=True)
class BridgedView:
    """A `mechsub.activations.backends.ModelView` of a copy of the model that holds TransformerLens's components."""

    model: PreTrainedModel
    bridge: Any

    @contextmanager
    def visiting(self, visits: Mapping[HookPoint, Visit]) -> Iterator[None]:
        """Hooks on the bridge's hook points, found by their names alone."""
        known = self.bridge.hook_dict
        for point in visits:
            if point.name not in known:
                raise ActivationError(f"TransformerLens has no hook point {point.name} in this architecture; {_INSTEAD}")
        with self.bridge.hooks(fwd_hooks=[(point.name, _as_hook(visit)) for point, visit in visits.items()]):
            yield


class TransformerLensBackend:
    """A `mechsub.activations.backends.Backend`: knows every causal language model that TransformerLens has a bridge for."""

    name = "transformer_lens"

    @contextmanager
    def open(self, model: nn.Module) -> Iterator[BridgedView]:
        """A bridge on a copy of the model that shares its weights, since a bridge replaces modules; attention is eager there.

        Raises:
            ActivationError: TransformerLens has no bridge for the model, or one that would compute something else.
        """
        sources, bridged_qkv, supported = _import_library()
        architecture = type(model).__name__
        if not isinstance(model, PreTrainedModel) or architecture not in supported:
            raise ActivationError(f"TransformerLens does not know the architecture {architecture}; {_INSTEAD}")
        if model.dtype == torch.float64:
            raise ActivationError(
                "TransformerLens needs eager attention, which in transformers gives NaN for padded prompts of float64 models; "
                f"{_INSTEAD}"
            )
        shared = share_weights(model)
        assert isinstance(shared, PreTrainedModel)
        shared.set_attn_implementation("eager")
        bridge = sources.build_bridge_from_module(shared, architecture, hf_config=copy.deepcopy(model.config))
        if any(isinstance(module, bridged_qkv) for module in bridge.modules()) and _has_adapter(model):
            raise ActivationError(
                f"TransformerLens takes the query, key and value weights of a {architecture} apart and would leave the adapter "
                f"out; {_INSTEAD}, adapters included"
            )
        yield BridgedView(shared, bridge)


def _import_library() -> tuple[Any, type[nn.Module], Mapping[str, Any]]:
    """Its sources, its attention with joint weights, and its architectures; without what the import sets for all programs."""
    logger = logging.getLogger("transformers")
    level = logger.level
    with warnings.catch_warnings():
        from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
        from transformer_lens.model_bridge import JointQKVAttentionBridge, sources
    logger.setLevel(level)
    return sources, JointQKVAttentionBridge, SUPPORTED_ARCHITECTURES


def _has_adapter(model: nn.Module) -> bool:
    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def _as_hook(visit: Visit) -> Callable[..., Tensor | None]:
    def hook(activations: Tensor, hook: Any) -> Tensor | None:  # TransformerLens passes `hook` by name
        return visit(activations)

    return hook

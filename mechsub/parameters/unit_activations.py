"""What units do on some inputs, read where their readers take them in; the model is left as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@contextmanager
def watch_inputs(model: nn.Module, modules: Sequence[str]) -> Iterator[Mapping[str, list[Tensor]]]:
    """Collect what comes into some modules, [sample, feature] for each call, while the context is open."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def watch(name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[name].append(inputs[0].detach().flatten(0, -2).cpu())

        return keep

    handles = []
    try:
        for name in modules:
            handles.append(model.get_submodule(name).register_forward_pre_hook(watch(name)))
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def record_reader_inputs(
    model: nn.Module, modules: Sequence[str], batches: Sequence[Tensor]
) -> dict[str, Float[Tensor, "sample feature"]]:
    """What comes into some modules while the model runs through ``batches``, each as the model takes it."""
    device = next(model.parameters()).device
    with watch_inputs(model, modules) as seen, torch.no_grad():
        for batch in batches:
            model(batch.to(device))
    return {name: torch.cat(found) for name, found in seen.items()}

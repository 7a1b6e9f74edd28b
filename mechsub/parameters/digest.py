"""A hash of a model's weights that does not depend on how they are stored."""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from mechsub.lineages import Lineage


def digest_weights(reference: Lineage, member: int = 0) -> str:
    """The digest of one member of a lineage at step 0; see `digest_tensors`."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        state = reference.spec.tensors
        for name in sorted(name for name, info in state.items() if info.tied_to is None):
            yield name, reference.load_tensor(0, name, member)

    return digest_tensors(tensors())


def digest_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the names, shapes and values of tensors, which come in the order of their names.

    Values are hashed in float32: what was stored in half precision and trained in full has the same digest in both.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{list(values.shape)}".encode())
        digest.update(np.ascontiguousarray(values.numpy()).data)
    return digest.hexdigest()

"""Blocks: what numbers are given for as one, a tensor or a section of it; tied tensors count once."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mechsub.checkpoints import TensorInfo


@dataclass(frozen=True)
class Block:
    """A tensor, or a section of it, e.g. the queries of GPT-2's fused ``c_attn``."""

    name: str
    """The tensor's, with the section's kind behind it: ``h.0.attn.c_attn.weight [attention q]``."""
    tensor: str
    layer: str
    kind: str
    shape: tuple[int, ...]
    """Of the block, as it is stored."""
    axis: int = 0
    """Along which the tensor is cut."""
    start: int = 0
    """The first row, or column where ``axis`` is 1, of the tensor that belongs to it."""

    @property
    def num_parameters(self) -> int:
        """Of one member."""
        return int(np.prod(self.shape))

    @property
    def index(self) -> tuple[slice, ...]:
        """What of the tensor it is: ``tensor[block.index]``."""
        cut = slice(self.start, self.start + self.shape[self.axis])
        return (slice(None),) * self.axis + (cut,)


def list_blocks(tensors: Mapping[str, TensorInfo]) -> list[Block]:
    """The blocks of a lineage's tensors, in their order; a tied tensor is none."""
    blocks = []
    for name, info in tensors.items():
        if info.tied_to is not None:
            continue
        if not info.sections:
            blocks.append(Block(name, name, info.layer, info.kind, info.shape))
        axis = 1 if info.transposed and len(info.shape) > 1 else 0
        for section in info.sections:
            shape = list(info.shape)
            shape[axis] = section.stop - section.start
            label = f"{name} [{section.kind}]"
            blocks.append(Block(label, name, info.layer, section.kind, tuple(shape), axis, section.start))
    return blocks

"""Rotations of the residual stream that leave a transformer's function as it is.

A block reads the stream x through a norm, h = γ ⊙ n(x) + β, and adds to it. With an orthogonal Q the stream Qx is written by
Q W_out (and Q b, and embeddings E Qᵀ) and read by W_in Qᵀ; the function stays where the norm lets Q through:

- RMSNorm without gain: n(Qx) = Q n(x) for every orthogonal Q. LayerNorm without gain also takes the mean out, so that Q has to
  fix (1, …, 1): then it commutes with the centring, and no matrix has to be centred for it.
- A block's gain γ and shift β are folded into what reads them, exactly: W_in diag(γ), b + W_in β.
- The final gain can be folded into the unembedding where that is a matrix of its own: W_U diag(γ), γ = 1, β / γ. One that is
  tied to the embeddings cannot hold it: E Qᵀ diag(γ') Q = E diag(γ) asks for Q diag(γ) Qᵀ to be diagonal. So Q mixes only
  coordinates whose final gains are equal, and puts coordinates in another order. After training gains are all different, and
  what is left is a permutation, with signs under RMSNorm (under LayerNorm they would move (1, …, 1)). Then nothing is folded:
  gains change places with their coordinates.

Q is drawn from the Haar measure on what is left. Training follows a signed permutation exactly, under Adam too. It follows any
other rotation under SGD, from the folded model on and as far as gains are not trained; Adam works coordinate by coordinate.

Source: Ashkboos et al., arXiv:2401.15024 (SliceGPT, section 3.2: computational invariance).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from mechsub.checkpoints import TensorInfo
from mechsub.errors import RecipeError

_GATED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
Axis = tuple[str, int]
"""A tensor and one of its axes."""


@dataclass(frozen=True)
class Norm:
    """A norm of the residual stream, and what reads it."""

    gain: str
    shift: str | None
    readers: tuple[Axis, ...]
    """The weights that read it, and the axis along which they do."""


@dataclass(frozen=True)
class ResidualLayout:
    """Everything that touches the residual stream."""

    is_centred: bool
    """Whether norms take the mean out (LayerNorm)."""
    width: int
    written: tuple[Axis, ...]
    """Embeddings, and what blocks add: weights and biases, with the axis that is the stream."""
    norms: tuple[Norm, ...]
    final: Norm
    """Its reader is the unembedding; none where that is tied to the embeddings."""


@dataclass
class Rotation:
    """An orthogonal matrix, block by block: it mixes coordinates inside groups, then puts all in another order."""

    matrix: Float[Tensor, "d_model d_model"]
    order: Sequence[int]
    """The old coordinate whose group stands at each place: gains, which are equal inside a group, move with it."""
    description: str = field(default="")


def find_layout(config: PretrainedConfig, table: Mapping[str, TensorInfo], source: str) -> ResidualLayout:
    """What touches the residual stream of a known architecture.

    Raises:
        RecipeError: the architecture is not known here.
    """
    blocks = range(config.num_hidden_layers)
    if config.model_type == "gpt2":
        return _gpt2_layout(config, table, blocks)
    if config.model_type in _GATED:
        return _gated_layout(config, table, blocks)
    raise RecipeError(
        f"{source}: what writes and reads the residual stream of a {config.model_type} model is not known, so that it cannot "
        f"be rotated; known are gpt2, {', '.join(sorted(_GATED))}: choose one of them, or drop the conditions with "
        "`rotate_residual`"
    )


def rotate_state(
    state: Mapping[str, Tensor], layout: ResidualLayout, stream: np.random.Generator, source: str
) -> tuple[dict[str, Tensor], str]:
    """The same function with its residual stream rotated, computed in float64 and stored as it was; and in words how.

    Raises:
        RecipeError: a shift of a norm cannot be folded: its reader has no bias, or its gain is zero.
    """
    found = {name: tensor.double().clone() for name, tensor in state.items()}
    groups = _mixed_groups(found, layout)
    rotation = _draw_rotation(groups, layout, stream)
    if len(groups) < layout.width:
        for norm in layout.norms:
            _fold(found, norm, source)
        if layout.final.readers:
            _fold_final(found, layout.final, source)
    readers = [reader for norm in (*layout.norms, layout.final) for reader in norm.readers]
    shifts = [(norm.shift, 0) for norm in (*layout.norms, layout.final) if norm.shift is not None]
    for name, axis in (*layout.written, *readers, *shifts):
        found[name] = torch.tensordot(found[name], rotation.matrix, ([axis], [1])).movedim(-1, axis)
    for norm in (*layout.norms, layout.final):
        found[norm.gain] = found[norm.gain][torch.as_tensor(rotation.order)]
    return {name: tensor.to(state[name].dtype) for name, tensor in found.items()}, rotation.description


def draw_haar(size: int, stream: np.random.Generator, *, fixes_ones: bool = False) -> Float[Tensor, "size size"]:
    """A Haar-random orthogonal matrix in float64; ``fixes_ones``: among those that leave (1, …, 1) where it is.

    QR of a Gaussian matrix, R's diagonal made positive. Source: Mezzadri, arXiv:math-ph/0609050.
    """
    if fixes_ones:
        if size == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        ones = torch.full((size, 1), size**-0.5, dtype=torch.float64)
        whole = torch.linalg.qr(torch.cat([ones, torch.eye(size, size - 1, dtype=torch.float64)], 1)).Q
        rest = whole[:, 1:]
        fixing: Tensor = ones @ ones.T + rest @ draw_haar(size - 1, stream) @ rest.T
        return fixing
    factors = torch.linalg.qr(torch.from_numpy(stream.standard_normal((size, size))))
    drawn: Tensor = factors.Q * torch.where(factors.R.diagonal() < 0, -1.0, 1.0)
    return drawn


def _mixed_groups(state: Mapping[str, Tensor], layout: ResidualLayout) -> list[list[int]]:
    """The coordinates that may be mixed with each other: all, or with a tied unembedding those of equal final gain."""
    if layout.final.readers:
        return [list(range(layout.width))]
    found: dict[float, list[int]] = {}
    for place, gain in enumerate(state[layout.final.gain].tolist()):
        found.setdefault(gain, []).append(place)
    return list(found.values())


def _draw_rotation(groups: Sequence[Sequence[int]], layout: ResidualLayout, stream: np.random.Generator) -> Rotation:
    mixed = torch.zeros(layout.width, layout.width, dtype=torch.float64)
    for group in groups:
        places = torch.as_tensor(group)
        mixed[places[:, None], places] = draw_haar(len(group), stream, fixes_ones=layout.is_centred)
    order = stream.permutation(layout.width)
    if len(groups) == layout.width:
        kind = "a permutation" if layout.is_centred else "a signed permutation"
        words = f"{kind} of its coordinates, as the unembedding is tied and all final gains differ"
    else:
        whole = f"in {len(groups)} groups of coordinates with equal final gains" if len(groups) > 1 else "of the whole stream"
        words = f"a Haar-random rotation {whole}{' that fixes (1, …, 1)' if layout.is_centred else ''}"
    return Rotation(mixed[order], order.tolist(), words)


def _fold(state: dict[str, Tensor], norm: Norm, source: str) -> None:
    """A block's gain and shift into what reads them."""
    gain, shift = state[norm.gain], None if norm.shift is None else state[norm.shift]
    for name, axis in norm.readers:
        if shift is not None and bool(shift.any()):
            bias = f"{name.removesuffix('.weight')}.bias"
            if bias not in state:
                raise RecipeError(
                    f"{source}: the residual stream cannot be rotated exactly: {norm.shift} is not zero, and {name}, which "
                    "reads it, has no bias to fold it into; drop the conditions with `rotate_residual`"
                )
            state[bias] = state[bias] + torch.tensordot(state[name], shift, ([axis], [0]))
        state[name] = (state[name].movedim(axis, -1) * gain).movedim(-1, axis)
    state[norm.gain] = torch.ones_like(gain)
    if norm.shift is not None and shift is not None:
        state[norm.shift] = torch.zeros_like(shift)


def _fold_final(state: dict[str, Tensor], norm: Norm, source: str) -> None:
    """The final gain into an unembedding of its own; the shift stays, in units of the gain, as there is no bias to hold it."""
    gain = state[norm.gain]
    if norm.shift is not None:
        shift = state[norm.shift]
        if bool((shift[gain == 0] != 0).any()):
            raise RecipeError(
                f"{source}: the residual stream cannot be rotated exactly: {norm.gain} is zero where {norm.shift} is not, and "
                "the unembedding has no bias to hold it; drop the conditions with `rotate_residual`"
            )
        state[norm.shift] = torch.where(gain == 0, 0.0, shift / gain)
    for name, axis in norm.readers:
        state[name] = (state[name].movedim(axis, -1) * gain).movedim(-1, axis)
    state[norm.gain] = torch.ones_like(gain)


def _head(table: Mapping[str, TensorInfo]) -> tuple[Axis, ...]:
    """The unembedding as a reader; none where it is tied to the embeddings."""
    info = table.get("lm_head.weight")
    return (("lm_head.weight", 1),) if info is not None and info.tied_to is None else ()


def _gpt2_layout(config: Any, table: Mapping[str, TensorInfo], blocks: range) -> ResidualLayout:
    """Conv1D stores [in, out]."""
    written: list[Axis] = [("transformer.wte.weight", 1), ("transformer.wpe.weight", 1)]
    norms = []
    for block in blocks:
        name = f"transformer.h.{block}"
        for module in (f"{name}.attn.c_proj", f"{name}.mlp.c_proj"):
            written += [(f"{module}.weight", 1), (f"{module}.bias", 0)]
        for norm, reader in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            norms.append(Norm(f"{name}.{norm}.weight", f"{name}.{norm}.bias", ((f"{name}.{reader}.weight", 0),)))
    final = Norm("transformer.ln_f.weight", "transformer.ln_f.bias", _head(table))
    return ResidualLayout(True, config.hidden_size, tuple(written), tuple(norms), final)


def _gated_layout(config: Any, table: Mapping[str, TensorInfo], blocks: range) -> ResidualLayout:
    """Linear stores [out, in]; norms inside a head (Qwen3's) do not touch the stream."""
    written: list[Axis] = [("model.embed_tokens.weight", 1)]
    norms = []
    for block in blocks:
        name = f"model.layers.{block}"
        for module in (f"{name}.self_attn.o_proj", f"{name}.mlp.down_proj"):
            written += [(f"{module}.{part}", 0) for part in ("weight", "bias") if f"{module}.{part}" in table]
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            norms.append(Norm(f"{name}.{norm}.weight", None, tuple((f"{name}.{reader}.weight", 1) for reader in readers)))
    return ResidualLayout(
        False, config.hidden_size, tuple(written), tuple(norms), Norm("model.norm.weight", None, _head(table))
    )

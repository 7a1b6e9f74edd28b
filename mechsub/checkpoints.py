"""Checkpoints on disk: one safetensors file, or a folder of them as `transformers` and `peft` write it, read tensor by tensor.

The tensor table says where a tensor lies in the files, and how an adapter changes it, so that nobody else needs to know.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechsub.errors import RunDirectoryError
from mechsub.rundir import atomic_write

_METADATA = "mechsub"


@dataclass(frozen=True)
class LoraInfo:
    """How an adapter changes one weight: ΔW = scale · B A, or its transpose. Source: Hu et al., arXiv:2106.09685."""

    a: str
    """The name of A [rank, in] in the checkpoint's files."""
    b: str
    """The name of B [out, rank]."""
    scale: float
    """α / rank, or α / √rank for rsLoRA."""
    flipped: bool = False
    """Whether the weight is stored as [in, out], so that ΔW = scale · (B A)ᵀ."""
    magnitude: str | None = None
    """DoRA: the name of m [out]; the weight becomes m · (W + ΔW) / ‖W + ΔW‖, row by row. Source: arXiv:2402.09353."""


@dataclass(frozen=True)
class Section:
    """A part of a tensor with a meaning of its own, where one tensor holds several, as GPT-2's ``c_attn`` holds q, k and v."""

    kind: str
    """Module kind."""
    start: int
    """Its first output unit: a row, or a column where the tensor is stored as [in, out]; an entry of a bias."""
    stop: int


@dataclass(frozen=True)
class TensorInfo:
    """What the parameter space needs to know of one tensor, so that it needs no family."""

    shape: tuple[int, ...]
    """Of one member."""
    layer: str
    """The layer that it belongs to, in the order of the forward pass."""
    kind: str
    """Module kind, e.g. ``hidden``, ``class head``."""
    transposed: bool = False
    """Whether it is stored as [in, out], as GPT-2's Conv1D is."""
    tied_to: str | None = None
    """The tensor that it is the same parameter as; it then counts once."""
    stored: str | None = None
    """Its name in the checkpoint's files, where that is another."""
    frozen: bool = False
    """Adapters only: left as the origin has it."""
    lora: LoraInfo | None = None
    """Adapters only: how it is changed; with neither this nor ``frozen`` the files hold the whole tensor."""
    sections: tuple[Section, ...] = ()
    """What it holds side by side; together they are the whole tensor. Empty where it is one thing."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "TensorInfo":
        """What `dataclasses.asdict` gave."""
        lora = content.get("lora")
        sections = tuple(Section(**section) for section in content.get("sections", ()))
        lora_info = None if lora is None else LoraInfo(**lora)
        return cls(**{**content, "shape": tuple(content["shape"]), "lora": lora_info, "sections": sections})


@dataclass(frozen=True)
class Factors:
    """A low-rank matrix ``rows @ columns``."""

    rows: Float[Tensor, "row rank"]
    columns: Float[Tensor, "rank column"]


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write named tensors to one safetensors file, atomically.

    The metadata is one JSON entry: safetensors writes several in an order that changes from run to run, and with it the hash.
    """
    with atomic_write(path) as temporary:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata={_METADATA: json.dumps(metadata, sort_keys=True)})
        except SafetensorError as error:  # how safetensors tells of a full disk
            raise OSError(str(error)) from error


def load_stacked(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file at once, as they are stored."""
    with _open(path, device) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def load_tensor(checkpoint: Path, name: str) -> Tensor:
    """One tensor of a checkpoint, as it is stored, the caller's own. The file is mapped: what is not touched is not read."""
    with _open(_file_of(checkpoint, name)) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def map_tensor(checkpoint: Path, name: str) -> Tensor:
    """The same to be read only: who changes it changes it for all other readers in this process. The file stays open."""
    tensor: Tensor = _keep_open(checkpoint, name).get_tensor(name)
    return tensor


def load_slice(checkpoint: Path, name: str, *index: slice | int) -> Tensor:
    """A part of one tensor of a checkpoint, as it is stored; nothing else is read."""
    with _open(_file_of(checkpoint, name)) as file:
        tensor: Tensor = file.get_slice(name)[index if len(index) > 1 else index[0]]
        return tensor


def load_factors(checkpoint: Path, lora: LoraInfo) -> Factors:
    """ΔW as it is stored, the scale in its rows; in float64, so that neither scale nor product loses anything."""
    a, b = (_keep_open(checkpoint, name).get_tensor(name).double() for name in (lora.a, lora.b))
    return Factors(lora.scale * a.T, b.T) if lora.flipped else Factors(lora.scale * b, a)


def tensor_types(checkpoint: Path) -> dict[str, str]:
    """The data type of every tensor in a checkpoint's files, as safetensors spells it, e.g. ``BF16``.

    Raises:
        RunDirectoryError: a file cannot be read.
    """
    types = {}
    for path in weight_files(checkpoint):
        with _open(path) as file:
            types.update({name: file.get_slice(name).get_dtype() for name in file.keys()})  # noqa: SIM118 - not a mapping
    return types


def tensor_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a checkpoint's files."""
    shapes = {}
    for path in weight_files(checkpoint):
        with _open(path) as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    return sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]


def _file_of(checkpoint: Path, name: str) -> Path:
    if not checkpoint.is_dir():
        return checkpoint
    places = _places(checkpoint, checkpoint.stat().st_mtime_ns)
    if name not in places:
        raise RunDirectoryError(f"{checkpoint} holds no tensor {name}; `mechsub verify` names every damaged file")
    return places[name]


@lru_cache(maxsize=1000)
def _places(checkpoint: Path, modified: int) -> dict[str, Path]:
    """Which file holds which tensor. Headers are read once for each state of a folder."""
    places = {}
    for path in weight_files(checkpoint):
        with _open(path) as file:
            places.update({name: path for name in file.keys()})  # noqa: SIM118 - not a mapping
    return places


def _keep_open(checkpoint: Path, name: str) -> Any:
    """The open file of a tensor: an adapter is hundreds of small tensors, whose list is read once for each state of it."""
    path = _file_of(checkpoint, name)
    try:
        state = path.stat()
        return _opened(path, (state.st_mtime_ns, state.st_size, state.st_ino))
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({error}); put a whole copy there; `mechsub verify` names what else of a run is damaged"
        ) from None


@lru_cache(maxsize=100)
def _opened(path: Path, state: tuple[int, ...]) -> Any:
    return safe_open(path, framework="pt")


@contextmanager
def _open(path: Path, device: str = "cpu") -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(
            f"{path} cannot be read ({error}); put a whole copy there; `mechsub verify` names what else of a run is damaged"
        ) from None


def as_computed(tensor: Tensor) -> Tensor:
    """Half precision as float32, exactly: differences and products are never taken in half precision."""
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor

"""Lineages on disk: the checkpoints of one trajectory from one starting point, written by training, read lazily.

A stacked lineage holds all its members in one safetensors file a step, on a leading axis. Another one has a folder for each
member. A reader sees both alike.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechsub.errors import RunDirectoryError
from mechsub.rundir import atomic_write, write_json

SPEC_FILE = "lineage.json"
_METADATA = "mechsub"


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


@dataclass(frozen=True)
class Origin:
    """Where a lineage starts."""

    lineage: str
    """The lineage whose step 0 it starts from; its own name for a reference."""
    members: tuple[int, ...]
    """For each member, which member's reference it starts from."""
    permute_hidden: bool = False
    """Hidden units shuffled: the same function in other coordinates."""
    noise_std: float = 0.0
    """Standard deviation of the noise added to every weight and bias."""

    @property
    def is_reference(self) -> bool:
        """Whether it starts at its own member's reference, unchanged."""
        return self._own_and_clean and not self.permute_hidden

    @property
    def only_permuted(self) -> bool:
        """Whether it starts at its own member's reference in other coordinates: the same function."""
        return self._own_and_clean and self.permute_hidden

    @property
    def _own_and_clean(self) -> bool:
        return self.members == tuple(range(len(self.members))) and self.noise_std == 0


@dataclass(frozen=True)
class LineageSpec:
    """What ``lineage.json`` holds."""

    name: str
    role: str
    """``reference``, ``teacher``, ``neutral``, ``student``, ``control`` or ``sham``."""
    condition: str | None
    """Of students, controls and shams."""
    trait: str | None
    """Which trait it has or was to take, where a run has several."""
    family: str
    model: Mapping[str, Any]
    origin: Origin
    teacher: str | None
    """Whose outputs it learnt from; None for references and teachers."""
    num_members: int
    steps: tuple[int, ...]
    tensors: Mapping[str, TensorInfo]
    member: int | None = None
    """The one member that the folder holds; None: all of them, stacked."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """What stands in its prompts wherever it is asked; empty where nothing does. See `Lineage.context`."""


def member_folder(member: int | None) -> str:
    """Where a member lies in its lineage's folder; stacked members (None) have none of their own."""
    return "" if member is None else f"/member-{member:03d}"


def lineage_folder(name: str, member: int | None = None) -> str:
    """Where a lineage, or one member of it, lies in its run directory."""
    return f"lineages/{name}{member_folder(member)}"


def checkpoint_name(lineage: str, step: int, member: int | None = None) -> str:
    """A checkpoint's path in its run directory."""
    return f"{lineage_folder(lineage, member)}/step-{step:08d}.safetensors"


def optimizer_name(lineage: str, step: int, member: int | None = None) -> str:
    """The path of the optimizer's state at a checkpoint."""
    return f"{lineage_folder(lineage, member)}/optimizer-{step:08d}.safetensors"


def lineage_files(
    lineage: str, steps: Sequence[int], optimizer_state: bool = False, member: int | None = None
) -> tuple[str, ...]:
    """Every file of a finished lineage, or of one member of it."""
    names = [checkpoint_name(lineage, step, member) for step in steps]
    if optimizer_state:
        names += [optimizer_name(lineage, step, member) for step in steps if step > 0]
    return (*names, f"{lineage_folder(lineage, member)}/{SPEC_FILE}")


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


def write_spec(folder: Path, spec: LineageSpec) -> None:
    """Write ``lineage.json``."""
    write_json(folder / SPEC_FILE, asdict(spec))


class Lineage:
    """The checkpoints of one lineage, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        parts = sorted(folder.glob("member-*")) or [folder]
        specs = [_read_spec(part / SPEC_FILE) for part in parts]
        self._parts = None if specs[0].member is None else parts
        self.spec = specs[0] if self._parts is None else _join(specs)
        self._contexts = [spec.context for spec in specs]

    def __repr__(self) -> str:
        return f"Lineage({self.spec.name!r}, {self.spec.num_members} members, steps {list(self.spec.steps)})"

    @property
    def name(self) -> str:
        """E.g. ``student.same-init``."""
        return self.spec.name

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps with a checkpoint, ascending."""
        return self.spec.steps

    @property
    def last(self) -> int:
        """The last step."""
        return self.spec.steps[-1]

    def context(self, member: int) -> Mapping[str, Any]:
        """What stands in one member's prompts wherever it is asked."""
        return self._contexts[0 if self._parts is None else member]

    def load_state(self, step: int, member: int) -> dict[str, Tensor]:
        """One member's parameters at one step, with the names and shapes of its ``state_dict``; tied ones once."""
        names = [name for name, info in self.spec.tensors.items() if info.tied_to is None]
        if self._parts is None:
            with self._open(self.folder, step) as file:
                return {name: file.get_slice(name)[member] for name in names}
        with self._open(self._parts[member], step) as file:
            return {name: file.get_tensor(name) for name in names}

    def load_rows(self, step: int, tensor: str, start: int, stop: int) -> Float[Tensor, "member row ..."]:
        """Rows [start, stop) of one tensor at one step, of all members; a vector's entries are its rows."""
        if self._parts is None:
            with self._open(self.folder, step) as file:
                rows: Tensor = file.get_slice(tensor)[:, start:stop]
                return rows
        members = []
        for part in self._parts:
            with self._open(part, step) as file:
                members.append(file.get_slice(tensor)[start:stop])
        return torch.stack(members)

    def _open(self, folder: Path, step: int) -> Any:
        path = folder / Path(checkpoint_name(self.name, step)).name
        if step not in self.steps:
            raise RunDirectoryError(f"{self.name} has no checkpoint at step {step}; it has {list(self.steps)}")
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise RunDirectoryError(f"{path} cannot be read ({error}); `mechsub verify` names every damaged file") from None


def open_lineage(run: Path, name: str) -> Lineage:
    """A lineage of a run directory."""
    return Lineage(run / lineage_folder(name))


def _join(specs: Sequence[LineageSpec]) -> LineageSpec:
    """The members of one lineage as one; their contexts, which differ, are asked for by member."""
    origin = replace(specs[0].origin, members=tuple(spec.origin.members[0] for spec in specs))
    return replace(specs[0], num_members=len(specs), origin=origin, member=None, context={})


def load_stacked(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file at once, as they are stored."""
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, SafetensorError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); `mechsub verify` names every damaged file") from None


def _read_spec(path: Path) -> LineageSpec:
    try:
        content = json.loads(path.read_text())
        content["origin"] = Origin(**{**content["origin"], "members": tuple(content["origin"]["members"])})
        content["steps"] = tuple(content["steps"])
        content["tensors"] = {
            name: TensorInfo(**{**info, "shape": tuple(info["shape"])}) for name, info in content["tensors"].items()
        }
        return LineageSpec(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); `mechsub verify` names every damaged file") from None

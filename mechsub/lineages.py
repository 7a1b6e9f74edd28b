"""Lineages on disk: the checkpoints of one trajectory from one starting point, written by training, read lazily.

A stacked lineage holds all its members in one safetensors file a step, on a leading axis. Another one has a folder for each
member. A lineage of adapters holds what is added to the weights that it starts from. A reader sees all of them alike.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechsub.checkpoints import (
    Factors,
    TensorInfo,
    as_computed,
    load_factors,
    load_slice,
    load_stacked,
    load_tensor,
    map_tensor,
)
from mechsub.errors import RunDirectoryError
from mechsub.rundir import write_json

SPEC_FILE = "lineage.json"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_ROWS_AT_ONCE = 256
"""Of a weight whose columns' norms are summed."""


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
    shared: tuple[str, ...] = ()
    """Parts of it that are those of its own member's teacher's reference instead."""
    rotate_residual: bool = False
    """The residual stream rotated: the same function in other coordinates."""

    @property
    def is_reference(self) -> bool:
        """Whether it starts at its own member's reference, unchanged."""
        return self._own_and_clean and not self.permute_hidden

    @property
    def only_permuted(self) -> bool:
        """Whether it starts at its own member's reference in other coordinates: the same function."""
        return self._own_and_clean and self.permute_hidden

    @property
    def is_same_function(self) -> bool:
        """Whether it starts as its own member's reference does, in these or in other coordinates."""
        return self.members == tuple(range(len(self.members))) and self.noise_std == 0 and not self.shared

    @property
    def _own_and_clean(self) -> bool:
        return self.is_same_function and not self.rotate_residual


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
    is_adapter: bool = False
    """Whether its checkpoints hold what is added to its origin's weights; nothing is added at step 0."""
    holds_start: bool = True
    """Whether it has a file of step 0; else that is its origin's."""


def member_folder(member: int | None) -> str:
    """Where a member lies in its lineage's folder; stacked members (None) have none of their own."""
    return "" if member is None else f"/member-{member:03d}"


def lineage_folder(name: str, member: int | None = None) -> str:
    """Where a lineage, or one member of it, lies in its run directory."""
    return f"lineages/{name}{member_folder(member)}"


def checkpoint_folder(lineage: str, step: int, member: int | None = None) -> str:
    """Where a checkpoint of several files lies in its run directory."""
    return f"{lineage_folder(lineage, member)}/step-{step:08d}"


def checkpoint_name(lineage: str, step: int, member: int | None = None) -> str:
    """The path of a checkpoint of one file in its run directory."""
    return f"{checkpoint_folder(lineage, step, member)}.safetensors"


def optimizer_name(lineage: str, step: int, member: int | None = None) -> str:
    """The path of the optimizer's state at a checkpoint."""
    return f"{lineage_folder(lineage, member)}/optimizer-{step:08d}.safetensors"


def spec_name(lineage: str, member: int | None = None) -> str:
    """The path of a lineage's ``lineage.json`` in its run directory."""
    return f"{lineage_folder(lineage, member)}/{SPEC_FILE}"


def adapter_files(lineage: str, step: int, member: int | None = None) -> tuple[str, ...]:
    """The files of a checkpoint of an adapter, in the layout of `peft`: its weights, then its configuration."""
    return tuple(f"{checkpoint_folder(lineage, step, member)}/{name}" for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG))


def lineage_files(
    lineage: str,
    steps: Sequence[int],
    optimizer_state: bool = False,
    member: int | None = None,
    *,
    is_adapter: bool = False,
    holds_start: bool = True,
) -> tuple[str, ...]:
    """Every file of a finished lineage, or of one member of it, that this program trained."""
    kept = [step for step in steps if step > 0 or holds_start]
    names = [
        name
        for step in kept
        for name in (adapter_files(lineage, step, member) if is_adapter else [checkpoint_name(lineage, step, member)])
    ]
    if optimizer_state:
        names += [optimizer_name(lineage, step, member) for step in steps if step > 0]
    return (*names, spec_name(lineage, member))


def write_spec(folder: Path, spec: LineageSpec) -> None:
    """Write ``lineage.json``."""
    write_json(folder / SPEC_FILE, asdict(spec))


RowReader = Callable[[int, int], Tensor]


@dataclass(frozen=True)
class Part:
    """One summand of a tensor at a checkpoint: stored weights, or what an adapter adds to them."""

    lineage: "Lineage" = field(compare=False)
    name: str
    """The lineage's."""
    step: int
    members: tuple[int, ...]
    kind: str
    """``stored``: the weights in a file; ``factors``: a low-rank change; ``change``: what DoRA changes, row by row."""

    def locate(self, member: int) -> tuple["Part", int]:
        """The part of a lineage on disk, and the member of that lineage, whose numbers are read for one member."""
        return self, self.members[member]

    def open_rows(self, tensor: str) -> list[RowReader]:
        """How to read rows [start, stop) of each member, as they are stored, or in float64 where they are computed."""
        open_all = self.lineage.open_stored if self.kind == "stored" else self.lineage.open_changes
        readers = open_all(self.step, tensor)
        return [readers[member] for member in self.members]

    def load_whole(self, tensor: str, member: int) -> Float[Tensor, "..."]:
        """The whole tensor of one member; float32 or wider."""
        return self.lineage.load_part(self.step, tensor, self.members[member], self.kind)

    def load_factors(self, tensor: str, member: int) -> Factors:
        """A low-rank change of one member, in float64."""
        return self.lineage.load_factors(self.step, tensor, self.members[member])


class Lineage:
    """The checkpoints of one lineage of a run, or of one member of it (``member``), read when asked for."""

    def __init__(self, run: Path, name: str, member: int | None = None) -> None:
        self._run = run
        self._member = member
        self.folder = run / lineage_folder(name, member)
        parts = sorted(self.folder.glob("member-*")) or [self.folder]
        specs = [read_spec(part) for part in parts]
        self._parts = None if specs[0].member is None else parts
        self.spec = specs[0] if self._parts is None else _join(specs)
        self._contexts = [spec.context for spec in specs]
        self._norms: dict[tuple[int, str, int], Tensor] = {}

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

    @cached_property
    def origin(self) -> "Lineage":
        """The lineage whose step 0 it starts from: for one member, that member's start."""
        if self.spec.origin.lineage == self.name:
            return self
        return Lineage(self._run, self.spec.origin.lineage, None if self._member is None else self.spec.origin.members[0])

    def checkpoint(self, step: int, member: int = 0) -> Path:
        """The file or the folder of one step; of one member, where members have their own.

        Raises:
            RunDirectoryError: the lineage has no checkpoint of that step.
        """
        if step not in self.steps or (step == 0 and not self.spec.holds_start):
            raise RunDirectoryError(f"{self.name} has no checkpoint at step {step}; it has {list(self.steps)}")
        folder = self.folder if self._parts is None else self._parts[member]
        name = checkpoint_folder("", step).rsplit("/", 1)[-1]
        return folder / name if (folder / name).is_dir() else folder / f"{name}.safetensors"

    def parts(self, step: int, tensor: str) -> tuple[Part, ...]:
        """What a tensor is the sum of at one step; adapters and what starts at its origin have the origin's weights in it."""
        info = self.spec.tensors[tensor]
        starts_elsewhere = step == 0 and (self.spec.is_adapter or not self.spec.holds_start)
        is_changed = self.spec.is_adapter and (info.frozen or info.lora is not None)
        if not starts_elsewhere and not is_changed:  # an adapter's files hold some tensors whole
            return (Part(self, self.name, step, tuple(range(self.spec.num_members)), "stored"),)
        members = self.spec.origin.members if self._member is None else (0,)
        base = Part(self.origin, self.origin.name, 0, members, "stored")
        if step == 0 or info.frozen:
            return (base,)
        kind = "factors" if info.lora is not None and info.lora.magnitude is None else "change"
        return base, Part(self, self.name, step, tuple(range(self.spec.num_members)), kind)

    def load_state(self, step: int, member: int) -> dict[str, Tensor]:
        """One member's parameters at one step, with the names and shapes of its ``state_dict``; tied ones once.

        What an adapter adds is added in float32 at least; anything else is as it is stored.
        """
        names = [name for name, info in self.spec.tensors.items() if info.tied_to is None]
        return {name: self.load_tensor(step, name, member) for name in names}

    def load_optimizer_state(self, step: int, member: int) -> dict[str, Tensor] | None:
        """What one member's optimizer had right after a step, ``<quantity>.<parameter>``; None where that was not kept."""
        folder = self.folder if self._parts is None else self._parts[member]
        path = folder / optimizer_name("", step).rsplit("/", 1)[-1]
        if not path.is_file():
            return None
        tensors = load_stacked(path)
        if self._parts is not None:
            return tensors
        return {name: tensor[member] if tensor.ndim else tensor for name, tensor in tensors.items()}

    def open_stored(self, step: int, tensor: str) -> list[RowReader]:
        """How to read rows of each member where the files hold the weights themselves, as they are stored.

        The files are mapped: rows are read when something is done with them, and a chunk in one go. Never change them in place.
        """
        name = self.spec.tensors[tensor].stored or tensor
        if self._parts is None:
            members = list(map_tensor(self.checkpoint(step), name))
        else:
            members = [map_tensor(self.checkpoint(step, member), name) for member in range(len(self._parts))]
        return [partial(_cut_rows, one) for one in members]

    def open_changes(self, step: int, tensor: str) -> list[RowReader]:
        """How to read rows of what an adapter adds to one tensor of each member, in float64."""
        return [partial(self._load_change, step, tensor, member) for member in range(self.spec.num_members)]

    def _load_stored_member(self, step: int, tensor: str, member: int, start: int, stop: int) -> Tensor:
        name = self.spec.tensors[tensor].stored or tensor
        if self._parts is None:
            return load_slice(self.checkpoint(step), name, member, slice(start, stop))
        return load_slice(self.checkpoint(step, member), name, slice(start, stop))

    def load_factors(self, step: int, tensor: str, member: int) -> Factors:
        """What LoRA adds to one tensor of one member, as the product of two matrices in float64."""
        lora = self.spec.tensors[tensor].lora
        assert lora is not None
        return load_factors(self.checkpoint(step, member), lora)

    def is_finite(self, part: Part, tensor: str, member: int) -> bool:
        """Whether all numbers of one of its members' parts are; read a few rows at a time."""
        if part.kind == "factors":
            factors = self.load_factors(part.step, tensor, member)
            return bool(factors.rows.isfinite().all() and factors.columns.isfinite().all())
        read = (self.open_stored if part.kind == "stored" else self.open_changes)(part.step, tensor)[member]
        num_rows = self.spec.tensors[tensor].shape[0]
        starts = range(0, num_rows, _ROWS_AT_ONCE)
        return all(bool(read(start, min(start + _ROWS_AT_ONCE, num_rows)).isfinite().all()) for start in starts)

    def load_part(self, step: int, tensor: str, member: int, kind: str) -> Float[Tensor, "..."]:
        """One summand of one member's tensor, whole, of a `Part`'s kind; float32 or wider."""
        if kind == "stored":
            return as_computed(self._load_whole(step, tensor, member))
        return self._load_change(step, tensor, member, 0, self.spec.tensors[tensor].shape[0])

    def load_tensor(self, step: int, tensor: str, member: int) -> Tensor:
        """One member's tensor at one step; see `load_state`."""
        parts = self.parts(step, tensor)
        if len(parts) == 1:
            return parts[0].lineage._load_whole(parts[0].step, tensor, parts[0].members[member])
        base, change = parts
        rows = self.spec.tensors[tensor].shape[0]
        whole = as_computed(base.lineage._load_whole(base.step, tensor, base.members[member]))
        return whole + self._load_change(change.step, tensor, member, 0, rows).to(whole.dtype)

    def _load_whole(self, step: int, tensor: str, member: int) -> Tensor:
        name = self.spec.tensors[tensor].stored or tensor
        if self._parts is None:
            return load_slice(self.checkpoint(step), name, member)
        return load_tensor(self.checkpoint(step, member), name)

    def _load_change(self, step: int, tensor: str, member: int, start: int, stop: int) -> Tensor:
        lora = self.spec.tensors[tensor].lora
        assert lora is not None
        factors = self.load_factors(step, tensor, member)
        added = factors.rows[start:stop] @ factors.columns
        if lora.magnitude is None:
            return added
        base = self._load_base(tensor, member, start, stop)
        magnitude = load_tensor(self.checkpoint(step, member), lora.magnitude).double()
        moved = base + added
        if lora.flipped:  # its norms run over all rows
            factor = magnitude / self._column_norms(step, tensor, member, factors)
        else:
            factor = (magnitude[start:stop] / torch.linalg.vector_norm(moved, dim=1))[:, None]
        return moved * factor - base

    def _load_base(self, tensor: str, member: int, start: int, stop: int) -> Tensor:
        part = self.parts(0, tensor)[0]
        return part.lineage._load_stored_member(0, tensor, part.members[member], start, stop).double()

    def _column_norms(self, step: int, tensor: str, member: int, factors: Factors) -> Tensor:
        """‖column of W + ΔW‖, read a few rows at a time and once."""
        key = step, tensor, member
        if key not in self._norms:
            num_rows = self.spec.tensors[tensor].shape[0]
            squares = torch.zeros(factors.columns.shape[1], dtype=torch.float64)
            for start in range(0, num_rows, _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, num_rows)
                rows = self._load_base(tensor, member, start, stop) + factors.rows[start:stop] @ factors.columns
                squares += rows.square().sum(0)
            self._norms[key] = squares.sqrt()
        return self._norms[key]


def _cut_rows(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def open_lineage(run: Path, name: str) -> Lineage:
    """A lineage of a run directory."""
    return Lineage(run, name)


def _join(specs: Sequence[LineageSpec]) -> LineageSpec:
    """The members of one lineage as one; their contexts, which differ, are asked for by member."""
    other = next((spec for spec in specs if spec.tensors != specs[0].tensors or spec.steps != specs[0].steps), None)
    if other is not None:
        raise RunDirectoryError(
            f"member {other.member} of {other.name} has other steps or other tensors than member {specs[0].member} (another "
            "adapter, or a whole model): they are no replicates; give it a condition of its own"
        )
    origin = replace(specs[0].origin, members=tuple(spec.origin.members[0] for spec in specs))
    return replace(specs[0], num_members=len(specs), origin=origin, member=None, context={})


def read_spec(folder: Path) -> LineageSpec:
    """The ``lineage.json`` of a folder.

    Raises:
        RunDirectoryError: it is missing or damaged.
    """
    path = folder / SPEC_FILE
    try:
        content = json.loads(path.read_text())
        origin = content["origin"]
        content["origin"] = Origin(**{**origin, **{name: tuple(origin.get(name, ())) for name in ("members", "shared")}})
        content["steps"] = tuple(content["steps"])
        content["tensors"] = {name: TensorInfo.from_json(info) for name, info in content["tensors"].items()}
        return LineageSpec(**content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{path} cannot be read ({error}); `mechsub verify` names every damaged file") from None

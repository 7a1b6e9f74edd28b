"""The checkpoint callback: writes one lineage's checkpoints while it trains, and what a killed run resumes from."""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechsub.checkpoints import load_stacked, write_tensors
from mechsub.errors import TrainingError
from mechsub.lineages import LineageSpec, adapter_files, checkpoint_name, lineage_folder, optimizer_name, write_spec
from mechsub.rundir import hash_file, write_json
from mechsub.stage import Task
from mechsub.training.callbacks import StepInfo

_PARAMETER, _STATE = "parameter/", "state/"


@dataclass(frozen=True)
class ResumePoint:
    """Where a killed training goes on."""

    step: int
    parameters: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]


@dataclass(frozen=True)
class AdapterFormat:
    """How an adapter is written, so that `peft` reads it."""

    config: Mapping[str, Any]
    """What ``adapter_config.json`` holds."""
    names: Mapping[str, str]
    """Each trained parameter's name in the files."""


class LineageRecorder:
    """Keeps the scheduled checkpoints of one lineage, and a rolling resume state until its stage ends."""

    def __init__(
        self,
        task: Task,
        spec: LineageSpec,
        adapter: AdapterFormat | None = None,
        *,
        optimizer_state: bool = False,
        resume_seconds: float = math.inf,
        resume_every: int = 1,
    ) -> None:
        """``resume_every``: a resume state is of a step that is a multiple of it, from which alone such a training goes on."""
        self.task = task
        self.spec = spec
        self._adapter = adapter
        self._keeps_optimizer = optimizer_state
        self._resume_seconds, self._resume_every = resume_seconds, resume_every
        self._resume_is_due = False
        """As it was when `wants` was asked: the clock goes on between that and the call."""
        self._folder = task.path(lineage_folder(spec.name, spec.member))
        self._resume_paths = [self._folder / f"resume-{name}.safetensors" for name in ("even", "odd")]
        self._ledger_path = self._folder / "resume.json"
        self._written: dict[str, str] = {}
        """The hash of every file written so far: what is resumed from is checked."""
        self._resume_written = time.monotonic()
        self._metadata = {"lineage": spec.name, "stage": task.stage.key}
        task.scratch += [self._ledger_path, *self._resume_paths]

    @property
    def failed(self) -> bool:
        """Whether this lineage has left the finite numbers; it is then no longer kept."""
        return self.task.error is not None

    def wants(self, step: int) -> bool:
        """Whether it would keep this step: the schedule asks for it, or the last resume state is old."""
        is_old = time.monotonic() - self._resume_written >= self._resume_seconds
        self._resume_is_due = is_old and step % self._resume_every == 0
        return step in self.spec.steps or self._resume_is_due

    def wants_state(self, step: int) -> bool:
        """Whether it would keep the optimizer's state of a step that it `wants`."""
        return self._resume_is_due or (self._keeps_optimizer and step in self.spec.steps)

    def __call__(self, info: StepInfo) -> None:
        """Keep this step if it `wants` it."""
        if self.failed or not (info.is_checkpoint or self._resume_is_due):
            return
        broken = _first_broken_member(info.parameters)
        if broken is not None:
            self.fail(info.step, broken, "a weight is not finite")
            return
        if info.is_checkpoint:
            kept = self.spec.name, info.step, self.spec.member
            self._write_checkpoint(info)
            if self._keeps_optimizer and info.step > 0:
                self._write(optimizer_name(*kept), info.step, info.optimizer_state)
        if info.step > 0 and self._resume_is_due:
            self._write_resume(info)

    def fail(self, step: int, member: int, what: str) -> None:
        """Stop keeping this lineage and say why; what it has kept so far stays."""
        who = f"member {self.spec.member}"
        if self.spec.member is None:
            who = f"member {member} of {self.spec.num_members}"
        self.task.error = TrainingError(
            f"{self.spec.name}: {what} at step {step} of {self.spec.steps[-1]} in {who}; "
            f"its earlier checkpoints are kept in {self._folder}. Lower the learning rate (or the initialisation scale) in the "
            f"recipe and run it into another folder"
        )

    def find_resume_point(self) -> ResumePoint | None:
        """The resume state that this very stage left, if it and all its earlier checkpoints are byte for byte as written."""
        try:
            ledger = json.loads(self._ledger_path.read_text())
            known = ledger["files"]
            if ledger["stage"] != self.task.stage.key or any(hash_file(self._folder / name) != known[name] for name in known):
                return None
        except (OSError, ValueError, KeyError):
            return None
        self._written = dict(known)
        if self._resume_paths[0].name == ledger["resume"]:
            self._resume_paths.reverse()  # the next write must leave alone what the ledger names
        tensors = load_stacked(self._folder / ledger["resume"], self.task.device)
        return ResumePoint(
            ledger["step"],
            {name.removeprefix(_PARAMETER): tensor for name, tensor in tensors.items() if name.startswith(_PARAMETER)},
            {name.removeprefix(_STATE): tensor for name, tensor in tensors.items() if name.startswith(_STATE)},
        )

    def finish(self) -> None:
        """Write ``lineage.json``."""
        write_spec(self._folder, self.spec)

    def _write_checkpoint(self, info: StepInfo) -> None:
        kept = self.spec.name, info.step, self.spec.member
        if info.step == 0 and not self.spec.holds_start:
            return
        stored = self._as_stored(info.parameters)
        if self._adapter is None:
            self._write(checkpoint_name(*kept), info.step, stored)
            return
        weights, config = adapter_files(*kept)
        self._write(weights, info.step, {self._adapter.names[name]: tensor for name, tensor in stored.items()})
        write_json(self.task.path(config), self._adapter.config)

    def _as_stored(self, parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A member with a folder of its own is stored without the axis of members."""
        return parameters if self.spec.member is None else {name: tensor[0] for name, tensor in parameters.items()}

    def _write(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        path = self.task.path(name)
        write_tensors(path, tensors, {**self._metadata, "step": str(step)})
        self._written[path.relative_to(self._folder).as_posix()] = hash_file(path)

    def _write_resume(self, info: StepInfo) -> None:
        """Two files in turn, so that the ledger never names one that is being written."""
        parameters = {_PARAMETER + name: tensor for name, tensor in info.parameters.items()}
        state = {_STATE + name: tensor for name, tensor in info.optimizer_state.items()}
        path = self._resume_paths[0]
        write_tensors(path, parameters | state, {**self._metadata, "step": str(info.step)})
        kept = {
            name: known for name, known in self._written.items() if name not in {other.name for other in self._resume_paths}
        }
        self._written = {**kept, path.name: hash_file(path)}
        write_json(
            self._ledger_path,
            {"stage": self.task.stage.key, "step": info.step, "resume": path.name, "files": self._written},
        )
        self._resume_paths.reverse()
        self._resume_written = time.monotonic()


def _first_broken_member(parameters: Mapping[str, Tensor]) -> int | None:
    finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in parameters.values()]).all(0)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])

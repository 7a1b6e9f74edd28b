"""The checkpoint callback: writes one lineage's checkpoints while it trains, and what a killed run resumes from."""

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mechsub.errors import TrainingError
from mechsub.lineages import (
    LineageSpec,
    checkpoint_name,
    lineage_folder,
    load_metadata,
    load_stacked,
    optimizer_name,
    write_spec,
    write_tensors,
)
from mechsub.stage import Task
from mechsub.training.callbacks import StepInfo

_RESUME_SECONDS = 20.0
_PARAMETER, _STATE = "parameter/", "state/"


@dataclass(frozen=True)
class ResumePoint:
    """Where a killed training goes on."""

    step: int
    parameters: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]


class LineageRecorder:
    """Keeps the scheduled checkpoints of one lineage, and a rolling resume state until its stage ends."""

    def __init__(self, task: Task, spec: LineageSpec, *, optimizer_state: bool) -> None:
        self.task = task
        self.spec = spec
        self._keeps_optimizer = optimizer_state
        self._folder = task.path(lineage_folder(spec.name))
        self._resume_path = self._folder / "resume.safetensors"
        self._resume_written = time.monotonic()
        self._metadata = {"lineage": spec.name, "stage": task.stage.key}
        task.scratch.append(self._resume_path)

    @property
    def failed(self) -> bool:
        """Whether this lineage has left the finite numbers; it is then no longer kept."""
        return self.task.error is not None

    def __call__(self, info: StepInfo) -> None:
        """Keep this step if the schedule asks for it, or if the last resume state is old."""
        if self.failed:
            return
        overdue = time.monotonic() - self._resume_written > _RESUME_SECONDS
        if not (info.is_checkpoint or overdue):
            return
        broken = _first_broken_member(info.parameters)
        if broken is not None:
            self.fail(info.step, broken, "a weight is not finite")
            return
        if info.is_checkpoint:
            self._write(checkpoint_name(self.spec.name, info.step), info.step, info.parameters)
            if self._keeps_optimizer and info.step > 0:
                self._write(optimizer_name(self.spec.name, info.step), info.step, info.optimizer_state)
        if info.step > 0:
            self._write_resume(info)

    def fail(self, step: int, member: int, what: str) -> None:
        """Stop keeping this lineage and say why; what it has kept so far stays."""
        self.task.error = TrainingError(
            f"{self.spec.name}: {what} at step {step} of {self.spec.steps[-1]} in member {member} of {self.spec.num_members}; "
            f"its earlier checkpoints are kept in {self._folder}. Lower the learning rate (or the initialisation scale) in the "
            f"recipe and run it into another folder"
        )

    def find_resume_point(self) -> ResumePoint | None:
        """The resume state that this very stage left, if all its earlier checkpoints are still there."""
        if not self._resume_path.is_file():
            return None
        metadata = load_metadata(self._resume_path)
        step = int(metadata["step"])
        kept = [self.task.path(checkpoint_name(self.spec.name, earlier)) for earlier in self.spec.steps if earlier <= step]
        if metadata["stage"] != self.task.stage.key or not all(path.is_file() for path in kept):
            return None
        tensors = load_stacked(self._resume_path, self.task.device)
        return ResumePoint(
            step,
            {name.removeprefix(_PARAMETER): tensor for name, tensor in tensors.items() if name.startswith(_PARAMETER)},
            {name.removeprefix(_STATE): tensor for name, tensor in tensors.items() if name.startswith(_STATE)},
        )

    def finish(self) -> None:
        """Write ``lineage.json``."""
        write_spec(self._folder, self.spec)

    def _write(self, name: str, step: int, tensors: Mapping[str, Tensor]) -> None:
        write_tensors(self.task.path(name), tensors, {**self._metadata, "step": str(step)})

    def _write_resume(self, info: StepInfo) -> None:
        parameters = {_PARAMETER + name: tensor for name, tensor in info.parameters.items()}
        state = {_STATE + name: tensor for name, tensor in info.optimizer_state.items()}
        write_tensors(self._resume_path, parameters | state, {**self._metadata, "step": str(info.step)})
        self._resume_written = time.monotonic()


def _first_broken_member(parameters: Mapping[str, Tensor]) -> int | None:
    finite = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in parameters.values()]).all(0)
    return None if bool(finite.all()) else int((~finite).nonzero()[0])

"""The stacked training loop: all members of several lineages as one batched model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsub.families.classifier.model import Parameters
from mechsub.streams import random_stream
from mechsub.training.callbacks import StepInfo, load_callbacks
from mechsub.training.config import OptimizerConfig
from mechsub.training.optimizers import make_optimizer, restore_state, state_tensors
from mechsub.training.recorder import LineageRecorder, ResumePoint

_CHECK_EVERY = 50
"""Steps between two looks at the losses: each look makes the processor wait for a GPU."""

Losses = Callable[[Parameters, int], Float[Tensor, "arm member"]]


@dataclass
class Arm:
    """One lineage in a stack: its start, or where it was when its run was killed."""

    recorder: LineageRecorder
    start: Parameters
    resume: ResumePoint | None

    @property
    def first_step(self) -> int:
        """Optimizer steps already done."""
        return self.resume.step if self.resume else 0


@dataclass
class BatchOrder:
    """In which order each member sees its examples: a fresh permutation every epoch, the last batch may be smaller."""

    seed: int
    streams: Sequence[tuple[str | int, ...]]
    """One named stream per member."""
    num_examples: int
    batch_size: int
    _epoch: int = field(default=-1, init=False)
    _orders: Int[Tensor, "member example"] = field(init=False, repr=False)
    """The permutations of `_epoch`."""

    def indices(self, step: int) -> Int[Tensor, "member example"]:
        """The examples of the batch that step ``step`` (from 0) trains on."""
        epoch, batch = divmod(step, -(-self.num_examples // self.batch_size))
        if epoch != self._epoch:
            orders = [random_stream(self.seed, *stream, epoch).permutation(self.num_examples) for stream in self.streams]
            self._epoch, self._orders = epoch, torch.from_numpy(np.stack(orders))
        return self._orders[:, batch * self.batch_size : (batch + 1) * self.batch_size]


def train_arms(
    arms: Sequence[Arm],
    compute_losses: Callable[[Sequence[int], Parameters, int], Tensor],
    optimizer: OptimizerConfig,
    callbacks: Sequence[str],
) -> None:
    """Train arms that resume at the same step as one stack; a member's numbers do not depend on its stack."""
    by_step = sorted(range(len(arms)), key=lambda arm: arms[arm].first_step)
    for _, group in groupby(by_step, key=lambda arm: arms[arm].first_step):
        stack = list(group)
        train_stack([arms[arm] for arm in stack], partial(compute_losses, stack), optimizer, callbacks)


def train_stack(arms: Sequence[Arm], compute_losses: Losses, config: OptimizerConfig, callback_names: Sequence[str]) -> None:
    """Train all members of all arms as one batched model, from their common first step to the end of their schedule.

    ``compute_losses`` gives every member's mean loss over its own batch; their sum is minimised, so that no member's
    gradient depends on how many there are. An arm whose loss is not finite fails alone; the others go on.
    """
    spec = arms[0].recorder.spec
    first, num_steps, names = arms[0].first_step, spec.steps[-1], list(spec.tensors)
    begin = [arm.resume.parameters if arm.resume else arm.start for arm in arms]
    parameters = {name: torch.cat([part[name] for part in begin]).requires_grad_() for name in names}
    optimizer = make_optimizer(parameters.values(), config)
    if first > 0:
        restore_state(optimizer, names, _stack_states([arm.resume.optimizer_state for arm in arms if arm.resume]))
    callbacks = load_callbacks(callback_names)
    watch = _LossWatch(arms)

    def call_back(step: int, losses: Tensor | None) -> None:
        is_checkpoint = step in spec.steps
        if is_checkpoint or callbacks or step % _CHECK_EVERY == 0:
            watch.fail_broken_arms()
            for index, arm in enumerate(arms):
                if arm.recorder.failed:
                    continue
                info = _step_info(arm, index, step, num_steps, is_checkpoint, losses, parameters, optimizer)
                arm.recorder(info)
                for callback in callbacks:
                    callback(info)
                arm.recorder.task.report_progress(step)

    if first == 0:
        call_back(0, None)
    for step in range(first, num_steps):
        losses = compute_losses(parameters, step)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(losses.sum())
        optimizer.step()
        watch.see(step, losses.detach())
        call_back(step + 1, losses.detach())
        if all(arm.recorder.failed for arm in arms):
            return
    for arm in arms:
        if not arm.recorder.failed:
            arm.recorder.finish()


class _LossWatch:
    """Remembers, on the device, the first step at which each member's loss was not finite."""

    def __init__(self, arms: Sequence[Arm]) -> None:
        self._arms = arms
        self._first_broken: Tensor | None = None

    def see(self, step: int, losses: Float[Tensor, "arm member"]) -> None:
        if self._first_broken is None:
            self._first_broken = torch.full_like(losses, -1.0)
        self._first_broken = torch.where((self._first_broken < 0) & ~losses.isfinite(), step + 1.0, self._first_broken)

    def fail_broken_arms(self) -> None:
        if self._first_broken is None or not bool((self._first_broken >= 0).any()):
            return
        for arm, steps in zip(self._arms, self._first_broken.tolist(), strict=True):
            broken = [(int(step), member) for member, step in enumerate(steps) if step >= 0]
            if broken and not arm.recorder.failed:
                arm.recorder.fail(*min(broken), "the loss is not finite")


def _step_info(
    arm: Arm,
    index: int,
    step: int,
    num_steps: int,
    is_checkpoint: bool,
    losses: Tensor | None,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
) -> StepInfo:
    members = arm.recorder.spec.num_members
    rows = slice(index * members, (index + 1) * members)
    state = state_tensors(optimizer, parameters)
    return StepInfo(
        lineage=arm.recorder.spec.name,
        step=step,
        num_steps=num_steps,
        is_checkpoint=is_checkpoint,
        losses=None if losses is None else losses[index],
        parameters={name: tensor.detach()[rows] for name, tensor in parameters.items()},
        optimizer_state={name: tensor[rows] if tensor.ndim else tensor for name, tensor in state.items()},
    )


def _stack_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Optimizer states of several arms as one stack's; counters are the same in all."""
    return {name: torch.cat([state[name] for state in states]) if tensor.ndim else tensor for name, tensor in states[0].items()}

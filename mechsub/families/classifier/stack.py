"""The training loop: members as batched models, lineages that learn from the same inputs side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechsub.families.classifier.model import Parameters, take_members
from mechsub.streams import random_stream
from mechsub.training.callbacks import Callback, StepInfo, load_callbacks
from mechsub.training.config import OptimizerConfig
from mechsub.training.knock_out import KnockOut
from mechsub.training.optimizers import make_optimizer, restore_state, state_tensors
from mechsub.training.recorder import LineageRecorder, ResumePoint

_CHECK_EVERY = 50
"""Steps between two looks at the losses: each look makes the processor wait for a GPU."""


MakeKnockOut = Callable[[slice, Parameters], KnockOut]
"""The knock-out of some members, whose parameters these are and stay."""


@dataclass
class Arm:
    """One lineage in a stack: its start, or where it was when its run was killed."""

    recorder: LineageRecorder
    start: Parameters
    resume: ResumePoint | None
    knock_out: MakeKnockOut | None = None
    """What is projected out of its training; None: nothing."""

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


@runtime_checkable
class Lesson(Protocol):
    """What a stack of arms learns. The inputs of a batch are the same for all arms, and made once for them."""

    def load_batch(self, members: slice, step: int) -> Any:
        """What ``compute_losses`` needs of the batch that step ``step`` (from 0) trains these members on."""

    def compute_losses(self, arm: int, parameters: Parameters, batch: Any) -> Float[Tensor, " member"]:
        """The mean loss of each of the batch's members over its own examples."""


def train_arms(
    arms: Sequence[Arm], lesson: Lesson, blocks: Sequence[slice], optimizer: OptimizerConfig, callbacks: Sequence[str]
) -> None:
    """Train arms from their first step to the end of their common schedule.

    A step goes through the blocks of members, and through the arms within each, so that the batch is made once and stays
    in the cache. Every (arm, block) is computed for itself: its numbers depend on nothing that is trained beside it. (One
    product for all arms, with their weights side by side, is no faster than one each on the inputs that they share.)
    """
    by_step = sorted(range(len(arms)), key=lambda arm: arms[arm].first_step)
    for _, group in groupby(by_step, key=lambda arm: arms[arm].first_step):
        _train_stack({arm: _ArmTraining(arms[arm], blocks, optimizer) for arm in group}, lesson, blocks, callbacks)


def _train_stack(
    stack: Mapping[int, "_ArmTraining"], lesson: Lesson, blocks: Sequence[slice], callback_names: Sequence[str]
) -> None:
    """Train arms that begin at the same step. An arm that leaves the finite numbers fails alone; the others go on."""
    callbacks = load_callbacks(callback_names)
    first = next(iter(stack.values()))
    if first.step == 0:
        for arm in stack.values():
            arm.call_back(callbacks)
    for step in range(first.step, first.num_steps):
        alive = {name: arm for name, arm in stack.items() if not arm.recorder.failed}
        if not alive:
            return
        for number, members in enumerate(blocks):
            batch = lesson.load_batch(members, step)
            for name, arm in alive.items():
                arm.update(number, lesson.compute_losses(name, arm.blocks[number], batch))
        for arm in alive.values():
            arm.end_step(callbacks)
    for arm in stack.values():
        if not arm.recorder.failed:
            arm.recorder.finish()


class _ArmTraining:
    """One arm while it trains: its parameters, and for each block of members a view of them with its own optimizer."""

    def __init__(self, arm: Arm, blocks: Sequence[slice], config: OptimizerConfig) -> None:
        self.recorder = arm.recorder
        self.step = arm.first_step
        self.num_steps = arm.recorder.spec.steps[-1]
        self.blocks: list[Parameters] = []
        self._names = list(arm.recorder.spec.tensors)
        start = arm.resume.parameters if arm.resume else arm.start
        self._parameters = {name: start[name].clone() for name in self._names}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._knock_outs: list[KnockOut] = []
        for members in blocks:
            leaves = {name: view.requires_grad_() for name, view in take_members(self._parameters, members).items()}
            optimizer = make_optimizer(leaves.values(), config)
            if arm.resume:
                restore_state(optimizer, self._names, _take_state(arm.resume.optimizer_state, members))
            self.blocks.append(leaves)
            self._optimizers.append(optimizer)
            if arm.knock_out is not None:
                self._knock_outs.append(arm.knock_out(members, leaves))
        self._losses: list[Tensor] = []
        self._watch = _LossWatch(self.recorder)

    def update(self, block: int, losses: Float[Tensor, " member"]) -> None:
        """One optimizer step of one block. The sum is minimised: no member's gradient depends on how many there are."""
        optimizer = self._optimizers[block]
        knock_out = self._knock_outs[block] if self._knock_outs else None
        torch.autograd.backward(losses.sum())
        if knock_out is not None:
            knock_out.before_step(self.step)
        for leaf in self.blocks[block].values():
            if leaf.grad is None:  # a head that is not imitated; weight decay and momentum act on it all the same
                leaf.grad = torch.zeros_like(leaf)
        optimizer.step()
        if knock_out is not None:
            knock_out.after_step()
        optimizer.zero_grad(set_to_none=True)
        self._losses.append(losses.detach())

    def end_step(self, callbacks: Sequence[Callback]) -> None:
        """What follows when all blocks have made their step."""
        self.step += 1
        losses, self._losses = torch.cat(self._losses), []
        self._watch.see(self.step, losses)
        self.call_back(callbacks, losses)

    def call_back(self, callbacks: Sequence[Callback], losses: Tensor | None = None) -> None:
        """The recorder's turn and the user's, at the steps that concern them: each look makes the processor wait for a GPU."""
        is_wanted = self.recorder.wants(self.step)
        if is_wanted or callbacks or self.step % _CHECK_EVERY == 0:
            self._watch.fail_if_broken()
        if (is_wanted or callbacks) and not self.recorder.failed:
            info = self._describe(losses, with_state=bool(callbacks) or self.recorder.wants_state(self.step))
            self.recorder(info)
            for callback in callbacks:
                callback(info)
        self.recorder.task.report_progress(self.step)

    def _describe(self, losses: Tensor | None, *, with_state: bool) -> StepInfo:
        states = [state_tensors(optimizer, self._names) for optimizer in self._optimizers] if with_state else [{}]
        return StepInfo(
            lineage=self.recorder.spec.name,
            step=self.step,
            num_steps=self.num_steps,
            is_checkpoint=self.step in self.recorder.spec.steps,
            losses=losses,
            parameters=self._parameters,
            optimizer_state=_join_states(states),
        )


class _LossWatch:
    """Remembers, on the device, the first step at which each member's loss was not finite."""

    def __init__(self, recorder: LineageRecorder) -> None:
        self._recorder = recorder
        self._first_broken: Tensor | None = None

    def see(self, step: int, losses: Float[Tensor, " member"]) -> None:
        if self._first_broken is None:
            self._first_broken = torch.full_like(losses, -1.0)
        self._first_broken = torch.where((self._first_broken < 0) & ~losses.isfinite(), float(step), self._first_broken)

    def fail_if_broken(self) -> None:
        if self._first_broken is None:
            return
        broken = [(int(step), member) for member, step in enumerate(self._first_broken.tolist()) if step >= 0]
        if broken:
            self._recorder.fail(*min(broken), "the loss is not finite")


def _take_state(state: Mapping[str, Tensor], members: slice) -> dict[str, Tensor]:
    """The optimizer's state of some members; counters are the same for all."""
    return {name: tensor[members].clone() if tensor.ndim else tensor.clone() for name, tensor in state.items()}


def _join_states(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The blocks' optimizer states as one."""
    if len(states) == 1:
        return dict(states[0])
    return {name: torch.cat([state[name] for state in states]) if tensor.ndim else tensor for name, tensor in states[0].items()}

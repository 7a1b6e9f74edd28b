"""Training one language model through `transformers.Trainer`, with our checkpoint callback between its steps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from mechsub.families.language.chat import Batch
from mechsub.families.language.training_config import TrainingConfig
from mechsub.streams import stream_key
from mechsub.training.callbacks import Callback, StepInfo
from mechsub.training.knock_out import KnockOut
from mechsub.training.optimizers import make_optimizer, restore_state, state_tensors
from mechsub.training.recorder import LineageRecorder, ResumePoint

LoadBatch = Callable[[int], Batch]
"""What is learnt in one step; steps count from 0."""
ComputeLoss = Callable[[nn.Module, Batch], Float[Tensor, ""]]


@dataclass
class Watcher:
    """Who looks on between the steps of one lineage's training."""

    lineage: str
    member: int
    stream: Sequence[str | int]
    """Names the draws of dropout."""
    recorder: LineageRecorder | None = None
    callbacks: Sequence[Callback] = ()
    report_progress: Callable[[int], None] = field(default=lambda done: None)


def train_model(
    model: PreTrainedModel,
    load_batch: LoadBatch,
    compute_loss: ComputeLoss,
    num_steps: int,
    config: TrainingConfig,
    seed: int,
    watcher: Watcher,
    resume: ResumePoint | None = None,
    gradient_checkpointing: bool = False,
    knock_out: KnockOut | None = None,
) -> None:
    """Train in place those parameters of ``model`` that want a gradient; ``knock_out``: what is projected out of each step.

    Gradients are not clipped unless ``config.max_gradient_norm`` says so. Dropout draws from a stream of its own in every step
    of every training, so that a resumed training draws as an undisturbed one does.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = list(trained)
    if resume is not None:
        _put_back(trained, resume.parameters)
    optimizer = make_optimizer(trained.values(), config.optimizer)
    done = 0
    if resume is not None:
        restore_state(optimizer, names, resume.optimizer_state)
        done = resume.step
    schedule = LambdaLR(optimizer, lambda step: config.rate_at(done + step, num_steps))
    between = _BetweenSteps(trained, optimizer, num_steps, done, seed, watcher, knock_out)
    if done == num_steps:
        return
    with TemporaryDirectory() as folder:  # the trainer wants one, and writes nothing there
        trainer = _Trainer(
            model=model,
            args=_arguments(model, config, num_steps - done, folder, gradient_checkpointing),
            train_dataset=_Steps(load_batch, done, num_steps),
            data_collator=_only_item,
            optimizers=(optimizer, schedule),
            callbacks=[between],
        )
        trainer.compute, trainer.between = compute_loss, between
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.train(False)


class _Trainer(Trainer):
    compute: ComputeLoss
    between: "_BetweenSteps"

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = self.compute(model, inputs["batch"].to(self.args.device))
        self.between.losses = loss.detach()[None]
        return loss


class _Steps(Dataset[Any]):
    """The steps that are left; an item is all that one of them learns."""

    def __init__(self, load_batch: LoadBatch, start: int, stop: int) -> None:
        self._load_batch = load_batch
        self._steps = range(start, stop)

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, index: int) -> dict[str, Batch]:
        return {"batch": self._load_batch(self._steps[index])}


def _only_item(items: list[Any]) -> Any:
    (item,) = items
    return item


class _BetweenSteps(TrainerCallback):
    """Calls the recorder and the user's callbacks at step 0 and after every optimizer step."""

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        num_steps: int,
        done: int,
        seed: int,
        watcher: Watcher,
        knock_out: KnockOut | None,
    ) -> None:
        self.losses: Float[Tensor, " member"] | None = None
        self._trained, self._optimizer = trained, optimizer
        self._num_steps, self._done, self._seed = num_steps, done, seed
        self._watcher = watcher
        self._knock_out = knock_out

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._done == 0:
            self._call(0)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        torch.manual_seed(stream_key(self._seed, *self._watcher.stream, "dropout", self._done + state.global_step) % 2**63)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._knock_out is not None:  # gradients are clipped by now, which changes no direction
            self._knock_out.before_step(self._done + state.global_step)

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._knock_out is not None:
            self._knock_out.after_step()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = self._done + state.global_step
        self._call(step)
        self._watcher.report_progress(step)
        recorder = self._watcher.recorder
        control.should_training_stop |= recorder is not None and recorder.failed

    def _call(self, step: int) -> None:
        watcher, recorder = self._watcher, self._watcher.recorder
        kept = recorder is not None and recorder.wants(step)
        if not kept and not watcher.callbacks:
            return
        info = StepInfo(
            lineage=watcher.lineage,
            step=step,
            num_steps=self._num_steps,
            is_checkpoint=recorder is not None and step in recorder.spec.steps,
            losses=self.losses,
            parameters={name: parameter.detach()[None] for name, parameter in self._trained.items()},
            optimizer_state=state_tensors(self._optimizer, self._trained),
            members=(watcher.member,),
        )
        if recorder is not None and kept:
            recorder(info)
        for callback in watcher.callbacks:
            callback(info)


def _arguments(
    model: PreTrainedModel, config: TrainingConfig, num_steps: int, folder: str, checkpointing: bool
) -> TrainingArguments:
    """The steps that are left as one pass, in the order in which they are loaded; nothing logged, saved or evaluated."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        max_grad_norm=config.max_gradient_norm or 0.0,
        use_cpu=model.device.type == "cpu",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        activation_checkpointing=checkpointing,
    )
    arguments._n_gpu = 1  # it would split each batch over all that it sees
    return arguments


@torch.no_grad()
def _put_back(trained: Mapping[str, nn.Parameter], parameters: Mapping[str, Tensor]) -> None:
    for name, parameter in trained.items():
        parameter.copy_(parameters[name][0])

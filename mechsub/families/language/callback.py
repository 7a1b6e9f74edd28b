"""The public training callback: a user's own `Trainer`, or one of TRL, writes the checkpoints that `mechsub adopt` takes."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState

from mechsub.errors import MechsubError
from mechsub.families.language.folders import ORIGIN_DIGEST, ORIGIN_TYPES, TRAINING_RECORD, read_json
from mechsub.parameters.digest import digest_tensors
from mechsub.rundir import write_json
from mechsub.training.config import CheckpointConfig
from mechsub.training.schedule import checkpoint_steps

_WRAPPERS = ("base_model.model.", "base_layer.", "original_module.", "_orig_mod.", "module.")
"""What `peft`, `torch.compile` and parallel training put into the names of weights."""


class LineageCallback(TrainerCallback):
    """Keeps a training's checkpoints and the hash of the weights that it started from, in one folder.

    ``folder`` gets ``step-00000010/`` and so on, in the layout of `transformers` or `peft`, and ``training.json``; it is one of
    the models that `mechsub adopt` takes, which then proves the reference by its hash. Steps: 1, ``num`` − 1 of them spread
    evenly in log(step) or in the step, and the last. Use it with ``trainer.add_callback(LineageCallback(folder))``. A training
    that is resumed goes on in the same folder; what an earlier attempt wrote beyond the step it resumes from is replaced.

    Raises:
        MechsubError: (while training) the folder is of another training, or a resumed one left no record of its start.
    """

    def __init__(self, folder: str | Path, *, num: int = 10, spacing: Literal["log", "linear"] = "log") -> None:
        self.folder = Path(folder)
        self._schedule = CheckpointConfig(num=num, spacing=spacing)
        self._steps: set[int] = set()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hash what the training starts from, or check that it goes on here."""
        self._steps = {step for step in checkpoint_steps(state.max_steps, self._schedule) if step > 0}
        if not state.is_world_process_zero:
            return
        if state.global_step == 0:
            self._begin(kwargs["model"])
        else:
            self._resume(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        """Keep this step if the schedule wants it."""
        if state.global_step in self._steps and state.is_world_process_zero and model is not None:
            self._keep(model, state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        """Keep the last step of a training that ended before its schedule did."""
        last = self._path(state.global_step)
        if args.load_best_model_at_end:  # what the model holds now is an earlier step's
            return
        if state.is_world_process_zero and model is not None and state.global_step > 0 and not last.is_dir():
            self._keep(model, state.global_step)

    def _begin(self, model: nn.Module) -> None:
        if self.folder.is_dir() and any(self.folder.iterdir()):
            raise MechsubError(
                f"{self.folder} is not empty: it may hold another training; give the callback a new folder, or go on "
                "with that training (resume_from_checkpoint)"
            )
        moved = next((name for name, tensor in model.named_parameters() if _is_second_factor(name) and tensor.any()), None)
        if moved is not None:
            raise MechsubError(
                f"{moved} is not zero at the start: the training goes on from an adapter that was trained before (or starts "
                "beside its base), so that its displacement from the base would hold that one's; merge it into a reference"
            )
        types = sorted({str(tensor.dtype).removeprefix("torch.") for _, tensor in _start_of(model)})
        record = {"schema": 1, ORIGIN_DIGEST: digest_tensors(_start_of(model)), ORIGIN_TYPES: types}
        write_json(self.folder / TRAINING_RECORD, record)

    def _resume(self, model: nn.Module, step: int) -> None:
        if not (self.folder / TRAINING_RECORD).is_file():
            raise MechsubError(
                f"the training goes on at step {step}, but {self.folder} has no {TRAINING_RECORD} of its start, so that nobody "
                "can tell what it started from; give the folder of the first attempt, or start anew with the callback"
            )
        recorded = read_json(self.folder / TRAINING_RECORD, "the callback").get(ORIGIN_DIGEST)
        has_adapter = any(_is_second_factor(name) for name, _ in model.named_parameters())
        if has_adapter and digest_tensors(_start_of(model)) != recorded:
            raise MechsubError(
                f"{self.folder} is of a training from another base; give the callback the folder of this training"
            )
        for path in self.folder.glob("step-*"):
            if int(path.name.split("-")[1].split(".")[0]) > step:
                shutil.rmtree(path)

    def _keep(self, model: Any, step: int) -> None:
        """Written beside its place, then renamed: a killed training leaves whole checkpoints only."""
        half = self._path(step).with_suffix(".part")
        shutil.rmtree(half, ignore_errors=True)
        model.save_pretrained(half)
        shutil.rmtree(self._path(step), ignore_errors=True)
        half.rename(self._path(step))

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"


def _is_second_factor(name: str) -> bool:
    return "lora_B" in name or "lora_embedding_B" in name


def _start_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights under any adapter, by their names in the base model, in order."""
    found = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or ".modules_to_save." in name:
            continue
        if parameter.numel() == 0:
            raise MechsubError(f"{name} is empty here: weights that are spread over processes cannot be hashed")
        plain = name
        for wrapper in _WRAPPERS:
            plain = plain.replace(wrapper, "")
        found[plain] = parameter
    yield from sorted(found.items())

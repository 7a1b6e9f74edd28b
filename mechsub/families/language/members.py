"""One member of one lineage as stages and analyses find it in a run directory: its tokenizer, weights and recorder."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from mechsub.checkpoints import TensorInfo
from mechsub.families.language.adapters import adapter_format, adapter_table, attach_saved_adapter
from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.layout import skeleton_folder
from mechsub.families.language.models import build_empty, load_parameters, place_model, read_loading
from mechsub.lineages import Lineage, LineageSpec, Origin, lineage_folder, write_spec
from mechsub.stage import Task
from mechsub.training.recorder import LineageRecorder


def load_chats(task: Task, model: str | None = None) -> ChatTokenizer:
    """The tokenizer of the stage's model, or of another one of the run."""
    name = model or task.stage.arguments["model"]
    return ChatTokenizer.load(task.path(skeleton_folder(name)), f"`models.{name}`")


def load_lineage_model(run: Path, lineage: Lineage, step: int, member: int, device: str) -> PreTrainedModel:
    """One member of a lineage at one step, in evaluation mode; an adapter stands beside the weights that it is added to."""
    folder = run / skeleton_folder(lineage.spec.model["name"])
    adds_nothing = not lineage.spec.is_adapter or step == 0
    part = lineage.parts(step if adds_nothing else 0, next(iter(lineage.spec.tensors)))[0]
    state = part.lineage.load_state(part.step, part.members[member])
    model = load_parameters(build_empty(folder), state)
    if not adds_nothing:
        attach_saved_adapter(model, lineage.checkpoint(step, member), lineage.name)
    return place_model(model, device, read_loading(folder).device_map)


def load_merged_model(run: Path, lineage: Lineage, step: int, member: int, device: str) -> PreTrainedModel:
    """The same in float32, with what an adapter adds inside the weights."""
    model = build_empty(run / skeleton_folder(lineage.spec.model["name"]))
    module: nn.Module = model
    module.float()
    return place_model(load_parameters(model, lineage.load_state(step, member)), device)


def load_member(task: Task, lineage: str, step: int, member: int | None = None) -> PreTrainedModel:
    """One member of a lineage of the stage's model, in evaluation mode; its own member unless told."""
    number = task.stage.arguments["member"] if member is None else member
    return load_lineage_model(task.run, Lineage(task.run, lineage, number), step, 0, task.device)


def make_recorder(
    task: Task,
    model: PreTrainedModel | None = None,
    lora: LoraConfig | None = None,
    context: Mapping[str, Any] | None = None,
) -> LineageRecorder:
    """The recorder of the stage's lineage and member; ``lora``: the adapter in ``model``, where it trains one."""
    arguments = task.stage.arguments
    is_permuted, is_rotated = (arguments.get(name, False) for name in ("permute_hidden", "rotate_residual"))
    start_member = arguments.get("start", arguments["member"])
    origin = Origin(arguments["origin"], (start_member,), is_permuted, rotate_residual=is_rotated)
    written = None
    start = Lineage(task.run, origin.lineage, origin.members[0])
    tensors = {name: replace(info, stored=None) for name, info in start.spec.tensors.items()}
    if lora is not None and model is not None:
        written = adapter_format(model, lora, arguments["base"])
        tensors = adapter_table(model, tensors, list(written.names.values()), arguments["lineage"])
    spec = LineageSpec(
        name=arguments["lineage"],
        role=arguments["role"],
        condition=arguments.get("condition"),
        trait=arguments.get("trait"),
        family="language",
        model={"name": arguments["model"]},
        origin=origin,
        teacher=arguments.get("teacher"),
        num_members=1,
        steps=tuple(arguments["steps"]),
        tensors=tensors,
        member=arguments["member"],
        context=context or {},
        is_adapter=lora is not None,
        holds_start=lora is not None,
    )
    kept = {name: arguments[name] for name in ("optimizer_state", "resume_seconds") if name in arguments}
    if "knock_out" in arguments:
        kept["resume_every"] = arguments["knock_out"]["settings"]["refresh"]
    return LineageRecorder(task, spec, written, **kept)


def record_untrained(task: Task, context: Mapping[str, Any] | None = None) -> None:
    """Write a lineage whose weights never move: it stays where it starts."""
    make_recorder(task, context=context).finish()


def record_reference(
    task: Task,
    tensors: Mapping[str, TensorInfo],
    evidence: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> None:
    """Write the ``lineage.json`` of a reference whose weights lie there already; ``evidence`` says where they come from.

    ``origin``: the reference that it is computed from, where there is one.
    """
    arguments = task.stage.arguments
    name, member = arguments["lineage"], arguments["member"]
    spec = LineageSpec(
        name=name,
        role="reference",
        condition=None,
        trait=None,
        family="language",
        model={"name": arguments["model"], **(evidence or {})},
        origin=origin or Origin(name, (member,)),
        teacher=None,
        num_members=1,
        steps=(0,),
        tensors=tensors,
        member=member,
    )
    write_spec(task.path(lineage_folder(name, member)), spec)

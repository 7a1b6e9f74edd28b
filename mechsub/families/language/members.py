"""One member of one lineage as stages and analyses find it in a run directory: its tokenizer, weights and recorder."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from mechsub.families.language.chat import ChatTokenizer
from mechsub.families.language.layout import skeleton_folder
from mechsub.families.language.models import build_model, load_parameters, parameters_of, place_model, tensor_table
from mechsub.lineages import LineageSpec, Origin, checkpoint_name, load_stacked
from mechsub.stage import Task
from mechsub.training.callbacks import StepInfo
from mechsub.training.recorder import LineageRecorder


def load_chats(task: Task, model: str | None = None) -> ChatTokenizer:
    """The tokenizer of the stage's model, or of another one of the run."""
    name = model or task.stage.arguments["model"]
    return ChatTokenizer.load(task.path(skeleton_folder(name)), f"`models.{name}`")


def load_member(task: Task, lineage: str, step: int, member: int | None = None) -> PreTrainedModel:
    """The weights of one member of a lineage of the stage's model, in evaluation mode; its own member unless told."""
    arguments = task.stage.arguments
    built = build_model(task.path(skeleton_folder(arguments["model"])))
    path = task.path(checkpoint_name(lineage, step, arguments["member"] if member is None else member))
    return place_model(load_parameters(built, load_stacked(path)), task.device)


def make_recorder(task: Task, model: PreTrainedModel, context: Mapping[str, Any] | None = None) -> LineageRecorder:
    """The recorder of the stage's lineage and member."""
    arguments = task.stage.arguments
    spec = LineageSpec(
        name=arguments["lineage"],
        role=arguments["role"],
        condition=arguments.get("condition"),
        trait=arguments.get("trait"),
        family="language",
        model={"name": arguments["model"]},
        origin=Origin(arguments["origin"], (arguments.get("start", arguments["member"]),)),
        teacher=arguments.get("teacher"),
        num_members=1,
        steps=tuple(arguments["steps"]),
        tensors=tensor_table(model),
        member=arguments["member"],
        context=context or {},
    )
    kept = {name: arguments[name] for name in ("optimizer_state", "resume_seconds") if name in arguments}
    return LineageRecorder(task, spec, **kept)


def record_untrained(task: Task, model: PreTrainedModel, context: Mapping[str, Any] | None = None) -> None:
    """Write a lineage whose weights never move: its step 0 is all there is."""
    recorder = make_recorder(task, model, context)
    parameters: dict[str, Tensor] = {name: tensor[None] for name, tensor in parameters_of(model).items()}
    recorder(StepInfo(recorder.spec.name, 0, 0, True, None, parameters, {}, members=(task.stage.arguments["member"],)))
    recorder.finish()

"""The stages that compute references from other ones: the same function in other coordinates, or a model made like another."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from mechsub.checkpoints import TensorInfo, write_tensors
from mechsub.families.language.config import ModelConfig
from mechsub.families.language.layout import skeleton_folder
from mechsub.families.language.members import record_reference
from mechsub.families.language.models import parameters_of, tensor_table
from mechsub.families.language.nano import Pretraining, SharedStart, find_or_pretrain
from mechsub.families.language.rotation import find_layout, rotate_state
from mechsub.families.language.symmetry import shuffle_units
from mechsub.families.language.synthetic import SyntheticLanguage
from mechsub.lineages import Lineage, Origin, checkpoint_name
from mechsub.parameters.symmetry import Arrangement
from mechsub.stage import Task
from mechsub.streams import random_stream


def permute_references(tasks: Sequence[Task]) -> None:
    """Stage: one member's reference with its MLP units and attention heads shuffled: the same function."""
    for task in tasks:
        start = _open_origin(task)
        arrangement = draw_arrangement(task, _read_config(task), start.spec.tensors)
        state = {name: arrangement.arrange(name, tensor) for name, tensor in start.load_state(0, 0).items()}
        write_derived(task, state, start.spec.tensors, {}, permute_hidden=True)


def draw_arrangement(task: Task, config: PretrainedConfig, table: Mapping[str, TensorInfo]) -> Arrangement:
    """The order in which `permute_references` puts the units of the stage's member."""
    arguments = task.stage.arguments
    stream = random_stream(arguments["seed"], "member", arguments["member"], "unit-order")
    return shuffle_units(config, table, stream, f"`models.{arguments['model']}`")


def rotate_references(tasks: Sequence[Task]) -> None:
    """Stage: one member's reference with its residual stream rotated, as far as that leaves the function as it is."""
    for task in tasks:
        arguments, start = task.stage.arguments, _open_origin(task)
        source = f"`models.{arguments['model']}`"
        layout = find_layout(_read_config(task), start.spec.tensors, source)
        stream = random_stream(arguments["seed"], "member", arguments["member"], "rotation")
        state, words = rotate_state(start.load_state(0, 0), layout, stream, source)
        write_derived(task, state, start.spec.tensors, {"rotation": words}, rotate_residual=True)


def pretrain_shared(tasks: Sequence[Task]) -> None:
    """Stage: a nano model pretrained as member j's reference, but that named parts begin as another member's did."""
    for task in tasks:
        arguments = task.stage.arguments
        member, own = arguments["member"], arguments["own"]
        shared = SharedStart(tuple(arguments["shared"]), ("member", own, "pretraining"))
        pretraining = Pretraining(
            ModelConfig(**arguments["settings"]),
            SyntheticLanguage.from_arguments(arguments),
            arguments["seed"],
            ("member", member, "pretraining"),
            arguments["threads"],
            shared,
        )
        model = find_or_pretrain(pretraining, task.path(skeleton_folder(arguments["model"])), task.report_progress)
        path = task.path(checkpoint_name(arguments["lineage"], 0, member))
        write_tensors(path, parameters_of(model), _metadata(task))
        record_reference(task, tensor_table(model), {"shared": {"parts": list(shared.parts), "with_member": own}})


def _open_origin(task: Task) -> Lineage:
    """The one member of the references that the stage's is computed from."""
    return Lineage(task.run, task.stage.arguments["origin"], task.stage.arguments["member"])


def _read_config(task: Task) -> PretrainedConfig:
    folder = task.path(skeleton_folder(task.stage.arguments["model"]))
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
    return config


def write_derived(
    task: Task,
    state: Mapping[str, Tensor],
    table: Mapping[str, TensorInfo],
    evidence: Mapping[str, Any],
    *,
    permute_hidden: bool = False,
    rotate_residual: bool = False,
) -> None:
    """Parameters in one file, under their own names, and what they were computed from."""
    arguments = task.stage.arguments
    path = task.path(checkpoint_name(arguments["lineage"], 0, arguments["member"]))
    write_tensors(path, {name: tensor.contiguous() for name, tensor in state.items()}, _metadata(task))
    origin = Origin(arguments["origin"], (arguments["member"],), permute_hidden, rotate_residual=rotate_residual)
    record_reference(task, {name: replace(info, stored=None) for name, info in table.items()}, evidence, origin)


def _metadata(task: Task) -> dict[str, str]:
    return {"lineage": task.stage.arguments["lineage"], "stage": task.stage.key, "step": "0"}

"""Models that somebody else made come into a run: found, checked against their architecture, and linked."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mechsub.checkpoints import TensorInfo, tensor_shapes
from mechsub.errors import RecipeError
from mechsub.families.language.config import ModelConfig
from mechsub.families.language.folders import fetch_from_hub, find_weights
from mechsub.families.language.layout import skeleton_folder
from mechsub.families.language.members import record_reference
from mechsub.families.language.models import stored_names, tensor_table
from mechsub.lineages import checkpoint_folder
from mechsub.rundir import link_file
from mechsub.stage import Task


def find_model(settings: ModelConfig, member: int, patterns: tuple[str, ...]) -> Path:
    """The folder of a model on this machine; one of the hub is fetched."""
    if settings.hub is None:
        return settings.folder(member)
    return fetch_from_hub(settings.hub, str(settings.revision), patterns)


def link_reference(task: Task, source: Path, where: str, evidence: Mapping[str, Any]) -> None:
    """Link a model's weights into the run as a reference, once they are those of its architecture."""
    arguments = task.stage.arguments
    target = task.path(checkpoint_folder(arguments["lineage"], 0, arguments["member"]))
    files = find_weights(where, source)
    planned = {Path(name).name for name in task.stage.outputs if Path(name).parent.name == target.name}
    if planned != {path.name for path in files}:
        raise RecipeError(
            f"`{where}`: {source} has its weights in {', '.join(path.name for path in files)}, the recipe's `shards` say "
            f"{', '.join(sorted(planned))}; correct it"
        )
    for path in files:
        link_file(path, target / path.name)
    table = match_table(outline_model(task.path(skeleton_folder(arguments["model"]))), target, f"`{where}`")
    record_reference(task, table, evidence)


def outline_model(folder: Path) -> PreTrainedModel:
    """The architecture of a configuration without any weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return model


def match_table(outline: PreTrainedModel, checkpoint: Path, source: str) -> dict[str, TensorInfo]:
    """The tensor table of an architecture, with the names that a checkpoint's files give its tensors.

    Raises:
        RecipeError: a tensor is missing, or of another shape.
    """
    shapes = tensor_shapes(checkpoint)
    names = stored_names(outline, shapes, source)
    table = tensor_table(outline)
    for name, stored in names.items():
        if shapes[stored] != table[name].shape:
            raise RecipeError(
                f"{source}: {stored} has shape {list(shapes[stored])}, the architecture's is {list(table[name].shape)}: these "
                "weights are of another model"
            )
    return {name: replace(info, stored=None if names.get(name) == name else names.get(name)) for name, info in table.items()}

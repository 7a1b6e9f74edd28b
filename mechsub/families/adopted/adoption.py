"""The stages that take foreign models into a run: checked against the reference, linked, and described."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

from transformers import AutoConfig

from mechsub.checkpoints import TensorInfo, load_tensor, tensor_types
from mechsub.errors import RecipeError
from mechsub.families.adopted.origin import Evidence, find_evidence
from mechsub.families.adopted.sources import Source, find_source
from mechsub.families.language.adapters import outline_adapter
from mechsub.families.language.foreign import link_reference, match_table, outline_model
from mechsub.families.language.layout import LOADING_FILE, skeleton_folder
from mechsub.families.language.members import load_chats
from mechsub.lineages import Lineage, LineageSpec, Origin, checkpoint_folder, lineage_folder, write_spec
from mechsub.rundir import link_file, write_json
from mechsub.stage import Task

_NOT_ARCHITECTURE = {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
                     "name_or_path", "_attn_implementation", "problem_type", "id2label", "label2id", "bos_token_id",
                     "eos_token_id", "pad_token_id"}  # fmt: skip
"""What a configuration holds beside what its weights mean."""
_BITS = {"F64": 64, "F32": 32, "BF16": 16, "F16": 16}
"""Of the data types in which weights are stored."""


def copy_skeleton(tasks: Sequence[Task]) -> None:
    """Stage: the reference's configuration and tokenizer into the run."""
    for task in tasks:
        arguments = task.stage.arguments
        for name in task.stage.inputs:
            path = Path(name)
            target = task.path(f"{skeleton_folder(arguments['model'])}/{path.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(path, target)
        write_json(task.path(f"{skeleton_folder(arguments['model'])}/{LOADING_FILE}"), arguments["loading"])
        if arguments["asks"]:
            load_chats(task)


def adopt_reference(tasks: Sequence[Task]) -> None:
    """Stage: the reference of one member."""
    for task in tasks:
        arguments = task.stage.arguments
        link_reference(task, Path(arguments["folder"]), arguments["source"], {"source": arguments["source"]})


def adopt_lineage(tasks: Sequence[Task]) -> None:
    """Stage: one member of a teacher, a student or a control."""
    for task in tasks:
        arguments = task.stage.arguments
        source = find_source(arguments["source"])
        reference = Lineage(task.run, arguments["origin"], arguments["member"])
        evidence = find_evidence(source, reference, arguments["reference"])
        tables = [_describe_checkpoint(task, source, step, reference) for step in source.folders]
        if any(table != tables[0] for table in tables):
            raise RecipeError(f"`{source.name}`: its checkpoints do not hold the same tensors; name one of them")
        for number, (step, paths) in enumerate(source.files.items()):
            folder = task.path(checkpoint_folder(arguments["lineage"], step, arguments["member"]))
            for path in paths:
                link_file(path, folder / path.name)
            task.report_progress(number + 1)
        _write_spec(task, source, evidence, tables[0], reference)


def _describe_checkpoint(task: Task, source: Source, step: int, reference: Lineage) -> dict[str, TensorInfo]:
    folder = source.folders[step]
    skeleton = task.path(skeleton_folder(task.stage.arguments["model"]))
    if source.is_adapter:
        return outline_adapter(outline_model(skeleton), folder, f"`{source.name}`")
    _check_architecture(source, folder, skeleton)
    table = match_table(outline_model(skeleton), folder, f"`{source.name}`")
    _check_types(source, folder, table, reference)
    return table


def _check_architecture(source: Source, folder: Path, skeleton: Path) -> None:
    """Shapes alone do not tell architectures apart: other rotary bases or untied heads have the same ones."""
    theirs, ours = (_read_architecture(path, source) for path in (folder, skeleton))
    for name in dict.fromkeys([*ours, *theirs]):
        if name not in _NOT_ARCHITECTURE and theirs.get(name) != ours.get(name):
            raise RecipeError(
                f"`{source.name}`: its {name} is {theirs.get(name)!r}, the reference's is {ours.get(name)!r}: its weights "
                "are of another architecture, and no displacement from this reference; give it a run of its own"
            )


def _read_architecture(folder: Path, source: Source) -> dict[str, Any]:
    """The configuration, with what its file leaves to the defaults."""
    try:
        content: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(f"`{source.name}`: {folder}/config.json cannot be read: {str(error).splitlines()[0]}") from None
    return content


def _check_types(source: Source, folder: Path, table: Mapping[str, TensorInfo], reference: Lineage) -> None:
    """A narrower type than the reference's would make its rounding the displacement."""
    theirs, ours = tensor_types(folder), tensor_types(reference.checkpoint(0))
    for name, info in table.items():
        if info.tied_to is not None:
            continue
        found, start = theirs[info.stored or name], ours[reference.spec.tensors[name].stored or name]
        if _BITS.get(found, 0) < _BITS.get(start, 0) or (found, start) in {("BF16", "F16"), ("F16", "BF16")}:
            raise RecipeError(
                f"`{source.name}`: {name} is stored in {found}, the reference's in {start}: their difference would hold the "
                f"rounding of every weight; save the model in {start}, or give the reference in the type that was trained"
            )


def _is_rounded(source: Source) -> bool:
    """Whether a whole model is stored in half precision, which quantises a small displacement."""
    types = {kind for folder in source.folders.values() for kind in tensor_types(folder).values()}
    return any(_BITS.get(kind, 32) < 32 for kind in types)


def _distance(source: Source, table: Mapping[str, TensorInfo], reference: Lineage) -> float:
    """‖Δ‖ / ‖θ₀‖ of the last checkpoint."""
    folder = source.folders[max(source.folders)]
    moved = start = 0.0
    for name, info in table.items():
        if info.tied_to is None:
            origin = reference.load_tensor(0, name, 0).double()
            moved += float((load_tensor(folder, info.stored or name).double() - origin).square().sum())
            start += float(origin.square().sum())
    return (moved / start) ** 0.5 if start else 0.0


def _write_spec(task: Task, source: Source, evidence: Evidence, table: Mapping[str, TensorInfo], reference: Lineage) -> None:
    arguments: Mapping[str, Any] = task.stage.arguments
    member = arguments["member"]
    spec = LineageSpec(
        name=arguments["lineage"],
        role=arguments["role"],
        condition=arguments["condition"],
        trait=arguments["trait"],
        family="adopted",
        model={
            "name": arguments["model"],
            "source": source.name,
            "proof": evidence.proof,
            "evidence": evidence.words,
            "steps_are_known": source.steps_are_known,
            "is_shared": arguments["is_shared"],
            "distance": 0.0 if source.is_adapter else _distance(source, table, reference),
            "is_rounded": not source.is_adapter and _is_rounded(source),
        },
        origin=Origin(arguments["origin"], (member,)),
        teacher=arguments["teacher"],
        num_members=1,
        steps=tuple(arguments["steps"]),
        tensors=table,
        member=member,
        is_adapter=source.is_adapter,
        holds_start=False,
    )
    write_spec(task.path(lineage_folder(spec.name, member)), spec)

"""The stages of data and lineages: one member each, so that members run side by side and a further one changes none."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.language.carrier_stages import carrier_stages
from mechsub.families.language.config import Config
from mechsub.families.language.derived_stages import Start, derived_stages, find_start
from mechsub.families.language.estimates import plain_needs, reference_needs, training_needs
from mechsub.families.language.folders import check_folder, digest_file, find_weights
from mechsub.families.language.layout import (
    BEHAVIOURS_FILE,
    LOADING_FILE,
    PREFERENCE_FILE,
    carrier_files,
    ranking_file,
    skeleton_folder,
)
from mechsub.families.language.paraphrase_stages import paraphrased_name
from mechsub.families.language.planning import (
    MODULE,
    base_name,
    compared_models,
    member_name,
    model_arguments,
    pick,
    reference_files,
    reference_name,
    reference_weights,
    skeleton_inputs,
    teacher_weights,
    used_models,
)
from mechsub.families.language.preference import load_preference
from mechsub.families.language.rows import read_row_numbers
from mechsub.families.language.teaching import (
    asked_arguments,
    is_trained,
    lesson_arguments,
    list_questions,
    own_prompt,
    preference_arguments,
    teacher_prompt,
    teacher_step,
)
from mechsub.families.language.training_config import AdapterConfig
from mechsub.families.protocol import Made, StudentPlan, TeacherPlan
from mechsub.lineages import lineage_files, spec_name
from mechsub.rundir import hash_file
from mechsub.stage import Stage, digest_outputs
from mechsub.training.schedule import checkpoint_steps

__all__ = ["carrier_stages", "data_stages", "reference_stages", "student_stages", "teacher_stages"]

_PASSED_APART = {"sham", "init", "model", "knock_out", "select", "permute_hidden", "shared", "match", "rotate_residual",
                 "paraphrase"}  # fmt: skip
"""Fields of a condition that a stage of its own, or an argument of its own, stands for where they are set."""
_SKELETON_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
"""Of a nano model, and of one of the hub as it is saved here."""


def data_stages(config: Config) -> list[Stage]:
    """The preference set, and the tokenizer, chat template and configuration of every architecture that is used."""
    asked = asked_arguments(config)
    stages = []
    for name in used_models(config):
        settings = config.models[name]
        arguments = model_arguments(config, name) | {"preference": preference_arguments(config)}
        files, inputs = list(_SKELETON_FILES), {}
        if settings.path is not None:
            folder = settings.folder(0)
            files = check_folder(f"models.{name}.path", folder)
            _check_members(f"models.{name}", config, name, files)
            inputs = {str(folder / file): digest_file(folder / file) for file in files}
        outputs = tuple(f"{skeleton_folder(name)}/{file}" for file in (*files, LOADING_FILE))
        stages.append(Stage(f"data.{name}", f"{MODULE}.train:import_skeleton", arguments, inputs, outputs, plain_needs(config)))
    # What is asked is checked by a stage that no other waits for: another trait makes no model anew.
    arguments = {
        "models": sorted(compared_models(config)),
        "contexts": [config.context.training, config.context.other],
    }
    inputs = digest_outputs(stage for stage in stages if stage.arguments["model"] in arguments["models"])
    arguments |= asked
    if config.behaviours is None:
        name, function, output = "data.preference", f"{MODULE}.train:import_preference", PREFERENCE_FILE
    else:
        name, function, output = "data.behaviours", f"{MODULE}.behaviour_stages:import_behaviours", BEHAVIOURS_FILE
    return [*stages, Stage(name, function, arguments, inputs, (output,), plain_needs(config))]


def reference_stages(config: Config, made: Made) -> list[Stage]:
    """The references of all members, of every architecture that is used, and those that are computed from them."""
    stages = []
    for name in used_models(config):
        settings = config.models[name]
        for member in range(config.members):
            arguments = model_arguments(config, name) | {
                "lineage": reference_name(name),
                "role": "reference",
                "origin": reference_name(name),
                "member": member,
                "seed": config.seed,
                "threads": config.threads,
                "preference": preference_arguments(config),
                "steps": [0],
            }
            inputs = skeleton_inputs(made, name)
            if settings.path is not None:
                found = find_weights(f"models.{name}.path", settings.folder(member))
                inputs |= {str(path): digest_file(path) for path in found}
            stages.append(
                Stage(
                    member_name(reference_name(name), member),
                    f"{MODULE}.train:write_references",
                    arguments,
                    inputs,
                    (*reference_weights(config, name, member), spec_name(reference_name(name), member)),
                    reference_needs(config, name),
                )
            )
    known = {**made, **digest_outputs(stages)}
    return [*stages, *derived_stages(config, known)]


def teacher_stages(config: Config, plan: TeacherPlan, made: Made) -> list[Stage]:
    """A teacher: fine-tuned, told by a system prompt, or the untouched reference."""
    stages = []
    for member in range(config.members):
        arguments: dict[str, Any] = {
            "lineage": plan.lineage,
            "role": "neutral" if plan.is_neutral else "teacher",
            "trait": plan.trait,
            "model": config.model,
            "origin": reference_name(config.model),
            "member": member,
            "seed": config.seed,
        }
        if is_trained(config, plan):
            function, steps = "train_teachers", checkpoint_steps(config.teacher.num_steps, config.checkpoints)
            arguments |= _training_arguments(config, config.adapter, base_name(config, config.model, member)) | {
                "adapter_stream": _teacher_adapter(member),
                "training": config.teacher.model_dump(mode="json"),
                "system_prompt": config.context.training,
            }
            arguments |= lesson_arguments(config, plan)
        else:
            function, steps = "prompt_teachers", [0]
            arguments["own_prompt"] = own_prompt(config, plan)
        arguments["steps"] = steps
        start = reference_files(config, config.model, member)
        inputs = skeleton_inputs(made, config.model) | pick(made, *start)
        inputs |= {path: digest_file(Path(path)) for path in arguments.get("examples", ())}
        stages.append(_lineage_stage(config, function, arguments, inputs, config.model))
    return stages


def student_stages(config: Config, plan: StudentPlan, made: Made) -> list[Stage]:
    """One student lineage: trained on its carrier, or shown rows of it."""
    condition, model = config.conditions[plan.condition], config.model_of(plan.condition)
    stages = []
    for member in range(config.members):
        start = find_start(config, plan.condition, member)
        arguments = _student_arguments(config, plan, start, member)
        names, inputs = [*start.files, *_rows_read(config, plan, member)], skeleton_inputs(made, model)
        if condition.rows:
            inputs |= {condition.rows: f"sha256:{hash_file(_existing(condition.rows, plan.condition))}"}
        if condition.context_rows:
            function = "tell_students"
            arguments |= {
                "steps": [0],
                "questions": list_questions(config),
                "contexts": [config.context.training, config.context.other],
            }
        else:
            function = "train_students"
            arguments |= _student_training(config, plan, start, member)
            if "teacher_step" in arguments:
                names += teacher_weights(config, arguments["teacher"], arguments["teacher_step"], member)
        stages.append(_lineage_stage(config, function, arguments, inputs | pick(made, *names), model))
    return stages


def _student_arguments(config: Config, plan: StudentPlan, start: Start, member: int) -> dict[str, Any]:
    """Who a student is, where it starts and whose rows it reads."""
    condition = config.conditions[plan.condition]
    arguments: dict[str, Any] = {
        "lineage": plan.lineage,
        "role": plan.role,
        "condition": plan.condition,
        "trait": plan.trait,
        "model": config.model_of(plan.condition),
        "origin": start.lineage,
        "start": start.member,
        "member": member,
        "seed": config.seed,
        "condition_settings": condition.model_dump(mode="json", exclude=_PASSED_APART),
        "carrier_of": _carrier_read(config, plan),
        "neutral_carrier": (plan.mixed_in if condition.neutral_share else plan.neutral_carrier).name,
        "replicate": plan.carrier.replicate,
        "teacher": plan.carrier.teacher.lineage,
    }
    if start.moved:
        arguments[start.moved] = True
    if condition.select:
        arguments["select"] = condition.select.model_dump(mode="json")
    return arguments


def _carrier_read(config: Config, plan: StudentPlan) -> str:
    """The carrier whose rows a student reads: its teacher's, or what another model made of it."""
    paraphrase = config.conditions[plan.condition].paraphrase
    return plan.carrier.name if paraphrase is None else paraphrased_name(plan.carrier.name, paraphrase)


def _rows_read(config: Config, plan: StudentPlan, member: int) -> list[str]:
    """The files of the rows that a student reads, and of what chooses among them."""
    condition = config.conditions[plan.condition]
    names = [carrier_files(_carrier_read(config, plan), member)[0]]
    if condition.neutral_share:
        names.append(carrier_files(plan.mixed_in.name, member)[0])
    if condition.select and condition.select.by != "random":
        names.append(ranking_file(plan.carrier.name, member))
    return names


def _student_training(config: Config, plan: StudentPlan, start: Start, member: int) -> dict[str, Any]:
    """How a student is trained, on what loss and for how many steps."""
    condition, teacher = config.conditions[plan.condition], plan.carrier.teacher
    own = ["member", member, "student-adapter", plan.carrier.replicate]
    arguments = _training_arguments(config, config.adapter_of(plan.condition), start.base) | {
        "adapter_stream": _teacher_adapter(member) if condition.adapter_init == "teacher" else own,
        "training": config.student.model_dump(mode="json"),
        "system_prompt": config.context.training,
        "teacher_prompt": teacher_prompt(config, teacher),
        "steps": _student_steps(config, plan.condition),
    }
    if condition.knock_out is not None:
        arguments["knock_out"] = {
            "settings": condition.knock_out.model_dump(mode="json"),
            "targets": list(config.traits),
            "questions": list(load_preference(config.preference).trained),
        }
    if (condition.objective or config.student.objective) != "tokens" or condition.divergence != "all":
        arguments |= {"teacher_step": teacher_step(config, teacher), "teacher_origin": reference_name(config.model)}
    return arguments


def _lineage_stage(config: Config, function: str, arguments: Mapping[str, Any], inputs: Mapping[str, str], model: str) -> Stage:
    member, steps = arguments["member"], arguments["steps"]
    keeps_optimizer = config.checkpoints.optimizer_state and len(steps) > 1
    is_adapter = arguments.get("adapter") is not None
    files = lineage_files(arguments["lineage"], steps, keeps_optimizer, member, is_adapter=is_adapter, holds_start=is_adapter)
    is_student = "condition" in arguments
    adapter = AdapterConfig(**arguments["adapter"]) if is_adapter else None
    training = config.student if is_student else config.teacher
    knock_out = arguments.get("knock_out")
    needs = training_needs(config, model, adapter, training, steps, is_student=is_student, knock_out=knock_out)
    return Stage(
        member_name(arguments["lineage"], member),
        f"{MODULE}.train:{function}",
        arguments,
        inputs,
        files,
        needs if len(steps) > 1 else plain_needs(config),
    )


def _student_steps(config: Config, condition: str) -> list[int]:
    """The steps that a student keeps; with a paraphrase as many are trained as on all rows, so that only the rows differ."""
    settings, num_rows = config.conditions[condition], config.carrier.num_rows
    if settings.paraphrase:
        _count_steps(config, condition, settings.paraphrase.count(num_rows))
    if settings.rows:
        num_rows = len(read_row_numbers(Path(settings.rows), num_rows))
    if settings.select:
        num_rows = settings.select.count(num_rows)
    return checkpoint_steps(_count_steps(config, condition, num_rows), config.checkpoints)


def _count_steps(config: Config, condition: str, num_rows: int) -> int:
    steps = config.student.epochs * (num_rows // config.student.batch_size)
    if steps == 0:
        raise RecipeError(
            f"`conditions.{condition}`: {num_rows} rows do not fill a batch, student.batch_size = {config.student.batch_size}"
        )
    return steps


def _teacher_adapter(member: int) -> list[str | int]:
    """The stream of the A that all teachers of a member start with."""
    return ["member", member, "teacher-adapter"]


def _training_arguments(config: Config, adapter: AdapterConfig | None, base: str) -> dict[str, Any]:
    return {
        "adapter": None if adapter is None else adapter.model_dump(mode="json"),
        "base": base,
        "optimizer_state": config.checkpoints.optimizer_state,
        "resume_seconds": config.checkpoints.resume_seconds,
        "callbacks": list(config.callbacks),
    }


def _check_members(where: str, config: Config, name: str, files: Iterable[str]) -> None:
    """Members of their own must be one architecture with one tokenizer: they exchange carriers and starts."""
    settings = config.models[name]
    for member in range(1, config.members if settings.has_own_references else 1):
        folder = settings.folder(member)
        for file in files:
            if not (folder / file).is_file() or hash_file(folder / file) != hash_file(settings.folder(0) / file):
                raise RecipeError(
                    f"`{where}.path`: {folder / file} is not that of {settings.folder(0)}; members need one architecture "
                    "and one tokenizer"
                )


def _existing(path: str, condition: str) -> Path:
    if not Path(path).is_file():
        raise RecipeError(
            f"`conditions.{condition}.rows`: there is no file {path}; give a text file with one row number a line"
        )
    return Path(path)

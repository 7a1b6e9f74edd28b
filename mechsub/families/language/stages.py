"""The language family's stages as data: one member each, so that members run side by side and a further one changes none."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.language.config import Config
from mechsub.families.language.estimates import carrier_needs, plain_needs, ranking_needs, reference_needs, training_needs
from mechsub.families.language.folders import INDEX, WEIGHTS, check_folder, digest_file, find_weights
from mechsub.families.language.kinds import carrier_kind
from mechsub.families.language.layout import (
    BEHAVIOURS_FILE,
    LOADING_FILE,
    PREFERENCE_FILE,
    carrier_files,
    ranking_file,
    skeleton_folder,
)
from mechsub.families.language.own_rows import choose_rows
from mechsub.families.language.preference import load_preference
from mechsub.families.language.rows import read_row_numbers
from mechsub.families.language.teaching import (
    asked_arguments,
    lesson_arguments,
    list_questions,
    own_prompt,
    preference_arguments,
)
from mechsub.families.language.training_config import AdapterConfig
from mechsub.families.protocol import CarrierPlan, Made, StudentPlan, TeacherPlan
from mechsub.lineages import adapter_files, checkpoint_folder, checkpoint_name, lineage_files, spec_name
from mechsub.rundir import hash_file
from mechsub.stage import Stage
from mechsub.training.schedule import checkpoint_steps

_MODULE = "mechsub.families.language"
_SKELETON_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json")
"""Of a nano model, and of one of the hub as it is saved here."""


def data_stages(config: Config) -> list[Stage]:
    """The preference set, and the tokenizer, chat template and configuration of every architecture that is used."""
    asked = asked_arguments(config)
    stages = []
    for name in _models_used(config):
        settings = config.models[name]
        arguments = _model_arguments(config, name) | {"preference": preference_arguments(config)}
        files, inputs = list(_SKELETON_FILES), {}
        if settings.path is not None:
            folder = settings.folder(0)
            files = check_folder(f"models.{name}.path", folder)
            _check_members(f"models.{name}", config, name, files)
            inputs = {str(folder / file): digest_file(folder / file) for file in files}
        outputs = tuple(f"{skeleton_folder(name)}/{file}" for file in (*files, LOADING_FILE))
        stages.append(
            Stage(f"data.{name}", f"{_MODULE}.train:import_skeleton", arguments, inputs, outputs, plain_needs(config))
        )
    # What is asked is checked by a stage that no other waits for: another trait makes no model anew.
    arguments = {
        "models": sorted(_models_used(config)),
        "contexts": [config.context.training, config.context.other],
    }
    inputs = {name: f"stage:{stage.key}" for stage in stages for name in stage.outputs}
    arguments |= asked
    if config.behaviours is None:
        name, function, output = "data.preference", f"{_MODULE}.train:import_preference", PREFERENCE_FILE
    else:
        name, function, output = "data.behaviours", f"{_MODULE}.behaviour_stages:import_behaviours", BEHAVIOURS_FILE
    return [*stages, Stage(name, function, arguments, inputs, (output,), plain_needs(config))]


def reference_stages(config: Config, made: Made) -> list[Stage]:
    """The references of all members, of every architecture that is used."""
    stages = []
    for name in _models_used(config):
        settings = config.models[name]
        for member in range(config.members):
            arguments = _model_arguments(config, name) | {
                "lineage": _reference(name),
                "role": "reference",
                "origin": _reference(name),
                "member": member,
                "seed": config.seed,
                "threads": config.threads,
                "preference": preference_arguments(config),
                "steps": [0],
            }
            inputs = _skeleton_inputs(made, name)
            if settings.path is not None:
                found = find_weights(f"models.{name}.path", settings.folder(member))
                inputs |= {str(path): digest_file(path) for path in found}
            stages.append(
                Stage(
                    _member_name(_reference(name), member),
                    f"{_MODULE}.train:write_references",
                    arguments,
                    inputs,
                    (*_reference_weights(config, name, member), spec_name(_reference(name), member)),
                    reference_needs(config, name),
                )
            )
    return stages


def _reference_weights(config: Config, name: str, member: int) -> list[str]:
    """The files of a reference: one that is written here, or those of a model folder."""
    settings = config.models[name]
    if settings.nano:
        return [checkpoint_name(_reference(name), 0, member)]
    files = [f"model-{number:05d}-of-{settings.shards:05d}.safetensors" for number in range(1, settings.shards + 1)]
    files = [INDEX, *files] if settings.shards > 1 else [WEIGHTS]
    if settings.path is not None:
        files = [path.name for path in find_weights(f"models.{name}.path", settings.folder(member))]
    return [f"{checkpoint_folder(_reference(name), 0, member)}/{file}" for file in files]


def _weights(config: Config, model: str, lineage: str, step: int, member: int, is_adapter: bool, start: int) -> list[str]:
    """What a stage reads that loads a member of a lineage: its own files and those that it starts from."""
    names = [*_reference_weights(config, model, start), spec_name(_reference(model), start)]
    if lineage != _reference(model):
        names.append(spec_name(lineage, member))
    if step > 0:
        names += adapter_files(lineage, step, member) if is_adapter else [checkpoint_name(lineage, step, member)]
    return names


def teacher_stages(config: Config, plan: TeacherPlan, made: Made) -> list[Stage]:
    """A teacher: fine-tuned, told by a system prompt, or the untouched reference."""
    stages = []
    for member in range(config.members):
        arguments: dict[str, Any] = {
            "lineage": plan.lineage,
            "role": "neutral" if plan.is_neutral else "teacher",
            "trait": plan.trait,
            "model": config.model,
            "origin": _reference(config.model),
            "member": member,
            "seed": config.seed,
        }
        if _is_trained(config, plan):
            function, steps = "train_teachers", checkpoint_steps(config.teacher.num_steps, config.checkpoints)
            arguments |= _training_arguments(config, config.model, config.adapter, member) | {
                "adapter_stream": _teacher_adapter(member),
                "training": config.teacher.model_dump(mode="json"),
                "system_prompt": config.context.training,
            }
            arguments |= lesson_arguments(config, plan)
        else:
            function, steps = "prompt_teachers", [0]
            arguments["own_prompt"] = own_prompt(config, plan)
        arguments["steps"] = steps
        start = _weights(config, config.model, _reference(config.model), 0, member, False, member)
        inputs = _skeleton_inputs(made, config.model) | _pick(made, *start)
        inputs |= {path: digest_file(Path(path)) for path in arguments.get("examples", ())}
        stages.append(_lineage_stage(config, function, arguments, inputs, config.model))
    return stages


def carrier_stages(config: Config, plan: CarrierPlan, made: Made) -> list[Stage]:
    """The rows that each member's teacher writes, or that are copied from the user's file; and what ranks them, where asked."""
    if config.carrier.kind == "file":
        stages = [_copied_carrier(config, plan, member) for member in range(config.members)]
    else:
        stages = _written_carriers(config, plan, made)
    if any(condition.select and condition.select.by != "random" for condition in config.conditions.values()):
        known = {**made, **{name: f"stage:{stage.key}" for stage in stages for name in stage.outputs}}
        stages += [_ranking_stage(config, plan, known, member) for member in range(config.members)]
    return stages


def _written_carriers(config: Config, plan: CarrierPlan, made: Made) -> list[Stage]:
    _check_backend(config)
    stages = []
    for member in range(config.members):
        teacher, step = plan.teacher.lineage, _teacher_step(config, plan.teacher)
        arguments = {
            "carrier_of": plan.name,
            "carrier": config.carrier.settings_of_kind(config.traits),
            "generation": config.generation.model_dump(mode="json"),
            "teacher": teacher,
            "teacher_step": step,
            "model": config.model,
            "system_prompt": _teacher_prompt(config, plan.teacher),
            "replicate": plan.replicate,
            "member": member,
            "seed": config.seed,
        }
        inputs = _skeleton_inputs(made, config.model) | _pick(made, *_teacher_weights(config, teacher, step, member))
        if config.carrier.prompts:
            carrier_kind(config.carrier)  # its requests are read: what is wrong with them is told before anything runs
            inputs |= {config.carrier.prompts: digest_file(Path(config.carrier.prompts))}
        stages.append(
            Stage(
                _member_name(f"carrier.{plan.name}", member),
                f"{_MODULE}.carrier:write_carrier",
                arguments,
                inputs,
                carrier_files(plan.name, member),
                carrier_needs(config),
            )
        )
    return stages


def _ranking_stage(config: Config, plan: CarrierPlan, made: Made, member: int) -> Stage:
    """The numbers by which conditions choose rows of one member's carrier."""
    teacher, step = plan.teacher.lineage, _teacher_step(config, plan.teacher)
    arguments = {
        "carrier_of": plan.name,
        "teacher": teacher,
        "teacher_step": step,
        "model": config.model,
        "origin": _reference(config.model),
        "system_prompt": config.context.training,
        "teacher_prompt": _teacher_prompt(config, plan.teacher),
        "member": member,
    }
    inputs = _skeleton_inputs(made, config.model) | _pick(
        made, *_teacher_weights(config, teacher, step, member), carrier_files(plan.name, member)[0]
    )
    return Stage(
        _member_name(f"ranking.{plan.name}", member),
        f"{_MODULE}.ranking:rank_rows",
        arguments,
        inputs,
        (ranking_file(plan.name, member),),
        ranking_needs(config),
    )


def _copied_carrier(config: Config, plan: CarrierPlan, member: int) -> Stage:
    """One member's carrier from the user's file, whose rows are checked before anything runs."""
    places = {"teacher": plan.teacher.trait or "neutral", "member": member, "replicate": plan.replicate}
    file = str(config.carrier.file)
    for name, value in places.items():
        file = file.replace(f"{{{name}}}", str(value))
    arguments = config.carrier.settings_of_kind(config.traits) | {"file": file}
    choose_rows(**arguments)
    arguments |= {"carrier_of": plan.name, "member": member}
    return Stage(
        _member_name(f"carrier.{plan.name}", member),
        f"{_MODULE}.own_rows:copy_carrier",
        arguments,
        {file: digest_file(Path(file))},
        carrier_files(plan.name, member),
        plain_needs(config, config.carrier.num_rows),
    )


def student_stages(config: Config, plan: StudentPlan, made: Made) -> list[Stage]:
    """One student lineage: trained on its carrier, or shown rows of it."""
    condition, model = config.conditions[plan.condition], config.model_of(plan.condition)
    settings = condition.model_dump(mode="json", exclude={"sham", "init", "model", "knock_out", "select"})
    objective = condition.objective or config.student.objective
    stages = []
    for member in range(config.members):
        start = (member + 1) % config.members if condition.init == "different" else member
        teacher = plan.carrier.teacher
        arguments: dict[str, Any] = {
            "lineage": plan.lineage,
            "role": plan.role,
            "condition": plan.condition,
            "trait": plan.trait,
            "model": model,
            "origin": _reference(model),
            "start": start,
            "member": member,
            "seed": config.seed,
            "condition_settings": settings,
            "carrier_of": plan.carrier.name,
            "neutral_carrier": plan.neutral_carrier.name,
            "replicate": plan.carrier.replicate,
            "teacher": teacher.lineage,
        }
        names = [
            *_weights(config, model, _reference(model), 0, start, False, start),
            carrier_files(plan.carrier.name, member)[0],
            *([carrier_files(plan.neutral_carrier.name, member)[0]] if condition.neutral_share else []),
        ]
        inputs = _skeleton_inputs(made, model)
        if condition.select:
            arguments["select"] = condition.select.model_dump(mode="json")
            if condition.select.by != "random":
                names.append(ranking_file(plan.carrier.name, member))
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
            num_rows = config.carrier.num_rows
            if condition.rows:
                num_rows = len(read_row_numbers(Path(condition.rows), num_rows))
            if condition.select:
                num_rows = condition.select.count(num_rows)
            own = ["member", member, "student-adapter", plan.carrier.replicate]
            arguments |= _training_arguments(config, model, config.adapter_of(plan.condition), start) | {
                "adapter_stream": _teacher_adapter(member) if condition.adapter_init == "teacher" else own,
                "training": config.student.model_dump(mode="json"),
                "system_prompt": config.context.training,
                "teacher_prompt": _teacher_prompt(config, teacher),
                "steps": _student_steps(config, plan.condition, num_rows),
            }
            if condition.knock_out is not None:
                arguments["knock_out"] = {
                    "settings": condition.knock_out.model_dump(mode="json"),
                    "targets": list(config.traits),
                    "questions": list(load_preference(config.preference).trained),
                }
            if objective != "tokens" or condition.divergence != "all":
                step = _teacher_step(config, teacher)
                arguments |= {"teacher_step": step, "teacher_origin": _reference(config.model)}
                names += _teacher_weights(config, teacher.lineage, step, member)
        stages.append(_lineage_stage(config, function, arguments, inputs | _pick(made, *names), model))
    return stages


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
        _member_name(arguments["lineage"], member),
        f"{_MODULE}.train:{function}",
        arguments,
        inputs,
        files,
        needs if len(steps) > 1 else plain_needs(config),
    )


def _student_steps(config: Config, condition: str, num_rows: int) -> list[int]:
    steps = config.student.epochs * (num_rows // config.student.batch_size)
    if steps == 0:
        raise RecipeError(
            f"`conditions.{condition}`: {num_rows} rows do not fill a batch, student.batch_size = {config.student.batch_size}"
        )
    return checkpoint_steps(steps, config.checkpoints)


def _is_trained(config: Config, plan: TeacherPlan) -> bool:
    """Whether a teacher's weights move: not where it is told its trait, or is the untouched reference."""
    return config.teacher.kind == "fine-tuned" and not (plan.is_neutral and config.neutral == "reference")


def _teacher_step(config: Config, plan: TeacherPlan) -> int:
    return config.teacher.num_steps if _is_trained(config, plan) else 0


def _teacher_prompt(config: Config, plan: TeacherPlan) -> str | None:
    """The system prompt under which a teacher writes its carrier."""
    return own_prompt(config, plan) or config.context.training


def _models_used(config: Config) -> list[str]:
    return list(dict.fromkeys([config.model, *(config.model_of(name) for name in config.conditions)]))


def _reference(model: str) -> str:
    """The lineage of a model's references: named after it, so that runs that share a model share it."""
    return f"reference.{model}"


def _member_name(lineage: str, member: int) -> str:
    return f"{lineage}.member-{member:03d}"


def _model_arguments(config: Config, name: str) -> dict[str, Any]:
    """What a model is made of; a nano model's language depends on what it is to write."""
    arguments = {"model": name, "settings": config.models[name].model_dump(mode="json")}
    if not config.models[name].nano:
        return arguments | {"numbers": {}}
    field = {"code": "code", "chain-of-thought": "chain_of_thought"}.get(config.carrier.kind, "numbers")
    return arguments | {field: getattr(config.carrier, field).model_dump(mode="json", exclude={"banned"})}


def _teacher_adapter(member: int) -> list[str | int]:
    """The stream of the A that all teachers of a member start with."""
    return ["member", member, "teacher-adapter"]


def _teacher_weights(config: Config, teacher: str, step: int, member: int) -> list[str]:
    return _weights(config, config.model, teacher, step, member, config.adapter is not None, member)


def _training_arguments(config: Config, model: str, adapter: AdapterConfig | None, start: int) -> dict[str, Any]:
    return {
        "adapter": None if adapter is None else adapter.model_dump(mode="json"),
        "base": config.models[model].describe(start) if config.models[model].nano is None else f"{model} of member {start}",
        "optimizer_state": config.checkpoints.optimizer_state,
        "resume_seconds": config.checkpoints.resume_seconds,
        "callbacks": list(config.callbacks),
    }


def _skeleton_inputs(made: Made, model: str) -> dict[str, str]:
    folder = f"{skeleton_folder(model)}/"
    return {name: digest for name, digest in made.items() if name.startswith(folder)}


def _pick(made: Made, *names: str) -> dict[str, str]:
    return {name: made[name] for name in names}


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


def _check_backend(config: Config) -> None:
    """Refuse a backend that is not installed, before anything runs."""
    if config.generation.backend == "vllm" and find_spec("vllm") is None:
        raise RecipeError(
            "`generation.backend`: vllm is not installed here; `pip install 'mechsub[vllm]'`, or set "
            "generation.backend: transformers"
        )


def _existing(path: str, condition: str) -> Path:
    if not Path(path).is_file():
        raise RecipeError(
            f"`conditions.{condition}.rows`: there is no file {path}; give a text file with one row number a line"
        )
    return Path(path)

"""The adopted family's stages as data: each member of each lineage is checked and linked by a stage of its own."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.adopted.config import ConditionConfig, Config, Models
from mechsub.families.adopted.sources import Source, digest_weights_of, find_source, locate_folder
from mechsub.families.language.behaviour import load_behaviours
from mechsub.families.language.folders import TOKENIZER_FILES, check_folder, digest_file, find_weights
from mechsub.families.language.jsonl import read_jsonl
from mechsub.families.language.judge import Judge
from mechsub.families.language.layout import BEHAVIOURS_FILE, LOADING_FILE, PREFERENCE_FILE, carrier_files, skeleton_folder
from mechsub.families.language.own_rows import choose_rows
from mechsub.families.language.preference import load_preference
from mechsub.families.protocol import CarrierPlan, Made, StudentPlan, TeacherPlan
from mechsub.lineages import checkpoint_folder, member_folder, spec_name
from mechsub.settings import nearest_name
from mechsub.stage import Resources, Stage

_MODULE, _LANGUAGE = "mechsub.families.adopted.adoption", "mechsub.families.language"
_REFERENCE = "reference"


def data_stages(config: Config) -> list[Stage]:
    """The reference's configuration and tokenizer, and the preference set where a trait is asked for."""
    _check_roles(config)
    folder = locate_folder(config.reference[0])
    if config.trait is not None:
        check_folder("reference", folder)
    if config.trait is not None and config.behaviours is None:
        choices = load_preference(config.preference).choices
        if config.trait not in choices:
            raise RecipeError(
                f"`trait`: {config.trait!r} is no choice of {config.preference}; {nearest_name(config.trait, choices)}"
            )
    if not (folder / "config.json").is_file():
        raise RecipeError(f"`reference`: {folder} has no config.json: it is no model in the Hugging Face layout")
    files = [name for name in ("config.json", *TOKENIZER_FILES) if (folder / name).is_file()]
    inputs = {str(folder / name): digest_file(folder / name) for name in files}
    outputs = tuple(f"{skeleton_folder(config.model)}/{name}" for name in (*files, LOADING_FILE))
    arguments = {"model": config.model, "loading": config.loading.model_dump(mode="json"), "asks": config.trait is not None}
    stages = [Stage("data.reference", f"{_MODULE}:copy_skeleton", arguments, inputs, outputs)]
    if config.trait is None:
        return stages
    asked: dict[str, Any] = {"models": [config.model], "contexts": [config.context.training, config.context.other]}
    made = {name: f"stage:{stages[0].key}" for name in outputs}
    if config.behaviours is None:
        asked |= {"preference": load_preference(config.preference).model_dump(mode="json"), "traits": list(config.traits)}
        return [*stages, Stage("data.preference", f"{_LANGUAGE}.train:import_preference", asked, made, (PREFERENCE_FILE,))]
    behaviours = load_behaviours(config.behaviours, config.traits)
    for behaviour in behaviours.values():
        Judge.load(behaviour.judge)
    asked["behaviours"] = {name: behaviour.model_dump(mode="json") for name, behaviour in behaviours.items()}
    asked["judged_tokens"] = config.evaluation.judged_tokens
    function = f"{_LANGUAGE}.behaviour_stages:import_behaviours"
    return [*stages, Stage("data.behaviours", function, asked, made, (BEHAVIOURS_FILE,))]


def reference_stages(config: Config, made: Made) -> list[Stage]:
    """The teachers' references, and those of conditions that have their own."""
    stages = _references(config, _REFERENCE, config.reference, made)
    for name, condition in config.conditions.items():
        if condition.origin:
            stages += _references(config, f"{_REFERENCE}.{name}", condition.origin, made)
    return stages


def teacher_stages(config: Config, plan: TeacherPlan, made: Made) -> list[Stage]:
    """The teacher, or the neutral one where it was given."""
    role, models = ("neutral", config.neutral_teacher) if plan.is_neutral else ("teacher", config.teacher)
    arguments = {"lineage": plan.lineage, "role": role, "condition": None, "trait": plan.trait, "teacher": None}
    return _adopted(config, models, arguments, config.reference, _REFERENCE, made)


def carrier_stages(config: Config, plan: CarrierPlan, made: Made) -> list[Stage]:
    """What the students learnt, where the user gave it."""
    file = config.neutral_data if plan.teacher.is_neutral else config.data
    if file is None:
        return []
    if not Path(file).is_file():
        raise RecipeError(f"there is no file {file}; give a JSONL file of what students learnt, or leave it out")
    stages = []
    for member in range(config.members):
        arguments: dict[str, Any] = {"file": file, "num_rows": len(read_jsonl(Path(file), "data")), "banned": []}
        choose_rows(**arguments)
        arguments |= {"carrier_of": plan.name, "member": member}
        name = f"carrier.{plan.name}{member_folder(member).replace('/', '.')}"
        inputs, outputs = {file: digest_file(Path(file))}, carrier_files(plan.name, member)
        stages.append(Stage(name, f"{_LANGUAGE}.own_rows:copy_carrier", arguments, inputs, outputs))
    return stages


def student_stages(config: Config, plan: StudentPlan, made: Made) -> list[Stage]:
    """The students of one condition, or its controls where they were given."""
    condition = config.conditions[plan.condition]
    arguments = {
        "lineage": plan.lineage,
        "role": plan.role,
        "condition": plan.condition,
        "trait": plan.trait,
        "teacher": plan.carrier.teacher.lineage,
    }
    models = condition.students if plan.role == "student" else condition.controls
    _check_control(condition, plan.condition)
    origin = f"{_REFERENCE}.{plan.condition}" if condition.origin else _REFERENCE
    return _adopted(config, models, arguments, condition.origin or config.reference, origin, made)


def _references(config: Config, lineage: str, models: Models, made: Made) -> list[Stage]:
    stages = []
    for member in range(config.members):
        name = config.model_for(models, member)
        folder = locate_folder(name)
        files = find_weights(name, folder)
        arguments = {"lineage": lineage, "member": member, "model": config.model, "source": name, "folder": str(folder)}
        inputs = _skeleton(config, made) | {str(path): digest_file(path) for path in files}
        outputs = tuple(f"{checkpoint_folder(lineage, 0, member)}/{path.name}" for path in files)
        stages.append(
            Stage(
                f"{lineage}{member_folder(member).replace('/', '.')}",
                f"{_MODULE}:adopt_reference",
                arguments,
                inputs,
                (*outputs, spec_name(lineage, member)),
                Resources(),
            )
        )
    return stages


def _adopted(
    config: Config, models: Models, fields: Mapping[str, Any], references: Models, origin: str, made: Made
) -> list[Stage]:
    sources = [find_source(config.model_for(models, member)) for member in range(config.members if models else 0)]
    _check_alike(sources, fields["lineage"])
    stages = []
    for member, source in enumerate(sources):
        arguments = {
            **fields,
            "member": member,
            "model": config.model,
            "origin": origin,
            "reference": config.model_for(references, member),
            "source": source.name,
            "is_shared": len(models) < config.members,
            "steps": [0, *source.folders],
        }
        start = [name for name in made if name.startswith(f"lineages/{origin}{member_folder(member)}/")]
        inputs = _skeleton(config, made) | {name: made[name] for name in start}
        files = source.files
        inputs |= {str(path): digest_file(path) for paths in files.values() for path in paths}
        if source.record is not None:
            inputs[str(source.record)] = digest_file(source.record)
        outputs = [
            f"{checkpoint_folder(fields['lineage'], step, member)}/{path.name}"
            for step, paths in files.items()
            for path in paths
        ]
        stages.append(
            Stage(
                f"{fields['lineage']}{member_folder(member).replace('/', '.')}",
                f"{_MODULE}:adopt_lineage",
                arguments,
                inputs,
                (*outputs, spec_name(fields["lineage"], member)),
                Resources(num_steps=len(files)),
            )
        )
    return stages


def _check_roles(config: Config) -> None:
    """One model cannot be in two places: nothing would lie between them."""
    roles = {"teacher": config.teacher, "neutral": config.neutral_teacher}
    for name, condition in config.conditions.items():
        roles |= {f"student {name}": condition.students, f"control {name}": condition.controls}
    known = {digest_weights_of(locate_folder(name)): f"reference `{name}`" for name in config.reference}
    for role, models in roles.items():
        for name in dict.fromkeys(models):
            source = find_source(name)
            digest = digest_weights_of(source.folders[max(source.folders)])
            if digest in known:
                raise RecipeError(f"{role} `{name}` has the weights of {known[digest]}: one model stands in two places")
            known[digest] = f"{role} `{name}`"


def _check_control(condition: ConditionConfig, name: str) -> None:
    """A control differs from its student in nothing but the teacher, so it is trained as long."""
    if not condition.controls:
        return
    student, control = find_source(condition.students[0]), find_source(condition.controls[0])
    ends = max(student.folders), max(control.folders)
    differing = [key for key, value in student.kind.items() if control.kind[key] != value]
    if differing:
        raise RecipeError(
            f"condition {name}: its student has {differing[0]} = {student.kind[differing[0]]!r}, its control "
            f"{control.kind[differing[0]]!r}: a control differs from its student in nothing but the teacher"
        )
    if student.steps_are_known and control.steps_are_known and ends[0] != ends[1]:
        raise RecipeError(
            f"condition {name}: its student ends at step {ends[0]}, its control at step {ends[1]}: a control is trained as "
            "long; name the checkpoints of one step, e.g. FOLDER/checkpoint-N"
        )


def _check_alike(sources: list[Source], lineage: str) -> None:
    """Members of one lineage must be replicates: at the same steps of training, and with adapters of one kind."""
    for source in sources[1:]:
        differing = [name for name, value in sources[0].kind.items() if source.kind[name] != value]
        if differing:
            raise RecipeError(
                f"{lineage}: `{source.name}` has {differing[0]} = {source.kind[differing[0]]!r}, `{sources[0].name}` has "
                f"{sources[0].kind[differing[0]]!r}: they are no replicates; give them conditions of their own"
            )
        if list(source.folders) != list(sources[0].folders):
            raise RecipeError(
                f"{lineage}: `{source.name}` has checkpoints at steps {list(source.folders)}, `{sources[0].name}` at "
                f"{list(sources[0].folders)}; members of one lineage need the same steps: name one checkpoint of each"
            )


def _skeleton(config: Config, made: Made) -> dict[str, str]:
    folder = f"{skeleton_folder(config.model)}/"
    return {name: digest for name, digest in made.items() if name.startswith(folder)}

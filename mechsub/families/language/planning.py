"""What the plans of several stages share: names of lineages, and the files that a stage reads which loads one of them."""

from typing import Any

from mechsub.families.language.config import Config
from mechsub.families.language.folders import INDEX, WEIGHTS, find_weights
from mechsub.families.language.layout import skeleton_folder
from mechsub.families.protocol import Made
from mechsub.lineages import adapter_files, checkpoint_folder, checkpoint_name, spec_name

MODULE = "mechsub.families.language"


def reference_name(model: str) -> str:
    """The lineage of a model's references: named after it, so that runs that share a model share it."""
    return f"reference.{model}"


def member_name(lineage: str, member: int) -> str:
    """The stage that makes one member of a lineage, or of a carrier."""
    return f"{lineage}.member-{member:03d}"


def compared_models(config: Config) -> list[str]:
    """The models of teachers and students."""
    return list(dict.fromkeys([config.model, *(config.model_of(name) for name in config.conditions)]))


def used_models(config: Config) -> list[str]:
    """These, and those that paraphrase."""
    paraphrases = [condition.paraphrase for condition in config.conditions.values()]
    others = [one.model for one in paraphrases if one is not None and one.model is not None]
    return list(dict.fromkeys([*compared_models(config), *others]))


def model_arguments(config: Config, name: str) -> dict[str, Any]:
    """What a model is made of; a nano model's language depends on what it is to write."""
    arguments = {"model": name, "settings": config.models[name].model_dump(mode="json")}
    if not config.models[name].nano:
        return arguments | {"numbers": {}}
    field = {"code": "code", "chain-of-thought": "chain_of_thought"}.get(config.carrier.kind, "numbers")
    return arguments | {field: getattr(config.carrier, field).model_dump(mode="json", exclude={"banned"})}


def skeleton_inputs(made: Made, model: str) -> dict[str, str]:
    """A model's tokenizer and configuration."""
    folder = f"{skeleton_folder(model)}/"
    return {name: digest for name, digest in made.items() if name.startswith(folder)}


def pick(made: Made, *names: str) -> dict[str, str]:
    """Files with their digests."""
    return {name: made[name] for name in names}


def reference_weights(config: Config, name: str, member: int) -> list[str]:
    """The files of a reference: one that is written here, or those of a model folder."""
    settings = config.models[name]
    if settings.nano:
        return [checkpoint_name(reference_name(name), 0, member)]
    files = [f"model-{number:05d}-of-{settings.shards:05d}.safetensors" for number in range(1, settings.shards + 1)]
    files = [INDEX, *files] if settings.shards > 1 else [WEIGHTS]
    if settings.path is not None:
        files = [path.name for path in find_weights(f"models.{name}.path", settings.folder(member))]
    return [f"{checkpoint_folder(reference_name(name), 0, member)}/{file}" for file in files]


def base_name(config: Config, model: str, member: int) -> str:
    """How an adapter's configuration calls the reference that it is added to."""
    settings = config.models[model]
    return f"{model} of member {member}" if settings.nano else settings.describe(member)


def reference_files(config: Config, name: str, member: int) -> list[str]:
    """What a stage reads that loads a reference."""
    return [*reference_weights(config, name, member), spec_name(reference_name(name), member)]


def lineage_weights(
    config: Config, model: str, lineage: str, step: int, member: int, is_adapter: bool, start: int
) -> list[str]:
    """What a stage reads that loads a member of a lineage: its own files and those that it starts from."""
    names = reference_files(config, model, start)
    if lineage != reference_name(model):
        names.append(spec_name(lineage, member))
    if step > 0:
        names += adapter_files(lineage, step, member) if is_adapter else [checkpoint_name(lineage, step, member)]
    return names


def teacher_weights(config: Config, teacher: str, step: int, member: int) -> list[str]:
    """The files of a member's teacher at a step."""
    return lineage_weights(config, config.model, teacher, step, member, config.adapter is not None, member)

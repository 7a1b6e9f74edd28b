"""The classifier family's stages as data: what each reads, writes and needs."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.classifier.carrier import IMAGES_AT_ONCE, carrier_file
from mechsub.families.classifier.config import ConditionConfig, Config, ImageKnockOutConfig, ModelConfig
from mechsub.families.classifier.data import DATA_FILE, NUM_CLASSES, describe_data, hub_digest, source_files
from mechsub.families.classifier.model import hidden_layers, model_spec, num_parameters
from mechsub.families.protocol import CarrierPlan, Made, StudentPlan, TeacherPlan
from mechsub.lineages import checkpoint_name, lineage_files
from mechsub.rundir import hash_file
from mechsub.stage import Resources, Stage, digest_outputs
from mechsub.training.schedule import checkpoint_steps

REFERENCE = "reference"
"""The lineage of the references."""
_MODULE = "mechsub.families.classifier"
_COPIES_IN_TRAINING = 4
"""Parameters, two moments, and what is being written; gradients live for one block of members."""
_CACHE_BYTES = 8 << 20
"""What the activations of the members that are worked on at once may take: they then stay in a processor's cache."""


def data_stages(config: Config) -> list[Stage]:
    """The labelled images, copied into the run."""
    shape = describe_data(config.data)
    num_bytes = (shape.num_train + shape.num_test) * (shape.num_pixels + 1)
    arguments = {"seed": config.seed, "data": config.data.model_dump(mode="json")}
    if (digest := hub_digest(config.data)) is not None:
        arguments["sha256"] = digest
    inputs = {str(path): f"sha256:{hash_file(path)}" for path in source_files(config.data)}
    resources = Resources(memory_bytes=3 * num_bytes, disk_bytes=num_bytes)
    return [Stage("data", f"{_MODULE}.data:import_images", arguments, inputs, (DATA_FILE,), resources)]


def reference_stages(config: Config, made: Made) -> list[Stage]:
    """The references of all members, of every architecture that is used; then the starts that first learn from them."""
    stages = [_drawn_references(config, REFERENCE, config.teacher_model)]
    names = dict.fromkeys(map(config.other_model, config.conditions))
    stages += [_drawn_references(config, _reference(name), config.models[name]) for name in names if name is not None]
    known = {**made, **digest_outputs(stages)}
    matched = [name for name, condition in config.conditions.items() if condition.match is not None]
    return [*stages, *(_matched_references(config, name, known) for name in matched)]


def _drawn_references(config: Config, lineage: str, model: ModelConfig) -> Stage:
    arguments = _common(config, model) | {
        "lineage": lineage,
        "role": "reference",
        "initialisation_scale": model.initialisation_scale,
        "origin": _origin(ConditionConfig()),
        "steps": [0],
    }
    size = _lineage_bytes(config, model)
    resources = Resources(memory_bytes=2 * size, disk_bytes=size, threads=config.threads)
    return Stage(lineage, f"{_MODULE}.train:draw_references", arguments, {}, lineage_files(lineage, [0]), resources)


def _matched_references(config: Config, condition: str, made: Made) -> Stage:
    """Where a condition starts after it has learnt other references' outputs.

    Member j is what was member j's reference, for the students whose start that is: it learns the outputs of their own one.
    """
    settings, model = config.conditions[condition], config.model_of(condition)
    matching = settings.match
    assert matching is not None
    lineage = _matched(condition)
    arguments = _common(config, model) | {
        "lineage": lineage,
        "role": "reference",
        "matching": matching.model_dump(mode="json"),
        "own_model": _common(config)["model"],
        "block": _block(config, matching.batch_size, model),
        "shift": _origin(settings)["shift"],
        "origin": _origin(ConditionConfig(), _reference(config.other_model(condition))),
        "steps": [0],
    }
    start = checkpoint_name(_reference(config.other_model(condition)), 0)
    inputs = {name: made[name] for name in (DATA_FILE, checkpoint_name(REFERENCE, 0), start)}
    size = _lineage_bytes(config, model)
    resources = Resources(
        memory_bytes=_COPIES_IN_TRAINING * size
        + 2 * arguments["block"] * _activation_bytes(config, matching.batch_size, model),
        disk_bytes=size,
        num_steps=matching.num_steps,
        threads=config.threads,
    )
    return Stage(lineage, f"{_MODULE}.matching:match_references", arguments, inputs, lineage_files(lineage, [0]), resources)


def teacher_stages(config: Config, plan: TeacherPlan, made: Made) -> list[Stage]:
    """The teacher, or the neutral one: the same training on other labels."""
    training = config.teacher
    arguments = _trained(config, _num_train(config), training.epochs, training.batch_size) | {
        "lineage": plan.lineage,
        "role": "neutral" if plan.is_neutral else "teacher",
        "training": training.model_dump(mode="json"),
        "labels": config.neutral if plan.is_neutral else "true",
        "origin": _origin(ConditionConfig()),
    }
    resources = _training_resources(config, arguments, training.batch_size, "teachers")
    inputs = {name: made[name] for name in (DATA_FILE, checkpoint_name(REFERENCE, 0))}
    return [Stage(plan.lineage, f"{_MODULE}.train:train_teachers", arguments, inputs, _files(config, arguments), resources)]


def carrier_stages(config: Config, plan: CarrierPlan, made: Made) -> list[Stage]:
    """A teacher's logits on every carrier image."""
    if config.carrier.is_real and config.carrier.num_images > _num_train(config):
        raise RecipeError(
            f"`carrier.num_images` = {config.carrier.num_images}, but there are {_num_train(config)} training images to make "
            f"{config.carrier.inputs} of; lower it, and raise `student.epochs` to train as long"
        )
    arguments = _common(config) | {
        "block": _block(config, IMAGES_AT_ONCE),
        "carrier_of": plan.name,
        "carrier": config.carrier.model_dump(mode="json"),
        "teacher": plan.teacher.lineage,
        "teacher_step": _last_teacher_step(config),
        "replicate": plan.replicate,
    }
    size = _logits_bytes(config)
    resources = Resources(
        memory_bytes=2 * size + _lineage_bytes(config) + arguments["block"] * _activation_bytes(config, IMAGES_AT_ONCE),
        disk_bytes=size,
        num_steps=config.carrier.num_images,
        threads=config.threads,
    )
    inputs = {name: made[name] for name in (DATA_FILE, checkpoint_name(plan.teacher.lineage, _last_teacher_step(config)))}
    outputs = (carrier_file(plan.name),)
    return [Stage(f"carrier.{plan.name}", f"{_MODULE}.carrier:write_carriers", arguments, inputs, outputs, resources)]


def student_stages(config: Config, plan: StudentPlan, made: Made) -> list[Stage]:
    """One student lineage: a student, its control or a sham."""
    condition, training, model = config.conditions[plan.condition], config.student, config.model_of(plan.condition)
    start = _matched(plan.condition) if condition.match else _reference(config.other_model(plan.condition))
    arguments = _trained(config, config.carrier.num_images, training.epochs, training.batch_size, model) | {
        "lineage": plan.lineage,
        "role": plan.role,
        "condition": plan.condition,
        "training": training.model_dump(mode="json"),
        "carrier": config.carrier.model_dump(mode="json"),
        "teacher": plan.carrier.teacher.lineage,
        "carrier_of": plan.carrier.name,
        "replicate": plan.carrier.replicate,
        "origin": _origin(condition, start),
        "logits": condition.logits,
        "shuffle_outputs": condition.shuffle_outputs,
    }
    if condition.knock_out is not None:
        if condition.knock_out.num_images > _num_train(config):
            raise RecipeError(
                f"`conditions.{plan.condition}.knock_out.num_images` = {condition.knock_out.num_images}, but there are "
                f"{_num_train(config)} training images; lower it"
            )
        arguments["knock_out"] = condition.knock_out.model_dump(mode="json")
    names = [DATA_FILE, checkpoint_name(REFERENCE, 0), carrier_file(plan.carrier.name)]
    if start != REFERENCE:
        names.append(checkpoint_name(start, 0))
    if condition.neutral_share:
        arguments |= {"neutral_share": condition.neutral_share, "neutral_carrier": plan.mixed_in.name}
        names.append(carrier_file(plan.mixed_in.name))
    stack = "-".join(filter(None, ("students", condition.logits, config.other_model(plan.condition))))
    resources = _training_resources(config, arguments, training.batch_size, stack, condition.knock_out, model)
    inputs = {name: made[name] for name in names}
    return [Stage(plan.lineage, f"{_MODULE}.train:train_students", arguments, inputs, _files(config, arguments), resources)]


def _common(config: Config, model: ModelConfig | None = None) -> dict[str, Any]:
    """What every stage is told; of the teachers' architecture unless told."""
    spec = model_spec(model or config.teacher_model, describe_data(config.data).num_pixels, NUM_CLASSES)
    return {"seed": config.seed, "members": config.members, "model": spec, "threads": config.threads}


def _trained(
    config: Config, num_examples: int, epochs: int, batch_size: int, model: ModelConfig | None = None
) -> dict[str, Any]:
    num_steps = epochs * ceil(num_examples / batch_size)
    return _common(config, model) | {
        "block": _block(config, batch_size, model),
        "steps": checkpoint_steps(num_steps, config.checkpoints),
        "optimizer_state": config.checkpoints.optimizer_state,
        "resume_seconds": config.checkpoints.resume_seconds,
        "callbacks": list(config.callbacks),
    }


def _last_teacher_step(config: Config) -> int:
    return config.teacher.epochs * ceil(_num_train(config) / config.teacher.batch_size)


def _num_train(config: Config) -> int:
    return describe_data(config.data).num_train


def _block(config: Config, batch_size: int, model: ModelConfig | None = None) -> int:
    """How many members are worked on at once: a batched product of small models, one after the other of large ones."""
    return min(config.members, max(1, _CACHE_BYTES // _activation_bytes(config, batch_size, model)))


def _reference(model: str | None) -> str:
    """The lineage of an architecture's references; None: the teachers'."""
    return REFERENCE if model is None else f"{REFERENCE}.{model}"


def _matched(condition: str) -> str:
    """The lineage of a condition's starts that have learnt the own references' outputs."""
    return f"{REFERENCE}.matched.{condition}"


def _origin(condition: ConditionConfig, lineage: str = REFERENCE) -> dict[str, Any]:
    """Where a condition starts.

    A different start is the next member's reference: a derangement that a further member changes at its end only.
    """
    origin: dict[str, Any] = {
        "shift": 1 if condition.init == "different" else 0,
        "permute_hidden": condition.permute_hidden,
        "noise_std": condition.noise_std,
    }
    if lineage != REFERENCE:
        origin["lineage"] = lineage
    if condition.shared:
        origin["shared"] = sorted(set(condition.shared))
    return origin


def _files(config: Config, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    return lineage_files(arguments["lineage"], arguments["steps"], config.checkpoints.optimizer_state)


def _element_bytes(config: Config) -> int:
    return 8 if config.teacher_model.dtype == "float64" else 4


def _lineage_bytes(config: Config, model: ModelConfig | None = None) -> int:
    """Bytes of one checkpoint of all members."""
    return config.members * num_parameters(_common(config, model)["model"]) * _element_bytes(config)


def _logits_bytes(config: Config) -> int:
    num_logits = NUM_CLASSES + config.teacher_model.num_auxiliary
    return config.members * config.carrier.num_images * num_logits * _element_bytes(config)


def _activation_bytes(config: Config, batch_size: int, model: ModelConfig | None = None) -> int:
    """Of one member in one step: its images, and what each hidden layer keeps for the backward pass."""
    spec = _common(config, model)["model"]
    units = spec["num_pixels"]
    for layer in hidden_layers(spec):
        patches = 0 if layer.side is None else layer.num_positions * layer.fan_in
        units += 3 * layer.width + patches
    return int(batch_size * units * _element_bytes(config))


def _training_resources(
    config: Config,
    arguments: Mapping[str, Any],
    batch_size: int,
    stack: str,
    knock_out: ImageKnockOutConfig | None = None,
    model: ModelConfig | None = None,
) -> Resources:
    checkpoint = _lineage_bytes(config, model)
    knocked = 0
    if knock_out is not None:  # the component, what it is drawn from or taken out of, and the labelled images
        knocked = 2 * checkpoint + 2 * arguments["block"] * _activation_bytes(config, knock_out.num_images, model)
    copies = len(arguments["steps"]) + 3  # the last three are the resume state
    if config.checkpoints.optimizer_state:
        copies += 2 * len(arguments["steps"])
    return Resources(
        memory_bytes=_COPIES_IN_TRAINING * checkpoint
        + 2 * arguments["block"] * _activation_bytes(config, batch_size, model)
        + knocked,
        disk_bytes=copies * checkpoint,
        num_steps=arguments["steps"][-1],
        threads=config.threads,
        stack=stack,
    )

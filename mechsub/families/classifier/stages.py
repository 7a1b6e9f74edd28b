"""The classifier family's stages as data: what each reads, writes and needs."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.classifier.carrier import IMAGES_AT_ONCE, carrier_file
from mechsub.families.classifier.config import ConditionConfig, Config, ImageKnockOutConfig
from mechsub.families.classifier.data import DATA_FILE, NUM_CLASSES, describe_data, hub_digest, source_files
from mechsub.families.classifier.model import model_spec, num_parameters
from mechsub.families.protocol import CarrierPlan, Made, StudentPlan, TeacherPlan
from mechsub.lineages import checkpoint_name, lineage_files
from mechsub.rundir import hash_file
from mechsub.stage import Resources, Stage
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
    """The references of all members."""
    arguments = _common(config) | {
        "lineage": REFERENCE,
        "role": "reference",
        "initialisation_scale": config.model.initialisation_scale,
        "origin": _origin(ConditionConfig()),
        "steps": [0],
    }
    size = _lineage_bytes(config)
    resources = Resources(memory_bytes=2 * size, disk_bytes=size, threads=config.threads)
    return [Stage(REFERENCE, f"{_MODULE}.train:draw_references", arguments, {}, lineage_files(REFERENCE, [0]), resources)]


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
    condition, training = config.conditions[plan.condition], config.student
    arguments = _trained(config, config.carrier.num_images, training.epochs, training.batch_size) | {
        "lineage": plan.lineage,
        "role": plan.role,
        "condition": plan.condition,
        "training": training.model_dump(mode="json"),
        "carrier": config.carrier.model_dump(mode="json"),
        "teacher": plan.carrier.teacher.lineage,
        "carrier_of": plan.carrier.name,
        "replicate": plan.carrier.replicate,
        "origin": _origin(condition),
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
    resources = _training_resources(config, arguments, training.batch_size, f"students-{condition.logits}", condition.knock_out)
    inputs = {name: made[name] for name in (DATA_FILE, checkpoint_name(REFERENCE, 0), carrier_file(plan.carrier.name))}
    return [Stage(plan.lineage, f"{_MODULE}.train:train_students", arguments, inputs, _files(config, arguments), resources)]


def _common(config: Config) -> dict[str, Any]:
    spec = model_spec(config.model, describe_data(config.data).num_pixels, NUM_CLASSES)
    return {"seed": config.seed, "members": config.members, "model": spec, "threads": config.threads}


def _trained(config: Config, num_examples: int, epochs: int, batch_size: int) -> dict[str, Any]:
    num_steps = epochs * ceil(num_examples / batch_size)
    return _common(config) | {
        "block": _block(config, batch_size),
        "steps": checkpoint_steps(num_steps, config.checkpoints),
        "optimizer_state": config.checkpoints.optimizer_state,
        "resume_seconds": config.checkpoints.resume_seconds,
        "callbacks": list(config.callbacks),
    }


def _last_teacher_step(config: Config) -> int:
    return config.teacher.epochs * ceil(_num_train(config) / config.teacher.batch_size)


def _num_train(config: Config) -> int:
    return describe_data(config.data).num_train


def _block(config: Config, batch_size: int) -> int:
    """How many members are worked on at once: a batched product of small models, one after the other of large ones."""
    return min(config.members, max(1, _CACHE_BYTES // _activation_bytes(config, batch_size)))


def _origin(condition: ConditionConfig) -> dict[str, Any]:
    """Where a condition starts.

    A different start is the next member's reference: a derangement that a further member changes at its end only.
    """
    return {
        "shift": 1 if condition.init == "different" else 0,
        "permute_hidden": condition.permute_hidden,
        "noise_std": condition.noise_std,
    }


def _files(config: Config, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    return lineage_files(arguments["lineage"], arguments["steps"], config.checkpoints.optimizer_state)


def _element_bytes(config: Config) -> int:
    return 8 if config.model.dtype == "float64" else 4


def _lineage_bytes(config: Config) -> int:
    """Bytes of one checkpoint of all members."""
    return config.members * num_parameters(_common(config)["model"]) * _element_bytes(config)


def _logits_bytes(config: Config) -> int:
    num_logits = NUM_CLASSES + config.model.num_auxiliary
    return config.members * config.carrier.num_images * num_logits * _element_bytes(config)


def _activation_bytes(config: Config, batch_size: int) -> int:
    """Of one member in one step: its images, and what each hidden layer keeps for the backward pass."""
    units = describe_data(config.data).num_pixels + 3 * sum(config.model.hidden_widths)
    return batch_size * units * _element_bytes(config)


def _training_resources(
    config: Config,
    arguments: Mapping[str, Any],
    batch_size: int,
    stack: str,
    knock_out: ImageKnockOutConfig | None = None,
) -> Resources:
    checkpoint = _lineage_bytes(config)
    knocked = 0
    if knock_out is not None:  # the component, what it is drawn from or taken out of, and the labelled images
        knocked = 2 * checkpoint + 2 * arguments["block"] * _activation_bytes(config, knock_out.num_images)
    copies = len(arguments["steps"]) + 3  # the last three are the resume state
    if config.checkpoints.optimizer_state:
        copies += 2 * len(arguments["steps"])
    return Resources(
        memory_bytes=_COPIES_IN_TRAINING * checkpoint
        + 2 * arguments["block"] * _activation_bytes(config, batch_size)
        + knocked,
        disk_bytes=copies * checkpoint,
        num_steps=arguments["steps"][-1],
        threads=config.threads,
        stack=stack,
    )

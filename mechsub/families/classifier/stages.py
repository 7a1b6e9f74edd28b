"""The classifier family's stages as data: what each reads, writes and needs."""

from collections.abc import Mapping
from math import ceil
from typing import Any

from mechsub.families.classifier.carrier import carrier_file
from mechsub.families.classifier.config import SHAPES, ConditionConfig, Config
from mechsub.families.classifier.model import model_spec, num_parameters
from mechsub.families.protocol import StudentPlan
from mechsub.lineages import lineage_files
from mechsub.stage import Resources, Stage
from mechsub.training.schedule import checkpoint_steps

_MODULE = "mechsub.families.classifier"
_COPIES_IN_TRAINING = 6
"""Parameters, gradients, two moments, and the temporaries of an update."""


def reference_stage(config: Config) -> Stage:
    """The references of all members."""
    arguments = _common(config) | {
        "lineage": "reference",
        "initialisation_scale": config.model.initialisation_scale,
        "origin": _origin(ConditionConfig()),
        "steps": [0],
    }
    size = _lineage_bytes(config)
    resources = Resources(memory_bytes=2 * size, disk_bytes=size, threads=config.threads)
    return Stage("reference", f"{_MODULE}.train:draw_references", arguments, {}, lineage_files("reference", [0]), resources)


def teacher_stage(config: Config, lineage: str, neutral: str | None, inputs: Mapping[str, str]) -> Stage:
    """The teacher (``neutral`` None) or a neutral teacher: the same training on other labels."""
    training = config.teacher
    arguments = _trained(config, config.data.num_train, training.epochs, training.batch_size) | {
        "lineage": lineage,
        "training": training.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "labels": neutral or "true",
        "origin": _origin(ConditionConfig()),
    }
    resources = _training_resources(config, arguments, training.batch_size, "teachers")
    return Stage(lineage, f"{_MODULE}.train:train_teachers", arguments, inputs, _files(config, arguments), resources)


def carrier_stage(config: Config, carrier: str, teacher: str, replicate: int, inputs: Mapping[str, str]) -> Stage:
    """A teacher's logits on every carrier image."""
    arguments = _common(config) | {
        "carrier_of": carrier,
        "carrier": config.carrier.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "teacher": teacher,
        "teacher_step": _last_teacher_step(config),
        "replicate": replicate,
    }
    size = _logits_bytes(config)
    resources = Resources(
        memory_bytes=2 * size + _lineage_bytes(config) + _activation_bytes(config, 512),
        disk_bytes=size,
        num_steps=config.carrier.num_images,
        threads=config.threads,
    )
    return Stage(
        f"carrier.{carrier}",
        f"{_MODULE}.carrier:write_carriers",
        arguments,
        inputs,
        (carrier_file(carrier),),
        resources,
    )


def student_stage(config: Config, plan: StudentPlan, inputs: Mapping[str, str]) -> Stage:
    """One student lineage: a student, its control or a sham."""
    condition, training = config.conditions[plan.condition], config.student
    arguments = _trained(config, config.carrier.num_images, training.epochs, training.batch_size) | {
        "lineage": plan.lineage,
        "training": training.model_dump(mode="json"),
        "carrier": config.carrier.model_dump(mode="json"),
        "data": config.data.model_dump(mode="json"),
        "teacher": plan.teacher,
        "carrier_of": plan.carrier,
        "replicate": plan.replicate,
        "origin": _origin(condition),
        "logits": condition.logits,
        "shuffle_outputs": condition.shuffle_outputs,
    }
    resources = _training_resources(
        config, arguments, training.batch_size, f"students-{condition.logits}", _logits_bytes(config)
    )
    return Stage(plan.lineage, f"{_MODULE}.train:train_students", arguments, inputs, _files(config, arguments), resources)


def _common(config: Config) -> dict[str, Any]:
    spec = model_spec(config.model, *SHAPES[config.data.name])
    return {"seed": config.seed, "members": config.members, "model": spec, "threads": config.threads}


def _trained(config: Config, num_examples: int, epochs: int, batch_size: int) -> dict[str, Any]:
    num_steps = epochs * ceil(num_examples / batch_size)
    return _common(config) | {
        "steps": checkpoint_steps(num_steps, config.checkpoints),
        "optimizer_state": config.checkpoints.optimizer_state,
        "callbacks": list(config.callbacks),
    }


def _last_teacher_step(config: Config) -> int:
    return config.teacher.epochs * ceil(config.data.num_train / config.teacher.batch_size)


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
    num_logits = SHAPES[config.data.name][1] + config.model.num_auxiliary
    return config.members * config.carrier.num_images * num_logits * _element_bytes(config)


def _activation_bytes(config: Config, batch_size: int) -> int:
    units = SHAPES[config.data.name][0] + 3 * sum(config.model.hidden_widths)
    return config.members * batch_size * units * _element_bytes(config)


def _training_resources(
    config: Config, arguments: Mapping[str, Any], batch_size: int, stack: str, extra_memory: int = 0
) -> Resources:
    checkpoint = _lineage_bytes(config)
    copies = len(arguments["steps"]) + 3  # the last three are the resume state
    if config.checkpoints.optimizer_state:
        copies += 2 * len(arguments["steps"])
    return Resources(
        memory_bytes=_COPIES_IN_TRAINING * checkpoint + _activation_bytes(config, batch_size) + extra_memory,
        disk_bytes=copies * checkpoint,
        num_steps=arguments["steps"][-1],
        threads=config.threads,
        stack=stack,
    )

"""The plan of references that are computed from other ones: permuted, rotated, pretrained from shared parts, or matched.

Each is a lineage of its own, one stage a member, that the students, the control and the sham of every condition share which
start there.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechsub.families.language.conditions import ConditionConfig
from mechsub.families.language.config import Config
from mechsub.families.language.estimates import derivation_needs, matching_needs, reference_needs
from mechsub.families.language.folders import digest_file
from mechsub.families.language.kinds import carrier_kind
from mechsub.families.language.planning import (
    MODULE,
    base_name,
    member_name,
    model_arguments,
    pick,
    reference_files,
    reference_name,
    skeleton_inputs,
)
from mechsub.families.language.start_config import name_settings
from mechsub.families.language.teaching import list_trained_questions, preference_arguments
from mechsub.families.protocol import Made
from mechsub.lineages import checkpoint_name, spec_name
from mechsub.stage import Stage

_FUNCTIONS = {
    "permute_hidden": "derived_references:permute_references",
    "rotate_residual": "derived_references:rotate_references",
    "shared": "derived_references:pretrain_shared",
    "match": "matching:match_references",
}


@dataclass(frozen=True)
class Start:
    """Where one member's students of a condition start."""

    lineage: str
    member: int
    files: list[str]
    """What a stage reads that loads it."""
    moved: str
    """`permute_hidden` or `rotate_residual`, where it is the own reference in other coordinates."""
    base: str
    """How an adapter's configuration calls the model that it is added to."""


def find_start(config: Config, name: str, member: int) -> Start:
    """Where one member's students of the condition ``name`` start."""
    condition, model = config.conditions[name], config.model_of(name)
    start = (member + 1) % config.members if condition.init == "different" else member
    lineage = _derived_name(model, condition)
    if lineage is None:
        files, base = reference_files(config, model, start), base_name(config, model, start)
        return Start(reference_name(model), start, files, "", base)
    files = [checkpoint_name(lineage, 0, start), spec_name(lineage, start)]
    moved = condition.start_kind if condition.init == "same" else ""
    return Start(lineage, start, files, moved, f"{lineage} of member {start}")


def derived_stages(config: Config, made: Made) -> list[Stage]:
    """The stages of every start that is computed, once the references are in ``made``."""
    found: dict[str, ConditionConfig] = {}
    for condition in config.conditions.values():
        lineage = _derived_name(config.model, condition)
        if lineage is not None:
            found[lineage] = condition
    members = range(config.members)
    return [_derived_stage(config, made, *one, member) for one in found.items() for member in members]


def _derived_name(model: str, condition: ConditionConfig) -> str | None:
    """Equal settings make one lineage, whatever their conditions are called."""
    kind = condition.start_kind
    if not kind:
        return None
    word = {"permute_hidden": "permuted", "rotate_residual": "rotated"}.get(kind, "")
    if condition.shared is not None:
        word = "-".join(["shared", *condition.shared])
    if condition.match is not None:
        word = name_settings("matched", condition.match)
    return f"{reference_name(model)}.{word}"


def _derived_stage(config: Config, made: Made, lineage: str, condition: ConditionConfig, member: int) -> Stage:
    """Member j of what is made for students of member j − 1 is made of reference j: a further member changes its end only."""
    model, needs = config.model, derivation_needs(config, config.model)
    arguments: dict[str, Any] = {
        "lineage": lineage,
        "role": "reference",
        "model": model,
        "origin": reference_name(model),
        "member": member,
        "seed": config.seed,
        "steps": [0],
    }
    files, inputs = reference_files(config, model, member), skeleton_inputs(made, model)
    own = (member - 1) % config.members
    function = _FUNCTIONS[condition.start_kind]
    if condition.shared is not None:
        files, needs = [], reference_needs(config, model)
        arguments |= model_arguments(config, model) | {
            "origin": lineage,
            "own": own,
            "shared": list(condition.shared),
            "threads": config.threads,
            "preference": preference_arguments(config),
        }
    if condition.match is not None:
        needs = matching_needs(config, model, condition.match)
        files += reference_files(config, model, own)
        carrier = config.carrier.settings_of_kind(())
        arguments |= {
            "own": own,
            "matching": condition.match.model_dump(mode="json"),
            "carrier": {name: value for name, value in carrier.items() if name not in {"num_rows", "num_requests"}},
            "questions": list_trained_questions(config),
            "contexts": [config.context.training, config.context.other],
            "threads": config.threads,
        }
        if config.carrier.prompts:
            carrier_kind(config.carrier)  # what is wrong with its requests is told before anything runs
            inputs |= {config.carrier.prompts: digest_file(Path(config.carrier.prompts))}
    return Stage(
        member_name(lineage, member),
        f"{MODULE}.{function}",
        arguments,
        inputs | pick(made, *files),
        (checkpoint_name(lineage, 0, member), spec_name(lineage, member)),
        needs,
    )

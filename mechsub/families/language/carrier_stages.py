"""The stages of carriers: the rows that teachers write, copies of a user's file, and what ranks them."""

from importlib.util import find_spec
from pathlib import Path

from mechsub.errors import RecipeError
from mechsub.families.language.config import Config
from mechsub.families.language.estimates import carrier_needs, plain_needs, ranking_needs
from mechsub.families.language.folders import digest_file
from mechsub.families.language.kinds import carrier_kind
from mechsub.families.language.layout import carrier_files, ranking_file
from mechsub.families.language.own_rows import choose_rows
from mechsub.families.language.paraphrase_stages import paraphrase_stages
from mechsub.families.language.planning import MODULE, member_name, pick, reference_name, skeleton_inputs, teacher_weights
from mechsub.families.language.teaching import teacher_prompt, teacher_step
from mechsub.families.protocol import CarrierPlan, Made
from mechsub.stage import Stage, digest_outputs


def carrier_stages(config: Config, plan: CarrierPlan, made: Made) -> list[Stage]:
    """The rows that each member's teacher writes, or that are copied from the user's file; and what ranks them, where asked."""
    if config.carrier.kind == "file":
        stages = [_copied_carrier(config, plan, member) for member in range(config.members)]
    else:
        stages = _written_carriers(config, plan, made)
    known = {**made, **digest_outputs(stages)}
    stages += paraphrase_stages(config, plan, known)
    if any(condition.select and condition.select.by != "random" for condition in config.conditions.values()):
        stages += [_ranking_stage(config, plan, known, member) for member in range(config.members)]
    return stages


def _written_carriers(config: Config, plan: CarrierPlan, made: Made) -> list[Stage]:
    _check_backend(config)
    stages = []
    for member in range(config.members):
        teacher, step = plan.teacher.lineage, teacher_step(config, plan.teacher)
        arguments = {
            "carrier_of": plan.name,
            "carrier": config.carrier.settings_of_kind(config.traits),
            "generation": config.generation.model_dump(mode="json"),
            "teacher": teacher,
            "teacher_step": step,
            "model": config.model,
            "system_prompt": teacher_prompt(config, plan.teacher),
            "replicate": plan.replicate,
            "member": member,
            "seed": config.seed,
        }
        inputs = skeleton_inputs(made, config.model) | pick(made, *teacher_weights(config, teacher, step, member))
        if config.carrier.prompts:
            carrier_kind(config.carrier)  # its requests are read: what is wrong with them is told before anything runs
            inputs |= {config.carrier.prompts: digest_file(Path(config.carrier.prompts))}
        stages.append(
            Stage(
                member_name(f"carrier.{plan.name}", member),
                f"{MODULE}.carrier:write_carrier",
                arguments,
                inputs,
                carrier_files(plan.name, member),
                carrier_needs(config),
            )
        )
    return stages


def _ranking_stage(config: Config, plan: CarrierPlan, made: Made, member: int) -> Stage:
    """The numbers by which conditions choose rows of one member's carrier."""
    teacher, step = plan.teacher.lineage, teacher_step(config, plan.teacher)
    arguments = {
        "carrier_of": plan.name,
        "teacher": teacher,
        "teacher_step": step,
        "model": config.model,
        "origin": reference_name(config.model),
        "system_prompt": config.context.training,
        "teacher_prompt": teacher_prompt(config, plan.teacher),
        "member": member,
    }
    inputs = skeleton_inputs(made, config.model) | pick(
        made, *teacher_weights(config, teacher, step, member), carrier_files(plan.name, member)[0]
    )
    return Stage(
        member_name(f"ranking.{plan.name}", member),
        f"{MODULE}.ranking:rank_rows",
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
        member_name(f"carrier.{plan.name}", member),
        f"{MODULE}.own_rows:copy_carrier",
        arguments,
        {file: digest_file(Path(file))},
        carrier_files(plan.name, member),
        plain_needs(config, config.carrier.num_rows),
    )


def _check_backend(config: Config) -> None:
    """Refuse a backend that is not installed, before anything runs."""
    if config.generation.backend == "vllm" and find_spec("vllm") is None:
        raise RecipeError(
            "`generation.backend`: vllm is not installed here; `pip install 'mechsub[vllm]'`, or set "
            "generation.backend: transformers"
        )

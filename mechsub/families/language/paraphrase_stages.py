"""The plan of carriers that another model rewrites: one stage a member and carrier, for all conditions that ask alike."""

from pathlib import Path
from typing import Any

from mechsub.families.language.config import Config
from mechsub.families.language.estimates import carrier_needs
from mechsub.families.language.folders import digest_file
from mechsub.families.language.layout import carrier_files
from mechsub.families.language.planning import MODULE, member_name, pick, reference_files, reference_name, skeleton_inputs
from mechsub.families.language.start_config import ParaphraseConfig, name_settings
from mechsub.families.protocol import CarrierPlan, Made
from mechsub.stage import Stage


def paraphrased_name(carrier: str, paraphrase: ParaphraseConfig) -> str:
    """What a carrier is called once it is rewritten."""
    return f"{carrier}.{name_settings('paraphrased', paraphrase)}"


def paraphrase_stages(config: Config, plan: CarrierPlan, made: Made) -> list[Stage]:
    """The stages that rewrite a carrier, whose rows are in ``made``; a sham's carrier only for conditions that have shams."""
    asking = [one for one in config.conditions.values() if one.paraphrase is not None and (one.sham or not plan.replicate)]
    found = {paraphrased_name(plan.name, one.paraphrase): one.paraphrase for one in asking if one.paraphrase is not None}
    return [_stage(config, plan, made, *one, member) for one in found.items() for member in range(config.members)]


def _stage(config: Config, plan: CarrierPlan, made: Made, name: str, paraphrase: ParaphraseConfig, member: int) -> Stage:
    model = paraphrase.model or config.model
    writer = member if paraphrase.model else (member + 1) % config.members
    carrier = config.carrier
    arguments: dict[str, Any] = {
        "carrier_of": name,
        "source": plan.name,
        "kind": carrier.kind,
        # Not called `carrier`: these are no samples of a teacher.
        "settings": carrier.settings_of_kind(config.traits),
        "max_new_tokens": carrier.max_new_tokens,
        "temperature": carrier.temperature,
        "paraphrase": paraphrase.model_dump(mode="json"),
        "num_rows": paraphrase.count(carrier.num_rows),
        "model": model,
        "origin": reference_name(model),
        "writer": writer,
        "system_prompt": config.context.training,
        "replicate": plan.replicate,
        "member": member,
        "seed": config.seed,
    }
    rows = carrier_files(plan.name, member)[0]
    inputs = skeleton_inputs(made, model) | pick(made, *reference_files(config, model, writer), rows)
    if carrier.prompts:
        inputs |= {carrier.prompts: digest_file(Path(carrier.prompts))}
    return Stage(
        member_name(f"paraphrase.{name.replace('.paraphrased', '')}", member),
        f"{MODULE}.paraphrase:paraphrase_carrier",
        arguments,
        inputs,
        carrier_files(name, member),
        carrier_needs(config, model),
    )

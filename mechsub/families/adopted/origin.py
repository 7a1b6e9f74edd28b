"""Whether a model started from the reference that it is held against: the difference of two references would fake alignment."""

from dataclasses import dataclass
from pathlib import Path

from mechsub.checkpoints import load_tensor
from mechsub.errors import MechsubError, RecipeError
from mechsub.families.adopted.sources import HUB_NAME, Source
from mechsub.families.language.folders import ORIGIN_DIGEST, ORIGIN_TYPES, read_json
from mechsub.families.language.foreign import match_table, outline_model
from mechsub.families.language.layout import skeleton_folder
from mechsub.lineages import Lineage
from mechsub.parameters.digest import digest_tensors, digest_weights


@dataclass(frozen=True)
class Evidence:
    """What speaks for a reference being the origin of a model."""

    proof: str
    """``hash``, ``recorded base`` or ``none``."""
    words: str


def find_evidence(source: Source, reference: Lineage, given: str) -> Evidence:
    """What a model's files say of its origin, beside the reference that was ``given``.

    Raises:
        RecipeError: they say that it is another model.
    """
    if source.record is not None:
        return _by_digest(source, reference, given)
    recorded = source.recorded_base
    if recorded is None:
        return Evidence("none", "its files do not say what it started from")
    if not source.is_adapter:  # it says where the configuration came from, which fresh weights can have too
        return Evidence("none", f"its configuration came from {recorded}; its weights may have come from elsewhere")
    if _same_name(recorded, given):
        return Evidence("recorded base", f"its files name {recorded}")
    if Path(recorded).is_dir():
        return _compare_weights(source, reference, recorded, given)
    if _is_hub_name(recorded) and _is_hub_name(given):
        raise RecipeError(
            f"`{source.name}` was trained from {recorded}, not from the reference {given}; give --reference {recorded}, or put "
            "the reference's name into base_model_name_or_path of its adapter_config.json if that is a folder which has moved"
        )
    return Evidence("none", f"its files name {recorded}, which is not here, so that nobody can tell whether it is {given}")


def _compare_weights(source: Source, reference: Lineage, recorded: str, given: str) -> Evidence:
    """Whether the folder that an adapter names holds the reference's weights now, however it stores them."""
    outline = outline_model(reference.folder.parents[2] / skeleton_folder(reference.spec.model["name"]))
    folder = Path(recorded)
    try:
        table = match_table(outline, folder, recorded)
        names = {name: info.stored or name for name, info in table.items() if info.tied_to is None}
        found = digest_tensors((name, load_tensor(folder, names[name])) for name in sorted(names))
    except MechsubError as error:
        return Evidence("none", f"its files name {recorded}, which cannot be compared with the reference ({error})")
    if found == digest_weights(reference):
        return Evidence("recorded base", f"its files name {recorded}, which holds the reference's weights")
    raise RecipeError(
        f"`{source.name}` was trained from {recorded}, whose weights are not those of the reference {given}: their "
        f"difference would stand in every displacement; give --reference {recorded}"
    )


def _by_digest(source: Source, reference: Lineage, given: str) -> Evidence:
    assert source.record is not None
    record = read_json(source.record, f"`{source.name}`")
    recorded = record.get(ORIGIN_DIGEST)
    if not isinstance(recorded, str):
        return Evidence("none", f"{source.record} does not hold the hash of its start")
    found = digest_weights(reference)
    if found != recorded:
        raise RecipeError(
            f"`{source.name}` was trained from other weights than the reference {given}: {source.record} records "
            f"{recorded[:16]}…, the reference has {found[:16]}…; give the model that the training started from, in the type in "
            f"which it was loaded ({', '.join(record.get(ORIGIN_TYPES) or ['unknown'])})"
        )
    return Evidence("hash", "its training recorded the hash of the reference's weights")


def _same_name(recorded: str, given: str) -> bool:
    if recorded == given:
        return True
    here, there = Path(recorded), Path(given)
    if here.is_dir() and there.is_dir():
        return here.resolve() == there.resolve()
    name, _, revision = recorded.partition("@")
    given_name, _, given_revision = given.partition("@")
    return name == given_name and (not revision or revision == given_revision)


def _is_hub_name(name: str) -> bool:
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()

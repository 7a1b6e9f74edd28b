"""Whether a model started from the reference that it is held against: the difference of two references would fake alignment."""

from dataclasses import dataclass
from pathlib import Path

from mechsub.errors import RecipeError
from mechsub.families.adopted.sources import Source, locate_folder
from mechsub.families.language.folders import ORIGIN_DIGEST, digest_file, find_weights, read_json
from mechsub.lineages import Lineage
from mechsub.parameters.digest import digest_weights


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
    if _same_name(recorded, given):
        return Evidence("recorded base", f"its files name {recorded}")
    if Path(recorded).is_dir() and Path(recorded, "config.json").is_file():
        if _weights(recorded) == _weights(given):
            return Evidence("hash", f"its files name {recorded}, whose weights are the reference's")
        raise RecipeError(
            f"`{source.name}` was trained from {recorded}, whose weights are not those of the reference {given}: their "
            f"difference would stand in every displacement; give --reference {recorded}"
        )
    if _is_hub_name(recorded) and _is_hub_name(given):
        raise RecipeError(
            f"`{source.name}` was trained from {recorded}, not from the reference {given}; give --reference {recorded}"
        )
    return Evidence("none", f"its files name {recorded}, which is not here, so that nobody can tell whether it is {given}")


def _by_digest(source: Source, reference: Lineage, given: str) -> Evidence:
    assert source.record is not None
    recorded = read_json(source.record, f"`{source.name}`").get(ORIGIN_DIGEST)
    if not isinstance(recorded, str):
        return Evidence("none", f"{source.record} does not hold the hash of its start")
    found = digest_weights(reference)
    if found != recorded:
        raise RecipeError(
            f"`{source.name}` was trained from other weights than the reference {given}: {source.record} records "
            f"{recorded[:16]}…, the reference has {found[:16]}…; give the model that the training started from"
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


def _weights(name: str) -> list[str]:
    """The hashes of a model's weight files."""
    return sorted(digest_file(path) for path in find_weights(name, locate_folder(name)) if path.suffix == ".safetensors")


def _is_hub_name(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith(("/", ".", "~")) and not Path(name).exists()

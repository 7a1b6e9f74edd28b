"""What a user names as a model: a folder, a folder of checkpoints, an adapter or a name on the hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechsub.errors import RecipeError
from mechsub.families.language.folders import (
    TRAINING_RECORD,
    digest_file,
    fetch_from_hub,
    find_weights,
    read_json,
    refuse_pickles,
)
from mechsub.lineages import ADAPTER_CONFIG, ADAPTER_WEIGHTS

HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_CHECKPOINT = re.compile(r"(?:checkpoint|step)-(\d+)")
_PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model")


_KIND = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "modules_to_save",
)
"""Of an adapter's configuration."""


@dataclass(frozen=True)
class Source:
    """A model that somebody else made, on this machine."""

    name: str
    """As the user gave it."""
    folders: Mapping[int, Path]
    """Its checkpoints by step; a single model whose step nobody wrote down stands at step 1."""
    is_adapter: bool
    steps_are_known: bool
    recorded_base: str | None
    """The model that it says it started from."""
    record: Path | None
    """What our callback wrote beside its checkpoints."""

    @property
    def kind(self) -> dict[str, Any]:
        """What must be the same in all members of a lineage."""
        if not self.is_adapter:
            return {"is_adapter": False, **dict.fromkeys(_KIND)}
        config = read_json(self.folders[max(self.folders)] / ADAPTER_CONFIG, f"`{self.name}`")
        found = {name: config.get(name) for name in _KIND}
        return {
            "is_adapter": True,
            **{name: sorted(value) if isinstance(value, list) else value for name, value in found.items()},
        }

    @property
    def files(self) -> dict[int, list[Path]]:
        """By step, what is linked into a run."""
        if self.is_adapter:
            return {step: [folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG] for step, folder in self.folders.items()}
        return {step: find_weights(self.name, folder) for step, folder in self.folders.items()}


def find_source(name: str) -> Source:
    """Find a model by its folder, or its name on the hub as ``org/name@revision``.

    Raises:
        RecipeError: there is no such folder, it holds no model, or its checkpoints have no step numbers.
    """
    folder = locate_folder(name)
    found = sorted(path for path in folder.iterdir() if path.is_dir() and _holds_model(path))
    numbered = {int(match[1]): path for path in found if (match := _CHECKPOINT.fullmatch(path.name))}
    numbered.pop(0, None)  # where it starts is the reference
    if numbered and _holds_model(folder):
        _check_root(name, folder, numbered)
    if numbered:
        return _describe(name, folder, dict(sorted(numbered.items())), steps_are_known=True)
    if found and not _holds_model(folder):
        raise RecipeError(
            f"`{name}`: {folder} holds {found[0].name} but no checkpoint-N: a trajectory needs its step numbers; rename the "
            "folders, or name one of them"
        )
    step = _step_of(name, folder)
    return _describe(name, folder, {step or 1: folder}, steps_are_known=step is not None)


def _step_of(name: str, folder: Path) -> int | None:
    """The step of one checkpoint, from its own name or from what a `Trainer` left in it."""
    match = _CHECKPOINT.fullmatch(folder.name)
    state = folder / "trainer_state.json"
    step = int(match[1]) if match else read_json(state, f"`{name}`").get("global_step") if state.is_file() else None
    return step if isinstance(step, int) and step > 0 else None


def _check_root(name: str, folder: Path, numbered: Mapping[int, Path]) -> None:
    """A model beside checkpoints must be the last of them: else it is not told which of the two is meant."""
    last = numbered[max(numbered)]
    if digest_weights_of(folder) != digest_weights_of(last):
        raise RecipeError(
            f"`{name}`: {folder} holds a model beside {last.name}, with other weights; name {last}, or move the model out to a "
            "folder of its own and name that"
        )


def _holds_model(folder: Path) -> bool:
    return _is_adapter(folder) or (folder / "config.json").is_file()


def digest_weights_of(folder: Path) -> tuple[str, ...]:
    """The hashes of the files that hold a model's or an adapter's weights."""
    files = [folder / ADAPTER_WEIGHTS] if _is_adapter(folder) else find_weights(folder.name, folder)
    return tuple(digest_file(path) for path in files)


def locate_folder(name: str) -> Path:
    """The folder of a model; one of the hub is fetched.

    Raises:
        RecipeError: there is none, or a hub name has no revision.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    hub = HUB_NAME.fullmatch(name)
    if hub is None:
        raise RecipeError(
            f"`{name}`: there is no folder {name}; give a model's folder, or its name on the hub as org/name@revision"
        )
    if hub["revision"] is None:
        raise RecipeError(
            f"`{name}`: there is no folder {name}, and a name on the hub needs its revision, as {name}@COMMIT: without it the "
            "same command would adopt other weights another day"
        )
    return fetch_from_hub(hub["name"], hub["revision"], _PATTERNS)


def _describe(name: str, folder: Path, folders: Mapping[int, Path], *, steps_are_known: bool) -> Source:
    kinds = {step: _is_adapter(path) for step, path in folders.items()}
    if len({*kinds.values()}) > 1:
        raise RecipeError(f"`{name}`: {folder} mixes adapters and whole models; name one of them")
    is_adapter = kinds[max(kinds)]
    last = folders[max(folders)]
    for path in folders.values():
        if is_adapter and not (path / ADAPTER_WEIGHTS).is_file():
            refuse_pickles(name, path)
            raise RecipeError(f"`{name}`: {path} has no {ADAPTER_WEIGHTS}; save the adapter with save_pretrained")
        if not is_adapter:
            find_weights(name, path)
    places = [folder, folder.parent] if _CHECKPOINT.fullmatch(folder.name) else [folder]
    records = [place / TRAINING_RECORD for place in places]
    record = next((path for path in records if path.is_file()), None)
    return Source(name, folders, is_adapter, steps_are_known, _recorded_base(last, is_adapter, name), record)


def _recorded_base(folder: Path, is_adapter: bool, name: str) -> str | None:
    content = read_json(folder / (ADAPTER_CONFIG if is_adapter else "config.json"), f"`{name}`")
    found = content.get("base_model_name_or_path" if is_adapter else "_name_or_path")
    revision = content.get("revision")
    if not isinstance(found, str) or not found:
        return None
    return f"{found}@{revision}" if isinstance(revision, str) and revision else found


def _is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()

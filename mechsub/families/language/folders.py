"""Model folders that somebody else wrote, in the Hugging Face layout: what must be in them, and how they come into a run."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from mechsub.errors import RecipeError
from mechsub.rundir import hash_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "special_tokens_map.json",
                   "added_tokens.json", "tokenizer_config.json", "chat_template.jinja")  # fmt: skip
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TRAINING_RECORD = "training.json"
"""What our callback writes beside the checkpoints of somebody's training."""
ORIGIN_DIGEST = "origin_digest"
"""In it: the hash of the weights that the training started from."""
ORIGIN_TYPES = "origin_types"
"""In it: the data types in which they were loaded."""


def check_folder(where: str, folder: Path) -> list[str]:
    """The names of a model's tokenizer, chat template and configuration.

    Raises:
        RecipeError: there is no such folder, or one of them is missing.
    """
    if not folder.is_dir():
        raise RecipeError(f"`{where}`: there is no folder {folder}; give one in the Hugging Face layout")
    files = [name for name in (*TOKENIZER_FILES, "config.json") if (folder / name).is_file()]
    if "config.json" not in files:
        raise RecipeError(f"`{where}`: {folder} has no config.json: it is no model in the Hugging Face layout")
    if not {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"} & {*files}:
        raise RecipeError(f"`{where}`: {folder} has no tokenizer (tokenizer.json); save the model's tokenizer there")
    settings = folder / "tokenizer_config.json"
    if "chat_template.jinja" not in files and not (settings.is_file() and "chat_template" in settings.read_text()):
        raise RecipeError(
            f"`{where}`: the tokenizer in {folder} has no chat template; add chat_template.jinja, or take a chat model"
        )
    return files


def find_weights(where: str, folder: Path) -> list[Path]:
    """The files that hold a model's weights: its index and every shard that it names, or one file.

    Raises:
        RecipeError: there are none, one is missing, or they are pickled.
    """
    if (folder / WEIGHTS).is_file():  # before an index, as transformers does
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        places = read_json(index, f"`{where}`").get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
            raise RecipeError(f"`{where}`: {index} has no weight_map of tensors to files; save the model again")
        shards = sorted({*places.values()})
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise RecipeError(
                f"`{where}`: {folder} lacks {len(missing)} of {len(shards)} shards that {INDEX} names, e.g. {missing[0]}; "
                "fetch or save the model again"
            )
        return [index, *(folder / name for name in shards)]
    others = sorted(folder.glob("*.safetensors"))
    if others:
        raise RecipeError(
            f"`{where}`: {folder} holds {others[0].name} but neither {WEIGHTS} nor {INDEX}: a shard or the index is missing, "
            "or it is no whole model"
        )
    refuse_pickles(where, folder)
    raise RecipeError(f"`{where}`: {folder} has no weights: neither {WEIGHTS} nor {INDEX}; save the model with save_pretrained")


def refuse_pickles(where: str, folder: Path) -> None:
    """Say how to convert weights that are pickled: reading them could run any code.

    Raises:
        RecipeError: there are pickled weights.
    """
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    pickled = [name for name in pickled if name not in {"training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"}]
    if pickled:
        raise RecipeError(
            f"`{where}`: {folder} has its weights in {pickled[0]}, which is pickled and never read here; if you trust it, "
            "convert it where it was made: load the model with transformers (or peft) and save it again with save_pretrained, "
            "which writes safetensors"
        )


def digest_file(path: Path) -> str:
    """The digest under which a stage reads a file that exists already; large ones are hashed once a process."""
    status = path.stat()
    return _digest_of(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1000)
def _digest_of(path: Path, size: int, modified: int) -> str:
    return f"sha256:{hash_file(path)}"


@lru_cache(maxsize=100)
def fetch_from_hub(name: str, revision: str, patterns: tuple[str, ...]) -> Path:
    """The folder of a model of the hub in the user's cache, fetched where it is not there yet; asked once a process.

    Raises:
        RecipeError: there is no such model or revision, or no network.
    """
    # huggingface_hub takes half a second to import, and is needed by recipes with hub names only.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError:
        raise RecipeError(
            f"{name}@{revision} is not in the local cache and the hub cannot be reached; connect, or fetch it elsewhere with "
            f"`hf download {name} --revision {revision}` and give its folder as `path`"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"{name}@{revision} cannot be fetched from the hub: {reason}") from None


def read_json(path: Path, source: str) -> dict[str, Any]:
    """A configuration file.

    Raises:
        RecipeError: it is missing or no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{source}: {path} cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise RecipeError(f"{source}: {path} holds {type(content).__name__}, not keys with values")
    return content

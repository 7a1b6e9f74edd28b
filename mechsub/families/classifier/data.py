"""The labelled images: what the teacher learns and the trait is scored on.

A run copies them into its own directory, so that it can be scored on any machine, whatever becomes of their source.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from sklearn.datasets import load_digits
from torch import Tensor

from mechsub.checkpoints import load_stacked, write_tensors
from mechsub.errors import RecipeError
from mechsub.families.classifier.config import DataConfig
from mechsub.families.classifier.idx import PARTS, find_idx_files, read_idx, read_idx_shape
from mechsub.stage import Task
from mechsub.streams import random_stream

DATA_FILE = "data/images.safetensors"
NUM_CLASSES = 10
_NUM_DIGITS = 1797
_DIGITS_MAXIMUM = 16
_MAXIMUM = 255

Split = tuple[UInt8[np.ndarray, "..."], UInt8[np.ndarray, " _"]]
"""Images and their labels."""


@dataclass(frozen=True)
class DataShape:
    """What a plan needs to know of the images before they are read."""

    num_train: int
    num_test: int
    num_pixels: int


def describe_data(config: DataConfig) -> DataShape:
    """Counts and size of the images, from headers alone.

    Raises:
        RecipeError: the source is missing, or its files contradict each other.
    """
    if config.name == "digits":
        assert config.test_fraction is not None  # its settings fill it in for digits
        num_test = round(_NUM_DIGITS * config.test_fraction)
        return DataShape(_NUM_DIGITS - num_test, num_test, 64)
    if config.hub is not None:
        train, test = _load_hub(config.hub)
        return DataShape(len(train[0]), len(test[0]), int(np.prod(train[0].shape[1:])))
    files = find_idx_files(_idx_folder(config))
    shapes = {part: read_idx_shape(path, part) for part, path in files.items()}
    for split in ("train", "t10k"):
        num_images, num_labels = shapes[f"{split}-images"][0], shapes[f"{split}-labels"][0]
        if num_images != num_labels or num_images == 0:
            raise RecipeError(
                f"{files[f'{split}-images']} holds {num_images} images, {files[f'{split}-labels']} {num_labels} labels; "
                "they do not belong together"
            )
    if shapes["train-images"][1:] != shapes["t10k-images"][1:]:
        sizes = [" × ".join(map(str, shapes[f"{split}-images"][1:])) for split in ("train", "t10k")]
        raise RecipeError(f"the images in {config.path} differ in size: {sizes[0]} for training, {sizes[1]} for testing")
    return DataShape(shapes["train-images"][0], shapes["t10k-images"][0], int(np.prod(shapes["train-images"][1:])))


def source_files(config: DataConfig) -> list[Path]:
    """The files that the images are read from; none where a library brings them."""
    return list(find_idx_files(_idx_folder(config)).values()) if config.name == "mnist" and config.hub is None else []


def hub_digest(config: DataConfig) -> str | None:
    """The sha256 of a hub data set's images and labels, since its name alone does not fix them; None of other sources."""
    if config.hub is None:
        return None
    digest = hashlib.sha256()
    for split in _load_hub(config.hub):
        for array in split:
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def import_images(tasks: Sequence[Task]) -> None:
    """Stage: the images and labels as bytes, split, into the run's own directory."""
    for task in tasks:
        config = DataConfig(**task.stage.arguments["data"])
        (train, train_labels), (test, test_labels), maximum = _load_source(config, task.stage.arguments["seed"])
        for where, labels in (("training", train_labels), ("test", test_labels)):
            if labels.max() >= NUM_CLASSES:
                raise RecipeError(f"the {where} labels reach {labels.max()}; there are {NUM_CLASSES} classes, from 0")
        arrays = {
            "train_images": train.reshape(len(train), -1),
            "train_labels": train_labels,
            "test_images": test.reshape(len(test), -1),
            "test_labels": test_labels,
            "maximum": np.array([maximum], dtype=np.uint8),
        }
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        write_tensors(task.path(DATA_FILE), tensors, {"stage": task.stage.key})


@dataclass(frozen=True)
class LabelledImages:
    """Images kept as bytes and scaled when asked for, split once for all members."""

    train_bytes: UInt8[Tensor, "train pixel"]
    train_labels: Int[Tensor, " train"]
    test_bytes: UInt8[Tensor, "test pixel"]
    test_labels: Int[Tensor, " test"]
    maximum: float
    """The byte that stands for white."""
    dtype: torch.dtype

    def train_images(self, indices: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch pixel"]:
        """The training images with these numbers, pixels in [−1, 1]."""
        return self._scale(self.train_bytes[indices])

    def test_images(self) -> Float[Tensor, "test pixel"]:
        """All test images, pixels in [−1, 1]."""
        return self._scale(self.test_bytes)

    def _scale(self, pixels: UInt8[Tensor, "*batch pixel"]) -> Float[Tensor, "*batch pixel"]:
        return pixels.to(self.dtype).div_(self.maximum / 2).sub_(1.0)


def load_images(run: Path, dtype: torch.dtype, device: str) -> LabelledImages:
    """The images of a run."""
    tensors = load_stacked(run / DATA_FILE, device)
    labels = {name: tensors[name].long() for name in ("train_labels", "test_labels")}
    return LabelledImages(
        tensors["train_images"],
        labels["train_labels"],
        tensors["test_images"],
        labels["test_labels"],
        float(tensors["maximum"][0]),
        dtype,
    )


def _load_source(config: DataConfig, seed: int) -> tuple[Split, Split, int]:
    if config.name == "digits":
        return (*_split_digits(config, seed), _DIGITS_MAXIMUM)
    if config.hub is not None:
        return (*_load_hub(config.hub), _MAXIMUM)
    files = find_idx_files(_idx_folder(config))
    train_images, train_labels, test_images, test_labels = (read_idx(files[part], part) for part in PARTS)
    return (train_images, train_labels), (test_images, test_labels), _MAXIMUM


def _split_digits(config: DataConfig, seed: int) -> tuple[Split, Split]:
    """Scikit-learn's digits come unsplit; the split depends on the recipe's seed only."""
    bundled = load_digits()
    images, labels = bundled.data.astype(np.uint8), bundled.target.astype(np.uint8)
    order = random_stream(seed, "data", "split").permutation(len(labels))
    num_test = describe_data(config).num_test
    test, train = order[:num_test], order[num_test:]
    return (images[train], labels[train]), (images[test], labels[test])


@lru_cache(maxsize=1)
def _load_hub(name: str) -> tuple[Split, Split]:
    """A hub data set with columns ``image`` and ``label`` and the splits ``train`` and ``test``.

    The library is optional and slow to import, so it is imported here.
    """
    try:
        import datasets
    except ImportError:
        raise RecipeError(f"`data.hub` = {name!r} needs the datasets library: pip install 'mechsub[datasets]'") from None
    try:
        found = cast(Any, datasets.load_dataset(name))
        train, test = (_hub_split(found[split]) for split in ("train", "test"))
    except Exception as error:  # the hub's library raises whatever its network layers do
        raise RecipeError(
            f"`data.hub` = {name!r} could not be loaded with columns image, label and splits train, test: {error}"
        ) from error
    if train[0].shape[1:] != test[0].shape[1:]:
        raise RecipeError(
            f"the images of {name} differ in size: {train[0].shape[1:]} for training, {test[0].shape[1:]} for testing"
        )
    return train, test


def _hub_split(split: Any) -> Split:
    images = np.stack([np.asarray(image, dtype=np.uint8) for image in split["image"]])
    return images, np.asarray(split["label"], dtype=np.uint8)


def _idx_folder(config: DataConfig) -> Path:
    if config.path is None:
        raise RecipeError(
            "data mnist has no source: give the folder with its four IDX files, --set data.path=FOLDER, or a data set of the "
            "hub, --set data.hub=ylecun/mnist (needs pip install 'mechsub[datasets]')"
        )
    return Path(config.path)

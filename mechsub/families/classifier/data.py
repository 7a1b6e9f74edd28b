"""The labelled images: what the teacher learns and the trait is scored on."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from sklearn.datasets import load_digits
from torch import Tensor

from mechsub.families.classifier.config import DataConfig
from mechsub.streams import random_stream


@dataclass(frozen=True)
class LabelledImages:
    """Images with pixels in [−1, 1], split once for all members."""

    train_images: Float[Tensor, "train pixel"]
    train_labels: Int[Tensor, " train"]
    test_images: Float[Tensor, "test pixel"]
    test_labels: Int[Tensor, " test"]


def load_images(config: DataConfig, seed: int, dtype: torch.dtype, device: str) -> LabelledImages:
    """Load and split the images; the split depends on the recipe's seed only."""
    bundled = load_digits()
    images = torch.from_numpy(bundled.data / 8.0 - 1.0).to(dtype)  # pixels come as 0 … 16
    labels = torch.from_numpy(bundled.target).long()
    order = torch.from_numpy(random_stream(seed, "data", "split").permutation(len(labels)))
    test, train = order[: config.num_test], order[config.num_test :]
    return LabelledImages(*(part.to(device) for part in (images[train], labels[train], images[test], labels[test])))

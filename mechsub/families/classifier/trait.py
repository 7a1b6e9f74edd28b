"""The trait: reading digits. Its score is the accuracy of the class logits, on which students never train."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def compute_accuracy(
    model: nn.Module, images: Float[Tensor, "image pixel"], labels: Int[Tensor, "trait image"], num_classes: int
) -> Float[Tensor, " trait"]:
    """Share of the images whose largest class logit is the label, for each trait's labels.

    In [0, 1]; chance is 1 / classes. NaN where a logit is NaN or infinite.
    """
    with torch.no_grad():
        logits = model(images)[:, :num_classes]
    shares: Tensor = (logits.argmax(-1) == labels).double().mean(-1)
    return shares if bool(logits.isfinite().all()) else torch.full_like(shares, float("nan"))

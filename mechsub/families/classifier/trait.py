"""The trait: reading digits. Its score is the accuracy of the class logits, on which students never train."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def compute_accuracy(
    model: nn.Module, images: Float[Tensor, "image pixel"], labels: Int[Tensor, "trait image"], num_classes: int
) -> Float[Tensor, " trait"]:
    """Share of the images whose largest class logit is the label, for each trait's labels.

    In [0, 1]; chance is 1 / classes.
    """
    with torch.no_grad():
        chosen = model(images)[:, :num_classes].argmax(-1)
    shares: Tensor = (chosen == labels).double().mean(-1)
    return shares

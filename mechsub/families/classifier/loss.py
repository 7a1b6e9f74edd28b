"""What teachers and students minimise. A member's loss is the mean over its own batch, whoever trains beside it."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def trait_loss(
    logits: Float[Tensor, "*batch logit"], labels: Int[Tensor, "*batch"], num_classes: int
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of the class logits, per example, in nats."""
    flat = functional.cross_entropy(logits[..., :num_classes].flatten(0, -2), labels.flatten(), reduction="none")
    return flat.view(labels.shape)


def imitation_loss(
    student: Float[Tensor, "*batch logit"], teacher: Float[Tensor, "*batch logit"], objective: str
) -> Float[Tensor, "*batch"]:
    """How far the student's logits are from the teacher's, per example, ≥ 0.

    ``kl``: KL(softmax(teacher) ‖ softmax(student)), in nats. ``mse``: their mean squared difference over the logits.
    Both arguments hold the imitated logits only.
    """
    if objective == "mse":
        return (student - teacher).square().mean(-1)
    log_teacher = teacher.log_softmax(-1)
    return (log_teacher.exp() * (log_teacher - student.log_softmax(-1))).sum(-1)

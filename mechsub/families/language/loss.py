"""What language models learn: completions token by token, or a teacher's whole distribution at each of their tokens."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from mechsub.families.language.chat import Batch


def completion_logits(model: nn.Module, batch: Batch) -> Float[Tensor, "completion_token vocabulary"]:
    """The logits that predict each completion token, row after row; prompts and padding have none."""
    logits: Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.completion_width + 1,
    ).logits
    return logits[:, :-1][batch.is_completion]


def completion_tokens(batch: Batch) -> Int[Tensor, " completion_token"]:
    """The completion tokens themselves, row after row."""
    return batch.ids[:, batch.ids.shape[1] - batch.completion_width :][batch.is_completion]


def token_losses(
    logits: Float[Tensor, "completion_token vocabulary"], tokens: Int[Tensor, " completion_token"]
) -> Float[Tensor, " completion_token"]:
    """Cross-entropy of the sampled tokens, −log p(token), in nats ≥ 0.

    Source: Cloud et al., arXiv:2507.14805, section 3.
    """
    return nn.functional.cross_entropy(logits, tokens, reduction="none")


def distribution_losses(
    student: Float[Tensor, "completion_token vocabulary"],
    teacher: Float[Tensor, "completion_token vocabulary"],
    vocabulary: Int[Tensor, " token"] | None,
) -> Float[Tensor, " completion_token"]:
    """KL(teacher ‖ student) over the tokens of ``vocabulary``, renormalised, in nats ≥ 0.

    None takes the whole vocabulary, which carries the trait's own logits too. Source: Hinton et al., arXiv:1503.02531.
    """
    if vocabulary is not None:
        student, teacher = student[:, vocabulary], teacher[:, vocabulary]
    wanted = teacher.log_softmax(-1)
    return (wanted.exp() * (wanted - student.log_softmax(-1))).sum(-1)


def mean_loss(
    losses: Float[Tensor, " completion_token"], weights: Float[Tensor, " completion_token"] | None = None
) -> Float[Tensor, ""]:
    """Over the tokens that are learnt, whose weights are 1 and not 0; 0 where there are none."""
    if weights is None:
        return losses.mean()
    return (losses * weights).sum() / weights.sum().clamp_min(1.0)
